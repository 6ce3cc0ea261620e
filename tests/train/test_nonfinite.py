"""Steps that are not finite: their tiles are named whoever holds them, and left out alike if that was asked for."""

import dataclasses
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from command import ledger, metrics
from groups import in_a_group
from processes import Quiet, local_stream, settings, train
from safetensors.torch import load_file
from tiny_checkpoint import names
from tiny_earth import make_block, make_data_set
from upath import UPath

from mmearth_ray.errors import DataError
from mmearth_ray.experiment import open_experiment
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.write import write_shard
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.train import commit, zero
from mmearth_ray.train.board import progress_text
from mmearth_ray.train.checkpoint import load_state
from mmearth_ray.train.loop import Worker, run
from mmearth_ray.train.nonfinite import IN_A_ROW, NAMED, Blame, Guard
from mmearth_ray.train.window import Sums

POISONED = ["3", "21"]
TILES = 32
SKIP = ("train.nonfinite=skip", "train.ledger=true", "train.steps=8", "optimizer.lr=1e-3", "checkpoint.every=3")
PARTED = ("zero1", "zero3")
LAYOUTS = [(), ("train.workers=2", "train.micro_batch=2"), ("train.workers=2", "train.fetch_every=4")]


def poisoned(path: Path, ids: list[str]) -> tuple[str, ...]:
    """A data set in which tiles hold values whose squares are no float32, and settings with the statistics of a clean one."""
    make_data_set(path / "clean", tiles=TILES, size=40)
    (path / "bad").mkdir(exist_ok=True)
    blocks = [make_block(range(start, start + 8), 40, TILES) for start in range(0, TILES, 8)]
    for block in blocks:
        for row, name in enumerate(block.id):
            if name in ids:
                block.layers["era5"][row, :3] = 1e30
    record = write_shard(path / "bad" / "part-00000.parquet", blocks, 40)
    Manifest(path / "bad", "tiny", 40, (record,), {"kind": "tiny"}).save()
    return (f"data.statistics={path / 'clean' / 'manifest.json'}",)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    poisoned(folder, POISONED)
    return folder


def of(shards: Path) -> str:
    return f"data.statistics={shards / 'clean' / 'manifest.json'}"


def fails(rank: int, workers: int, shards: Path, folder: Path, arguments: tuple[str, ...]) -> None:
    config = settings(shards / "bad", folder, of(shards), f"train.workers={workers}", *arguments)
    with pytest.raises(DataError) as caught:
        run(open_experiment(config, shards / "bad"), Worker(rank, workers, torch.device("cpu"), 1), local_stream, Quiet())
    (folder / f"said-{rank}").write_text(str(caught.value))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("more", [(), ("train.fetch_every=6", "train.micro_batch=2")], ids=str)
def test_the_end_names_the_tile_on_every_worker(workers: int, more: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    in_a_group(workers, tmp_path, fails, shards, tmp_path, ("train.ledger=true", "train.steps=8", *more))
    held = ledger(tmp_path)
    step = min(step for step, ids in held.items() if set(ids) & set(POISONED))
    (tile,) = set(held[step]) & set(POISONED)
    said = rf"the loss of step {step} is not finite \(era5\), by tile {tile}; nothing was saved after the last checkpoint; "
    said += r"look at the tiles with `shards verify`, set train\.nonfinite=skip to leave such steps out, or use a lower "
    for rank in range(workers):
        assert re.match(said, (tmp_path / f"said-{rank}").read_text())
    assert [entry["step"] for entry in metrics(tmp_path)] == list(range(1, step))


@pytest.fixture(scope="module")
def skipping(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "skipping"
    train(shards / "bad", folder, of(shards), *SKIP)
    return folder


def test_a_skipped_step_is_counted_named_and_its_tiles_are_consumed(skipping: Path) -> None:
    held, lines = ledger(skipping), metrics(skipping)
    assert [line["step"] for line in lines] == sorted(held) == list(range(1, 9))
    assert sorted(tile for step in range(1, 5) for tile in held[step]) == sorted(map(str, range(TILES)))
    bad = {step: sorted(set(ids) & set(POISONED)) for step, ids in held.items() if set(ids) & set(POISONED)}
    assert 2 <= len(bad) <= 4
    for line in lines:
        assert line["skipped_steps"] == sum(step <= line["step"] for step in bad)
        assert ("skipped" in line) == (line["loss"] is None) == (line["losses"]["era5"] is None) == (line["step"] in bad)
        if line["step"] in bad:
            assert sorted(line["skipped"].pop("ids")) == bad[line["step"]]
            assert line["skipped"] == {"targets": ["era5"], "tiles": len(bad[line["step"]])}
    state = load_state(skipping / "checkpoints" / "step-00000008")
    assert state.skipped_steps == len(bad)
    weights = load_file(skipping / "checkpoints" / "step-00000008" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_skips_and_losses_do_not_know_the_layout(layout: tuple[str, ...], shards: Path, skipping: Path, tmp_path: Path) -> None:
    train(shards / "bad", tmp_path, of(shards), *SKIP, *layout)
    assert ledger(tmp_path) == ledger(skipping)
    for ours, theirs in zip(metrics(tmp_path), metrics(skipping), strict=True):
        assert ours["loss"] == (theirs["loss"] and pytest.approx(theirs["loss"], rel=1e-5))
        assert (ours["skipped_steps"], ours.get("skipped")) == (theirs["skipped_steps"], theirs.get("skipped"))


def beginning_with(shards: Path, folder: Path, ids: list[str]) -> str:
    """A seed whose first step holds one of the tiles."""
    for seed in range(20):
        source = open_experiment(settings(shards / "bad", folder, of(shards), f"seed={seed}"), shards / "bad").source
        if set(next(source.batches([(0, 8)]))["id"].tolist()) & set(ids):
            return f"seed={seed}"
    raise AssertionError("no seed begins with them")


def in_parts(rank: int, workers: int, shards: Path, folder: Path, stop_at: int, seed: str) -> None:
    """Every run of one stage ends before a step that is not finite, which the other stage begins with."""
    zero.KEPT_WHOLE = 0  # even the smallest parameter
    layout = (f"train.workers={workers}", "train.micro_batch=2")
    for first, second in (PARTED, PARTED[::-1]):
        for engine, last in ((first, stop_at), (second, 8)):
            arguments = (*SKIP, *layout, f"train.engine={engine}", f"train.stop_at={last}")
            (folder / second).mkdir(exist_ok=True)
            experiment = open_experiment(settings(shards / "bad", folder / second, of(shards), *arguments), shards / "bad")
            run(experiment, Worker(rank, workers, torch.device("cpu"), 1), local_stream, Quiet())
    for engine in PARTED:
        (folder / f"{engine}-ends").mkdir(exist_ok=True)
        fails(rank, workers, shards, folder / f"{engine}-ends", (*layout[1:], f"train.engine={engine}", seed))


@pytest.fixture(scope="module")
def parted(shards: Path, skipping: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two workers with the model in parts: skipping and resumed, and ended by their first step."""
    folder = tmp_path_factory.mktemp("parted")
    second = [line["step"] for line in metrics(skipping) if "skipped" in line][1]
    in_a_group(2, folder, in_parts, shards, folder, second - 1, beginning_with(shards, folder, POISONED))
    return folder


@pytest.mark.parametrize("engine", PARTED)
def test_a_model_in_parts_skips_in_a_resumed_step_and_learns_the_same(engine: str, skipping: Path, parted: Path) -> None:
    found = parted / engine
    assert ledger(found) == ledger(skipping)
    for ours, theirs in zip(metrics(found), metrics(skipping), strict=True):
        assert ours["loss"] == (theirs["loss"] and pytest.approx(theirs["loss"], rel=1e-5))
        assert (ours["skipped_steps"], ours.get("skipped")) == (theirs["skipped_steps"], theirs.get("skipped"))


def test_a_model_in_parts_ends_at_its_first_step_with_the_same_words(shards: Path, parted: Path, tmp_path: Path) -> None:
    fails(0, 1, shards, tmp_path, (beginning_with(shards, tmp_path, POISONED),))
    expected = (tmp_path / "said-0").read_text()
    assert expected.startswith("the loss of step 1 is not finite (era5), by tile")
    for folder in (parted / f"{engine}-ends" for engine in PARTED):
        assert [(folder / f"said-{rank}").read_text() for rank in range(2)] == [expected] * 2
        assert metrics(folder) == []


@pytest.mark.parametrize("first", ["train.stop_at=2", "train.stop_at=4", "train.nonfinite=stop"])
def test_a_run_that_is_resumed_skips_and_learns_the_same(first: str, shards: Path, skipping: Path, tmp_path: Path) -> None:
    if "stop_at" in first:
        train(shards / "bad", tmp_path, of(shards), *SKIP, first)
    else:  # the choice is made once it is needed
        fails(0, 1, shards, tmp_path, (*SKIP, first))
    train(shards / "bad", tmp_path, of(shards), *SKIP)
    for ours, theirs in zip(metrics(tmp_path), metrics(skipping), strict=True):
        assert (ours["loss"], ours["skipped_steps"]) == (theirs["loss"], theirs["skipped_steps"])
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        last = Path("checkpoints") / "step-00000008" / file
        assert (tmp_path / last).read_bytes() == (skipping / last).read_bytes()


@pytest.mark.parametrize("store_fails", [False, True])
def test_a_checkpoint_on_its_way_to_a_store_is_kept_when_a_loss_ends_the_run(
    store_fails: bool, shards: Path, store: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends the run is told, with the lines before it, whether or not the store takes the checkpoint."""
    recipe = (*SKIP, "train.nonfinite=stop", "seed=4")
    fails(0, 1, shards, tmp_path, recipe)
    before = metrics(tmp_path)
    assert before
    last, refused, upload, judge = f"step-{len(before):08d}", threading.Event(), commit.upload, Guard.judge

    def held(local: Path, place: UPath) -> None:
        if last in place.path:
            assert refused.wait(60)
            if store_fails:
                raise DataError("the store is away")
        upload(local, place)

    def judged(self: Guard, *given: Any) -> Any:
        found = judge(self, *given)
        if found[1]:
            refused.set()
        return found

    monkeypatch.setattr(commit, "upload", held)
    monkeypatch.setattr(Guard, "judge", judged)
    (tmp_path / "away").mkdir()
    fails(0, 1, shards, tmp_path / "away", (*recipe, "checkpoint.every=1", f"checkpoint.directory={store}"))
    assert (last in names(store)) != store_fails
    assert [line["loss"] for line in metrics(tmp_path / "away")] == [line["loss"] for line in before]
    said, expected = ((folder / "said-0").read_text() for folder in (tmp_path / "away", tmp_path))
    assert said == expected + ("; the checkpoint before it was not saved either (the store is away)" if store_fails else "")


def test_what_skips_always_ends_with_the_model_to_blame_however_often_it_is_resumed(tmp_path: Path) -> None:
    arguments = (*poisoned(tmp_path, [str(i) for i in range(TILES)]), "train.nonfinite=skip", "train.steps=20")
    config = settings(tmp_path / "bad", tmp_path / "run", *arguments, "checkpoint.every=4")
    said = rf"the loss of step {IN_A_ROW} is not finite \(era5\), by every one of its tiles (\S+, ){{7}}\S+, and so were the "
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{said}{IN_A_ROW - 1} steps before it, which were left out: that is the model"):
            run(open_experiment(config, tmp_path / "bad"), Worker(0, 1, torch.device("cpu"), 1), local_stream, Quiet())
        assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == list(range(1, IN_A_ROW))
    state = load_state(tmp_path / "run" / "checkpoints" / "step-00000008")
    assert (state.skipped_steps, state.skipped_in_a_row) == (8, 8)


@pytest.mark.parametrize(
    ("blame", "said"),
    [
        (Blame(), "the gradient of step 4 is not finite, though its loss is: no tile is known to be the cause"),
        (Blame(["a", "b"], 0, []), "the loss of step 4 is not finite (a, b), by none of its tiles by itself"),
        (Blame(["a"], 2, ["x/1", "x/2"]), "the loss of step 4 is not finite (a), by tiles x/1, x/2"),
        (Blame(["a"], 5, ["1", "2"]), "the loss of step 4 is not finite (a), by tiles 1, 2 and 3 more"),
        (
            Blame(["a"], 64, list("12345678")),
            "the loss of step 4 is not finite (a), by every one of its tiles 1, 2, 3, 4, 5, 6, 7, 8 and 56 more",
        ),
    ],
)
def test_what_is_said(blame: Blame, said: str) -> None:
    assert blame.said(4, 64) == said


def test_a_step_in_between_begins_the_count_anew_and_a_gradient_alone_asks_for_no_tile() -> None:
    target = SimpleNamespace(name="a")
    config = SimpleNamespace(train=SimpleNamespace(nonfinite="skip"))
    experiment: Any = SimpleNamespace(config=config, spec=SimpleNamespace(targets=(target,)))
    guard = Guard(experiment, cast(Any, None), MicroBatches(1, 100, 8, 1, 0, 8), Quiet().warn)
    steps = [False] * (IN_A_ROW - 1) + [True] + [False] * IN_A_ROW
    one = Sums(torch.ones(1, dtype=torch.float64), torch.ones(1), 1.0, 8)
    sums = [dataclasses.replace(one, applied=applied) for applied in steps]
    lines, refused = guard.judge(sums, [{"step": step} for step, _ in enumerate(steps, 1)])
    assert refused.startswith(f"the gradient of step {2 * IN_A_ROW} is not finite, though its loss is")
    assert [line["skipped_steps"] for line in lines][-1] == 2 * (IN_A_ROW - 1)
    assert lines[0]["skipped"] == {"targets": [], "tiles": 0, "ids": []}
    assert NAMED == 8


def test_the_live_line_shows_a_loss_that_is_not_finite() -> None:
    progress = {"step": 3, "loss": None, "tiles_per_second": 12.0, "data_wait": 0.0, "validation": {"loss": None}}
    assert "loss not finite  held out not finite" in progress_text(progress, 3, (0.0, 1))
