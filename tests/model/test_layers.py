"""Layers: layouts put cells where they belong, GRN follows its formula, silent channels have gradients."""

from typing import Any

import pytest
import torch
from tensors import assert_near, draw_patches
from torch import Tensor
from torch.nn import functional

from mmearth_ray.model.layers import GRN, SCOPES, Block, BlockConv, DenseLayout, DepthwiseConv, ImageConv, PackedLayout, Scope

GRID = (3, 5)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _blocks(map_BDHW: Tensor, visible_BV: Tensor, cells: int) -> Tensor:
    """Cells of visible patches, cut out one patch at a time."""
    cut = [
        [map_BDHW[b, :, cells * (v // 5) :, cells * (v % 5) :][:, :cells, :cells].permute(1, 2, 0) for v in row.tolist()]
        for b, row in enumerate(visible_BV)
    ]
    return torch.stack([torch.stack(row) for row in cut])


@pytest.mark.parametrize("cells", [8, 4, 2, 1])
def test_depthwise_sees_visible_neighbours_only(cells: int, generator: torch.Generator) -> None:
    visible_BV, hidden_BN = draw_patches(2, 15, 6, generator)
    map_BDHW = torch.randn(2, 4, 3 * cells, 5 * cells, generator=generator)
    for b, row in enumerate(hidden_BN.tolist()):
        for n in row:
            map_BDHW[b, :, n // 5 * cells : (n // 5 + 1) * cells, n % 5 * cells : (n % 5 + 1) * cells] = 0
    conv = DepthwiseConv(4)
    packed = conv(_blocks(map_BDHW, visible_BV, cells), PackedLayout(visible_BV, GRID))
    dense = functional.conv2d(map_BDHW, conv.weight, conv.bias, padding=3, groups=4)
    assert_near(packed, _blocks(dense, visible_BV, cells), 1e-6)


def test_depthwise_gradients_are_exact(generator: torch.Generator) -> None:
    visible_BV, _ = draw_patches(2, 15, 4, generator)
    layout = PackedLayout(visible_BV, GRID)
    x = torch.randn(2, 4, 2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 7, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: layout.depthwise(x, w, None), (x, weight))
    d_x, *_ = torch.autograd.grad(layout.depthwise(x, weight, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        d_x.sum().backward()


def test_pixels_are_the_visible_patches(generator: torch.Generator) -> None:
    visible_BV, _ = draw_patches(2, 15, 6, generator)
    image = torch.randn(2, 3, 24, 40, generator=generator)
    assert torch.equal(PackedLayout(visible_BV, GRID).pixels(image), _blocks(image, visible_BV, 8))


@pytest.mark.parametrize("layout_of", [PackedLayout, None])
def test_convolution_of_an_image_sees_zeros_where_hidden(layout_of: Any, generator: torch.Generator) -> None:
    visible_BV, _ = draw_patches(2, 15, 6 if layout_of else 15, generator)
    image = torch.randn(2, 3, 24, 40, generator=generator)
    image_before = image.clone()
    conv = ImageConv(3, 4)
    seen = torch.zeros(2, 15).scatter(1, visible_BV, 1.0).view(2, 1, 3, 5).repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = functional.conv2d(image * seen, conv.weight, conv.bias, padding=1)
    if layout_of:
        assert_near(conv(image, layout_of(visible_BV, GRID)), _blocks(expected, visible_BV, 8), 1e-6)
    else:
        assert_near(conv(image, DenseLayout())[:, 0].permute(0, 3, 1, 2), expected, 1e-6)
    assert torch.equal(image, image_before)


def test_hidden_pixels_never_leak(generator: torch.Generator) -> None:
    visible_BV, _ = draw_patches(1, 15, 6, generator)
    image = torch.full((1, 3, 24, 40), float("nan"))
    for v in visible_BV[0].tolist():
        image[0, :, 8 * (v // 5) : 8 * (v // 5) + 8, 8 * (v % 5) : 8 * (v % 5) + 8] = 1
    layout = PackedLayout(visible_BV, GRID)
    assert layout.pixels(image).isfinite().all()
    assert ImageConv(3, 4)(image, layout).isfinite().all()


@pytest.mark.parametrize("groups", [1, 3])
def test_block_conv_is_an_ordinary_strided_convolution(groups: int, generator: torch.Generator) -> None:
    conv = BlockConv(3, 6, 2, groups=groups)
    x = torch.randn(2, 1, 8, 12, 3, generator=generator)
    expected = functional.conv2d(x[:, 0].permute(0, 3, 1, 2), conv.weight, conv.bias, stride=2, groups=groups)
    assert_near(conv(x, DenseLayout())[:, 0].permute(0, 3, 1, 2), expected, 1e-6)


def test_grn_follows_its_formula_per_image(generator: torch.Generator) -> None:
    grn = GRN(5, eps=1e-4)
    torch.nn.init.normal_(grn.gamma, generator=generator)
    torch.nn.init.normal_(grn.beta, generator=generator)
    x = torch.randn(2, 3, 2, 2, 5, generator=generator)
    for b in range(2):
        length = x[b].reshape(-1, 5).norm(dim=0)
        expected = grn.gamma * (x[b] * (length / (length.mean() + 1e-4))) + grn.beta + x[b]
        assert_near(grn(x)[b], expected, 1e-6)
        assert_near(grn(x[b : b + 1])[0], expected, 1e-6)


def test_batch_wide_grn_is_that_of_one_image_made_of_all(generator: torch.Generator) -> None:
    image, batch = GRN(5), GRN(5, scope="batch")
    for grn in (image, batch):
        torch.nn.init.ones_(grn.gamma)
    x = torch.randn(3, 2, 1, 4, 5, generator=generator)
    assert_near(batch(x), image(x.flatten(0, 1)[None]).view_as(x), 1e-6)
    assert not torch.allclose(batch(x)[0], batch(x[:1])[0])


@pytest.mark.parametrize("scope", SCOPES)
def test_grn_gradients_are_exact(scope: Scope, generator: torch.Generator) -> None:
    grn = GRN(4, scope=scope).double()
    torch.nn.init.normal_(grn.gamma, generator=generator)
    x = torch.randn(2, 2, 1, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    def plain(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=SCOPES[scope], keepdim=True)
        return gamma * (x * (length / (length.mean(-1, keepdim=True) + grn.eps))) + beta + x

    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((grn(x) * weights).sum(), (x, grn.gamma, grn.beta))
    expected = torch.autograd.grad((plain(x, grn.gamma, grn.beta) * weights).sum(), (x, grn.gamma, grn.beta))
    for name, a, b in zip(("x", "gamma", "beta"), ours, expected, strict=True):
        assert_near(a, b, 1e-6, name)


def test_grn_of_silent_channels_has_finite_gradients() -> None:
    grn = GRN(3)
    torch.nn.init.ones_(grn.gamma)
    for x in (torch.zeros(1, 2, 1, 1, 3), torch.tensor([0.0, 1.0, 0.0]).expand(1, 2, 1, 1, 3).clone()):
        x.requires_grad_()
        grn(x).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_a_block_computes_in_bfloat16_under_autocast(generator: torch.Generator) -> None:
    block = Block(8)
    x = torch.randn(2, 1, 4, 4, 8, generator=generator, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x, DenseLayout())
    y.sum().backward()
    assert_near(y, block(x, DenseLayout()), 2e-2)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
