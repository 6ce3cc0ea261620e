"""The encoder: published sizes, packed against masked-dense, dense against packed, errors."""

import pytest
import torch
from tensors import assert_near, draw_patches, randomise
from torch import Tensor

from benchmarks.masked_dense import encode
from mmearth_ray.model.encoder import PATCH_SIZES, SIZES, STEMS, Encoder, Stem, build_encoder

DEPTHS, DIMS = (1, 1, 2, 1), (8, 16, 24, 32)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize(
    ("size", "patch", "count"),
    [("atto", 8, 3_389_320), ("atto", 16, 3_389_440), ("tiny", 8, 27_871_104), ("tiny", 16, 27_871_392)],
)
def test_parameter_counts_are_the_published_ones(size: str, patch: int, count: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(size, 12, patch)
    assert sum(p.numel() for p in encoder.parameters()) == count


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("patch", PATCH_SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds_and_runs_without_memory(size: str, patch: int, stem: Stem) -> None:
    with torch.device("meta"):
        encoder = build_encoder(size, 12, patch, stem)
        image, visible = torch.empty(2, 12, 7 * patch, 7 * patch), torch.empty(2, 19, dtype=torch.int64)
        assert encoder(image, visible).shape == (2, 19, 1, 1, SIZES[size].dims[-1])
        assert encoder(image).shape == (2, 1, 7, 7, SIZES[size].dims[-1])


def test_parameters_have_dense_layouts_and_published_names() -> None:
    shapes = {name: tuple(p.shape) for name, p in Encoder(12, DEPTHS, DIMS, 16).named_parameters()}
    assert shapes["initial_conv.0.weight"] == (8, 12, 3, 3)
    assert shapes["initial_conv.1.weight"] == (8,)
    assert shapes["stem.0.weight"] == (8, 1, 2, 2)
    assert shapes["downsample_layers.2.0.bias"] == (24,)
    assert shapes["downsample_layers.2.1.weight"] == (32, 24, 2, 2)
    assert shapes["stages.2.1.dwconv.weight"] == (24, 1, 7, 7)
    assert shapes["stages.2.1.pwconv1.weight"] == (96, 24)
    assert shapes["stages.2.1.grn.gamma"] == (96,)
    assert Encoder(12, DEPTHS, DIMS, 32, "original").stem_orig[0].weight.shape == (8, 12, 4, 4)


def _gradients(encoder: Encoder, output: Tensor, weights: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    loss = (output * weights).sum() / weights.numel() ** 0.5
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("patch", PATCH_SIZES)
def test_packed_equals_masked_dense(patch: int, stem: Stem, missing: bool, generator: torch.Generator) -> None:
    encoder = Encoder(5, DEPTHS, DIMS, patch, stem)
    randomise(encoder, generator)
    visible_BV, _ = draw_patches(2, 20, 8, generator)
    image = torch.randn(2, 5, 4 * patch, 5 * patch, generator=generator)
    if missing:  # pixels without data are 0 after normalisation, and stay tokens: single ones, and a whole patch
        image *= (torch.rand(2, 1, 4 * patch, 5 * patch, generator=generator) > 0.2).float()
        row, column = divmod(int(visible_BV[0, 0]), 5)
        image[0, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 0
    weights = torch.randn(2, 8, 32, generator=generator)

    packed = encoder(image, visible_BV).flatten(2)
    seen_BL = torch.zeros(2, 20).scatter(1, visible_BV, 1.0)
    masked = encode(dict(encoder.named_parameters()), image, seen_BL, patch, DEPTHS)
    masked = masked.flatten(2).transpose(1, 2).gather(1, visible_BV[..., None].expand(-1, -1, 32))
    assert_near(packed, masked, 1e-5, "output")
    expected = _gradients(encoder, masked, weights)
    for name, gradient in _gradients(encoder, packed, weights).items():
        assert_near(gradient, expected[name], 1e-5, name)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("patch", PATCH_SIZES)
def test_dense_equals_packed_with_everything_visible(patch: int, stem: Stem, generator: torch.Generator) -> None:
    encoder = Encoder(3, DEPTHS, DIMS, patch, stem)
    randomise(encoder, generator)
    image = torch.randn(2, 3, 2 * patch, 3 * patch, generator=generator)
    everything = torch.arange(6).expand(2, -1)
    weights = torch.randn(2, 6, 32, generator=generator)
    packed, dense = encoder(image, everything).flatten(1, 3), encoder(image)
    assert dense.shape == (2, 1, 2, 3, 32)
    assert_near(dense.flatten(1, 3), packed, 1e-5, "output")
    expected = _gradients(encoder, packed, weights)
    for name, gradient in _gradients(encoder, dense.flatten(1, 3), weights).items():
        assert_near(gradient, expected[name], 1e-5, name)


def test_an_image_without_any_data_has_finite_gradients(generator: torch.Generator) -> None:
    encoder = Encoder(3, DEPTHS, DIMS, 8)  # biases may all be 0, as at the start of training
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.fill_(0)
    visible_BV, _ = draw_patches(1, 9, 4, generator)
    encoder(torch.zeros(1, 3, 24, 24), visible_BV).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_errors_name_value_bound_and_remedy() -> None:
    with pytest.raises(ValueError, match="no encoder size 'micro'; use one of atto"):
        build_encoder("micro", 12, 16)
    with pytest.raises(ValueError, match="8, 16, 32 pixels wide; got 12"):
        build_encoder("atto", 12, 12)
    with pytest.raises(ValueError, match="multiples of the patch size 16; got 120: crop to 112 or pad to 128"):
        Encoder(3, DEPTHS, DIMS, 16)(torch.zeros(1, 3, 112, 120))
    with pytest.raises(ValueError, match="stem must be one of modified, original; got 'none'"):
        Encoder(3, DEPTHS, DIMS, 16, "none")  # pyright: ignore[reportArgumentType]
