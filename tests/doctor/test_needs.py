"""What a run takes: counted from the built model, and from the sizes of its checkpoints and batches."""

import pytest

from mmearth_ray.config import load, targets_of
from mmearth_ray.doctor.needs import count_weights, needs_of
from mmearth_ray.keys import Config
from mmearth_ray.model.mpmae import MPMAE, build_mpmae

SMALL = ["model.image_size=32", "model.decoder_width=64", "model.targets=[sentinel2,biome]", "train.global_batch=16"]


def built(config: Config) -> MPMAE:
    return build_mpmae(size="atto", in_channels=12, image_size=32, patch_size=8, targets=targets_of(config), decoder_width=64)


def test_weights_are_those_of_the_model() -> None:
    config = load(SMALL)
    assert count_weights(config) == sum(parameter.numel() for parameter in built(config).parameters())
    assert count_weights(load([*SMALL, "model.image_sizes=[32,64]"])) > count_weights(config)


@pytest.mark.parametrize(
    ("engine", "each"),
    [  # weights, gradients, what the optimizer holds (with DeepSpeed's copy of the weights), and the bucket that travels
        ("ddp", 1 + 1 + 2),
        ("zero1", 1 + 1 + 3 / 4 + 1),
        ("zero2", 1 + 1 / 4 + 3 / 4 + 1),
        ("zero3", 1 / 4 + 1 / 4 + 3 / 4 + 2),
    ],
)
def test_a_worker_holds_its_part(engine: str, each: float) -> None:
    config = load([*SMALL, "train.workers=4", f"train.engine={engine}"])
    needs, model = needs_of(config), built(config)
    whole = sum(p.numel() for p in model.parameters() if p.numel() < 100_000) if engine == "zero3" else 0  # on every worker
    assert needs.gradients == 4 * needs.weights
    assert needs.state == pytest.approx(4 * (each * needs.weights + whole), abs=8)  # a bucket is even
    assert needs.offloaded == 0


def test_what_is_offloaded_is_still_held() -> None:
    kept, offloaded = (
        needs_of(load([*SMALL, "train.workers=4", "train.engine=zero3", f"train.offload={word}"])) for word in ("false", "true")
    )
    assert offloaded.state == kept.state
    assert offloaded.offloaded == 12 * offloaded.weights // 4


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["checkpoint.keep=3"], 4),  # and the one that is being written
        (["checkpoint.keep=2", "checkpoint.keep_every=50", "train.steps=200"], 2 + 4 + 1),
        (["checkpoint.keep=0", "checkpoint.every=10", "train.steps=100"], 11),
    ],
)
def test_checkpoints_hold_weights_and_two_moments(arguments: list[str], count: int) -> None:
    needs = needs_of(load([*SMALL, *arguments]))
    assert needs.checkpoints == count * 12 * needs.weights


def test_batches_read_ahead_are_counted_for_all_workers() -> None:
    config = load([*SMALL, "train.workers=2", "data.read_ahead=3", "data.tiles_per_task=10"])
    tile = 32 * 32 * 12 * 2  # twelve bands of uint16; what is no map takes next to nothing
    tiles = 2 * (3 * 8 + 2 * 10)
    assert needs_of(config).store == tiles * tile / 0.5
    wider = load([*SMALL, "train.workers=2", "data.read_ahead=3", "data.tiles_per_task=10", "model.image_sizes=[32,64]"])
    assert needs_of(wider).store == 4 * tiles * tile / 0.5
