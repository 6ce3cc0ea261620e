"""Exported models as modules for whole images: weights, bands, statistics, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensors import assert_near, randomise
from torch import Tensor

import mmearth_ray
from mmearth_ray.checkpoints.folder import Description, write_exported
from mmearth_ray.checkpoints.load import load_encoder
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.model.encoder import Encoder
from mmearth_ray.objective import ENCODER

DEPTHS, DIMS = (1, 1, 2, 1), (8, 16, 24, 32)
STATISTICS = {
    "l1c": {"mean": [1.0, 2.0, 3.0], "std": [1.0, 1.0, 1.0]},
    "l2a": {"mean": [4.0, 8.0, None], "std": [2.0, 4.0, None]},
}
DESCRIPTION = Description(
    size=None, depths=list(DEPTHS), dims=list(DIMS), patch_size=16, image_size=48, stem="modified", grn="batch",
    input="sentinel2", bands=["B4", "B3", "B2"], units=["1"] * 3, missing=[0], statistics=STATISTICS, targets=[],
    target_bands={}, normalise_targets=[], weighting="unweighted", decoder_width=8, decoder_depth=1,
)  # fmt: skip


@pytest.fixture
def encoder() -> Encoder:
    encoder = Encoder(3, DEPTHS, DIMS, 16)
    randomise(encoder, torch.Generator().manual_seed(8))
    return encoder


def write(folder: Path, encoder: Encoder, description: Description = DESCRIPTION) -> Path:
    return write_exported(folder, description, {ENCODER + name: t for name, t in encoder.state_dict().items()})


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def test_the_module_is_the_encoder_for_whole_images(encoder: Encoder, tmp_path: Path) -> None:
    folder, image = write(tmp_path / "exported", encoder), draw(2, 3, 32, 48)
    expected = encoder(image).squeeze(1).permute(0, 3, 1, 2)
    for path in (folder, str(folder), tmp_path):
        loaded = load_encoder(path)
        assert torch.equal(loaded.forward_features(image), expected)
        assert_near(loaded(image), expected.mean((2, 3)), 1e-5)
    assert loaded.bands == ("B4", "B3", "B2")
    assert loaded.description == DESCRIPTION
    assert loaded.pretrained_cfg["input_size"] == (3, 48, 48)
    assert load_encoder(folder, num_classes=4)(image).shape == (2, 4)
    maps = load_encoder(folder, features_only=True, out_indices=(1, 2))(image)
    for found, stage in zip(maps, encoder.stages_of(image)[1:3], strict=True):
        assert torch.equal(found, stage.squeeze(1).permute(0, 3, 1, 2))


def test_grn_is_per_image_whatever_it_was_in_pretraining(encoder: Encoder, tmp_path: Path) -> None:
    loaded, images = load_encoder(write(tmp_path / "m", encoder)), draw(2, 3, 16, 32)
    assert DESCRIPTION.grn == "batch"
    assert_near(loaded(images)[:1], loaded(images[:1]), 1e-5)


def test_raw_values_are_normalised_by_the_statistics_of_their_product(encoder: Encoder, tmp_path: Path) -> None:
    loaded = load_encoder(write(tmp_path / "m", encoder))
    raw = torch.tensor([[6, 0, 7]], dtype=torch.uint16).view(1, 3, 1, 1)
    assert loaded.normalise("l2a")(raw).flatten().tolist() == [1, 0, 0]
    assert loaded.normalise("l1c")(raw).flatten().tolist() == [5, 0, 4]
    with pytest.raises(UsageError, match="name one of l1c, l2a"):
        loaded.normalise()
    bare = load_encoder(write(tmp_path / "bare", encoder, replace(DESCRIPTION, statistics=None)), features_only=True)
    with pytest.raises(DataError, match="without statistics"):
        bare.normalise("l2a")


def test_what_does_not_fit_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no exported model"):
        load_encoder(tmp_path)
    for wrong, message in [
        ({"depths": [1, 1, 1, 1]}, "not those of its description: see model.encoder.stages.2.1"),
        ({"depths": [1, 1, 3, 1]}, "not those of its description: see model.encoder.stages.2.2"),
        ({"bands": ["B4", "B3"]}, "see model.encoder.initial_conv.0.weight; make the folder again"),
        ({"patch_size": 12}, "8, 16, 32 pixels wide; got 12"),
    ]:
        folder = write(tmp_path / "m", encoder, replace(DESCRIPTION, statistics=None, units=[], **wrong))
        with pytest.raises(DataError, match=message):
            load_encoder(folder, features_only=True, out_indices=[0])
    folder = write(tmp_path / "m", encoder)
    with pytest.raises(ValueError, match="add features_only=True"):
        load_encoder(folder, out_indices=[0])  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_the_package_offers_both_ways_to_an_encoder(encoder: Encoder, tmp_path: Path) -> None:
    assert mmearth_ray.load_encoder(write(tmp_path / "m", encoder)).num_features == 32
    assert mmearth_ray.create_encoder("atto").num_features == 320
