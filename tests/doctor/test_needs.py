"""What a run takes: counted from the built model, and from the sizes of its checkpoints and batches."""

import pytest

from mmearth_ray.config import load, targets_of
from mmearth_ray.doctor.needs import count_weights, needs_of
from mmearth_ray.model.mpmae import build_mpmae

SMALL = ["model.image_size=32", "model.decoder_width=64", "model.targets=[sentinel2,biome]", "train.global_batch=16"]


def test_weights_are_those_of_the_model() -> None:
    config = load(SMALL)
    model = build_mpmae(size="atto", in_channels=12, image_size=32, patch_size=8, targets=targets_of(config), decoder_width=64)
    assert count_weights(config) == sum(parameter.numel() for parameter in model.parameters())
    assert count_weights(load([*SMALL, "model.image_sizes=[32,64]"])) > count_weights(config)


@pytest.mark.parametrize(
    ("arguments", "bytes_each"),
    [
        ([], 16),
        (["train.engine=zero1"], 4 + 4 + 8 / 4),
        (["train.engine=zero2"], 4 + (4 + 8) / 4),
        (["train.engine=zero3"], 16 / 4),
        (["train.engine=zero3", "train.offload=true"], 8 / 4),
    ],
)
def test_a_worker_holds_its_part(arguments: list[str], bytes_each: float) -> None:
    needs = needs_of(load([*SMALL, "train.workers=4", *arguments]))
    assert needs.gradients == 4 * needs.weights
    assert needs.state == pytest.approx(bytes_each * needs.weights, abs=1)


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
