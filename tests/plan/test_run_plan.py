"""The plan of a run: what it counts, how engines share it, and what fits."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from mmearth_ray.config import load
from mmearth_ray.modalities import tasks
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.model.mpmae import build_mpmae
from mmearth_ray.plan import memory as accounts
from mmearth_ray.plan.fit import largest, of
from mmearth_ray.plan.memory import ENGINES, Load, Memory, peak
from mmearth_ray.plan.passes import Bytes, Passes, Snapshot, Watch, build, follow, make_batch
from mmearth_ray.train import zero
from mmearth_ray.train.engines import ENGINES as REAL_ENGINES

SMALL = ["model.image_size=16", "model.patch_size=8"]
TARGETS = tasks()
# Two matrices and a vector: the gradient of the last comes first, beside most activations.
TOY = Passes((10, 400_000, 200_000), (Snapshot((Bytes(1000, 50), Bytes(0, 60)), 0), Snapshot((Bytes(500, 20),), 200_000),
                                       Snapshot((Bytes(100, 0),), 600_000), Snapshot((Bytes(0, 0),), 600_010)))  # fmt: skip


@pytest.fixture(scope="module")
def atto() -> list[Passes]:
    return follow(load(SMALL), on_gpu=False)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_built_model(size: str) -> None:
    with torch.device("meta"):
        config = load([f"model.size={size}", "model.image_size=112", "model.patch_size=16"])
        counted = sum(p.numel() for p in build(config).parameters())
        model = build_mpmae(size=size, in_channels=len(TARGETS[0].bands), image_size=112, patch_size=16, targets=TARGETS)
    assert counted == sum(p.numel() for p in model.parameters()) + len(TARGETS)  # and a weight of every loss


def test_every_parameters_gradient_is_met_once(atto: list[Passes]) -> None:
    (passes,) = atto
    assert passes.parameters == tuple(p.numel() for p in build(load(SMALL)).parameters())
    steps = [after.done - before.done for before, after in pairwise(passes.snapshots)]
    assert sorted(steps) == sorted(passes.parameters)
    assert passes.snapshots[0].done == 0
    assert passes.snapshots[-1].done == sum(passes.parameters)


class _Saved:
    """Bytes of the distinct storages that autograd keeps, but for those of the module."""

    def __init__(self, module: nn.Module) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


@pytest.mark.parametrize("tiles", [1, 5])
def test_what_is_counted_without_values_is_what_a_real_pass_holds(atto: list[Passes], tiles: int) -> None:
    objective = build(load(SMALL))
    totals = torch.ones(len(objective.targets), dtype=torch.int64)
    saved = _Saved(objective)
    watch = Watch([*objective.parameters(), *objective.buffers()], tiles=1 << 60)
    with watch, watch.gradients_of(objective):
        batch = make_batch(objective, tiles, 16, 8, 0.6)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            loss, _ = objective(batch, totals, 1.0)
        kept = sum(saved.sizes.values())
        assert 0.8 * watch.live.fixed < kept <= watch.live.fixed  # the rest: the batch, the canvases of convolutions
        loss.backward()
    (passes,) = atto
    for planned, real in zip(passes.snapshots, watch.snapshots, strict=True):
        assert planned.done == real.done
        assert planned.activations(tiles) == pytest.approx(real.activations(0), rel=0.01, abs=4096)


def test_activations_grow_linearly_with_the_micro_batch(atto: list[Passes]) -> None:
    most = [max(moment.activations(tiles) for moment in atto[0].snapshots) for tiles in (64, 128, 256, 512)]
    growth = [(b - a) / n for (a, b), n in zip(pairwise(most), (64, 128, 256), strict=True)]
    assert growth == pytest.approx([growth[0]] * 3, rel=1e-3)
    assert growth[0] > 1e5  # bytes a tile: a 16 px tile of 12 bands is 6 KB


def test_recomputing_blocks_and_bfloat16_take_less() -> None:
    def most(*settings: str) -> int:
        (passes,) = follow(load([*SMALL, *settings]))
        return max(moment.activations(64) for moment in passes.snapshots)

    plain = most()
    assert most("train.activation_checkpointing=true") < 0.7 * plain
    assert most("train.precision=bf16") < 0.9 * plain


def test_image_sizes_that_take_turns_are_followed_each() -> None:
    passes = follow(load(["model.image_size=16", "model.patch_size=8", "model.image_sizes=[16,32]"]))
    assert len(passes) == 2
    assert passes[0].parameters == passes[1].parameters
    small, large = (max(m.activations(64) for m in p.snapshots) for p in passes)
    assert large > 1.2 * small
    assert peak("ddp", passes, 64, 2, 1) == max((peak("ddp", [p], 64, 2, 1) for p in passes), key=lambda m: m.total)


def test_the_engines_are_those_of_a_run() -> None:
    assert list(ENGINES) == list(REAL_ENGINES)


def parts(memory: Memory) -> tuple[float, ...]:
    return tuple(vars(memory).values())


def test_what_ddp_holds_adds_up() -> None:
    whole = 600_010 * 4
    assert peak("ddp", [TOY], 10, 1, 1).total == 3 * whole + max(1500, 700 + 800_000, 100 + 2_400_000, whole)
    assert parts(peak("ddp", [TOY], 10, 2, 1)) == (whole, whole, 2 * whole, 0, 1500)
    assert parts(peak("ddp", [TOY], 10, 1, 2)) == (whole, whole, 2 * whole, 0, 1500)
    assert peak("ddp", [TOY], 1000, 2, 1).activations == 60_000


@pytest.mark.parametrize(("engine", "shared"), [("zero1", 3), ("zero2", 3), ("zero3", 3)])
def test_shards_of_all_workers_sum_to_the_whole(engine: str, shared: int) -> None:
    for workers in (1, 2, 3, 8):
        optimizer = {memory.optimizer * workers for memory in ENGINES[engine](Load(TOY, 10, workers, False))}
        assert all(value == pytest.approx(shared * 600_010 * 4) for value in optimizer)


def test_each_stage_of_zero_shares_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "BUCKET", 1000)
    monkeypatch.setattr(accounts, "LIVE", 1000)
    totals = [peak(engine, [TOY], 10, 4, 2).total for engine in ENGINES]
    assert totals == sorted(totals, reverse=True)
    assert totals[:2] == pytest.approx([4 * 600_010 * 4, 3 * 600_010 * 4], rel=1e-3)  # moving gradients adds a quarter of them
    one, two, three = (list(ENGINES[engine](Load(TOY, 10, 4, True))) for engine in ("zero1", "zero2", "zero3"))
    whole = 600_010 * 4
    assert max(m.gradients for m in one) == whole * 5 / 4 - 1000 * 4  # its part, and what has not gone through the bucket
    assert max(m.gradients for m in two) == whole / 2  # of this micro-batch, and of those before
    assert {m.weights for m in two} == {whole}
    assert min(m.weights for m in three) == whole / 4 + 10 * 4  # its part, and the vector that is kept whole
    assert max(m.weights for m in three) == whole / 4 + 10 * 4 + 1000 * 4


def test_stage_3_gathers_all_weights_of_a_small_model() -> None:
    whole, kept = 600_010 * 4, 10 * 4
    first = next(iter(ENGINES["zero3"](Load(TOY, 10, 4, False))))
    assert parts(first) == (whole / 4 + whole, whole / 4, 3 * whole / 4, 2 * whole, 1500)
    assert first.weights == whole / 4 + kept + (whole - kept)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_micro_batch_is_the_largest_that_fits(atto: list[Passes], engine: str) -> None:
    share, workers = 96, 4
    needs = {tiles: of(engine, atto, tiles, share, workers).memory.total for tiles in (12, 16, 24)}
    for room in (needs[16], math.nextafter(needs[24], 0)):
        fit = largest(engine, atto, share, workers, room)
        assert fit is not None
        assert (fit.micro_batch, fit.micro_batches) == (16, 6)
        assert fit.memory.total == needs[16] <= room < needs[24]
    assert largest(engine, atto, share, workers, 1e6) is None
    moved = largest(engine, atto, share, workers, needs[24] - fit.memory.optimizer, offload=True)
    assert moved is not None
    assert moved.micro_batch == 24
    whole = largest(engine, atto, share, workers, 1e15)
    assert whole is not None
    assert (whole.micro_batch, whole.micro_batches) == (96, 1)


def test_a_billion_tiles_on_one_gpu_are_planned_at_once(atto: list[Passes]) -> None:
    fit = largest("ddp", atto, 10**9, 1, 1e9)
    assert fit is not None
    assert fit.micro_batch * fit.micro_batches == 10**9
    assert of("ddp", atto, 2 * fit.micro_batch, 10**9, 1).memory.total > 1e9
