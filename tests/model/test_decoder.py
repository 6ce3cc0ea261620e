"""The decoder: its equation written out, layouts of heads, and heads from rows of the table."""

from collections.abc import Mapping

import pytest
import torch
from tensors import assert_near, draw_patches, randomise
from torch import Tensor
from torch.nn import functional

from mmearth_ray.modalities import ClassCode, Kind, Level, Modality, tasks
from mmearth_ray.model.decoder import Decoder

MAP = Modality(name="rain", level=Level.PIXEL, kind=Kind.CONTINUOUS, bands=("a", "b"), dtype="float32", source="test")
LABEL = Modality(
    name="climate",
    level=Level.IMAGE,
    kind=Kind.CATEGORICAL,
    bands=("climate",),
    dtype="int16",
    classes=tuple(ClassCode(i, str(i)) for i in range(5)),
    source="test",
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _by_hand(parameters: Mapping[str, Tensor], features_BVD: Tensor, visible_BV: Tensor, grid: tuple[int, int]) -> Tensor:
    """Projection, mask token and one ConvNeXt V2 block in NCHW: (B, E, R, S)."""
    p, patches = parameters, grid[0] * grid[1]
    tokens = p["mask_token"].repeat(len(features_BVD), patches, 1)
    for b, row in enumerate(visible_BV.tolist()):
        for n, v in enumerate(row):
            tokens[b, v] = p["projection.weight"] @ features_BVD[b, n] + p["projection.bias"]
    x = tokens.transpose(1, 2).unflatten(2, grid)
    y = functional.conv2d(x, p["blocks.0.dwconv.weight"], p["blocks.0.dwconv.bias"], padding=3, groups=x.shape[1])
    norm = p["blocks.0.norm.weight"], p["blocks.0.norm.bias"]
    y = functional.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], *norm, eps=1e-6)
    y = functional.gelu(y @ p["blocks.0.pwconv1.weight"].T + p["blocks.0.pwconv1.bias"])
    length = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
    response = length / (length.mean(-1, keepdim=True) + 1e-6)
    y = p["blocks.0.grn.gamma"] * y * response + p["blocks.0.grn.beta"] + y
    return x + (y @ p["blocks.0.pwconv2.weight"].T + p["blocks.0.pwconv2.bias"]).permute(0, 3, 1, 2)


def test_the_decoder_follows_its_equation(generator: torch.Generator) -> None:
    decoder = Decoder(6, 8, (MAP, LABEL), width=16)
    randomise(decoder, generator)
    visible_BV, hidden_BN = draw_patches(2, 12, 5, generator)
    features_BVD = torch.randn(2, 5, 6, generator=generator)
    predictions = decoder(features_BVD, visible_BV, hidden_BN, (3, 4))
    parameters = dict(decoder.named_parameters())
    grid_BERS = _by_hand(parameters, features_BVD, visible_BV, (3, 4))

    head = functional.conv2d(
        grid_BERS, parameters["pixel_heads.rain.weight"][..., None, None], parameters["pixel_heads.rain.bias"]
    )
    assert predictions["rain"].shape == (2, 7, 64, 2)
    for b, row in enumerate(hidden_BN.tolist()):
        for n, place in enumerate(row):
            expected = head[b, :, place // 4, place % 4]  # channel ((row * P) + column) * C + c
            assert_near(predictions["rain"][b, n].flatten(), expected, 1e-5)
            assert_near(predictions["rain"][b, n].view(8, 8, 2)[3, 5, 1], expected[(3 * 8 + 5) * 2 + 1], 1e-5)

    places = grid_BERS.flatten(2).transpose(1, 2)
    norm = parameters["image_norm.weight"], parameters["image_norm.bias"]
    pooled = functional.layer_norm(places, (16,), *norm, eps=1e-6).mean(1)
    expected = pooled @ parameters["image_heads.climate.weight"].T + parameters["image_heads.climate.bias"]
    assert_near(predictions["climate"], expected, 1e-5)


def test_asking_for_all_patches_repeats_the_hidden_ones(generator: torch.Generator) -> None:
    decoder = Decoder(6, 8, (MAP,), width=16, depth=2)
    randomise(decoder, generator)
    visible_BV, hidden_BN = draw_patches(2, 12, 5, generator)
    features_BVD = torch.randn(2, 5, 6, generator=generator)
    all_BL = torch.arange(12).expand(2, -1)
    hidden = decoder(features_BVD, visible_BV, hidden_BN, (3, 4))["rain"]
    everywhere = decoder(features_BVD, visible_BV, all_BL, (3, 4))["rain"]
    for b in range(2):
        assert_near(hidden[b], everywhere[b, hidden_BN[b]], 1e-6)


def test_every_row_of_the_table_gets_a_head_of_its_width() -> None:
    with torch.device("meta"):
        decoder = Decoder(320, 8, tasks())
        visible, hidden = torch.empty(2, 19, dtype=torch.int64), torch.empty(2, 30, dtype=torch.int64)
        predictions = decoder(torch.empty(2, 19, 320), visible, hidden, (7, 7))
    for m in tasks():
        expected = (2, 30, 64, m.width) if m.level is Level.PIXEL else (2, m.width)
        assert predictions[m.name].shape == expected


def test_the_norm_of_image_heads_exists_only_if_they_do() -> None:
    assert not any("image_norm" in name for name, _ in Decoder(8, 8, (MAP,), width=16).named_parameters())
    assert any("image_norm" in name for name, _ in Decoder(8, 8, (LABEL,), width=16).named_parameters())
