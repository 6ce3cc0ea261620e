"""The depthwise convolution with its gradients written out, against the plain one of a dense map."""

import pytest
import torch
from tensors import draw_patches
from torch import Tensor
from torch.nn import functional

from mmearth_ray.model.depthwise import Canvas, DenseDepthwise, PackedDepthwise, column_groups
from mmearth_ray.model.layers import PackedLayout

GRIDS = ((1, 1), (3, 5))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _dense(x_BVQQD: Tensor, visible_BV: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps with zeros where nothing is visible, placed cell block by cell block: (B, D, H, W)."""
    batch, _, cells, _, width = x_BVQQD.shape
    maps = x_BVQQD.new_zeros(batch, width, grid[0] * cells, grid[1] * cells)
    for image, places in enumerate(visible_BV.tolist()):
        for slot, place in enumerate(places):
            row, column = place // grid[1] * cells, place % grid[1] * cells
            maps[image, :, row : row + cells, column : column + cells] = x_BVQQD[image, slot].permute(2, 0, 1)
    return maps


def _packed(maps: Tensor, like: Tensor, visible_BV: Tensor, grid: tuple[int, int]) -> Tensor:
    cells = like.shape[2]
    blocks = maps.unflatten(3, (grid[1], cells)).unflatten(2, (grid[0], cells)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
    return torch.stack([blocks[image, places] for image, places in enumerate(visible_BV)])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("side", [1, 3, 5, 7])
@pytest.mark.parametrize("cells", [1, 2, 4, 8])
def test_packed_is_the_plain_convolution_and_its_gradients(
    cells: int, side: int, grid: tuple[int, int], generator: torch.Generator
) -> None:
    patches = grid[0] * grid[1]
    visible_BV, _ = draw_patches(2, patches, max(patches * 2 // 5, 1), generator)
    shapes = ((*visible_BV.shape, cells, cells, 3), (3, 1, side, side), (3,), (*visible_BV.shape, cells, cells, 3))
    x, weight, bias, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2))
    canvas = Canvas(visible_BV, grid, cells, side)
    PackedDepthwise.apply(*ours, canvas)  # what this one leaves on the canvas is not in the way of the next
    found: Tensor = PackedDepthwise.apply(*ours, canvas)  # type: ignore[assignment]
    found.backward(grad)
    maps = functional.conv2d(_dense(theirs[0], visible_BV, grid), theirs[1], theirs[2], padding=side // 2, groups=3)
    expected = _packed(maps, x, visible_BV, grid)
    expected.backward(grad)
    torch.testing.assert_close(found, expected)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad)


@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (7, 7)])
def test_dense_is_the_plain_convolution_and_its_gradients(
    shape: tuple[int, int], side: int, generator: torch.Generator
) -> None:
    x, grad = (torch.randn(2, *shape, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 1, side, side), (3,)))
    ours, theirs = ([t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2))
    found: Tensor = DenseDepthwise.apply(*ours)  # type: ignore[assignment]
    expected = functional.conv2d(theirs[0].permute(0, 3, 1, 2), theirs[1], theirs[2], padding=side // 2, groups=3)
    found.backward(grad)
    expected.permute(0, 2, 3, 1).backward(grad)
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1))
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad)


def test_under_autocast_the_convolution_is_bf16_and_its_gradients_are_float32(generator: torch.Generator) -> None:
    visible_BV, _ = draw_patches(2, 15, 6, generator)
    layout = PackedLayout(visible_BV, (3, 5))
    x, weight = (torch.randn(s, generator=generator, requires_grad=True) for s in ((2, 6, 4, 4, 8), (8, 1, 7, 7)))
    with torch.autocast("cpu", torch.bfloat16):
        low = layout.depthwise(x, weight, None)
    assert low.dtype == torch.bfloat16
    low.float().square().mean().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    high = layout.depthwise(x.detach(), weight.detach(), None)
    assert (low - high).norm() < 2e-2 * high.norm()


@pytest.mark.parametrize("side", [1, 3, 5, 7, 9])
def test_columns_are_taken_once_each_by_three_or_one(side: int) -> None:
    groups = list(column_groups(side))
    assert [c for first, columns in groups for c in range(first, first + columns)] == list(range(side))
    assert {columns for _, columns in groups} <= {1, 3}
