"""The depthwise convolution of visible patches on a CPU, with its gradients written out.

oneDNN has a fast kernel for the weight gradient of a depthwise convolution only up to a width of three columns; a wider one
falls back to a general kernel that pads every channel to a block of 8 x 8 and takes ten times as long (oneDNN 3.12,
`jit_uni_dw_convolution` against `jit:avx2`).  So a 7x7 gradient is put together from columns 0-2, 3-5 and 6.

Visible cells are spread into zeroed maps whose rows are a few cells longer than the image: what lies between two rows is the
margin of both, and a map shifted by some columns is the same memory read from another start.

Shapes: B images, R x S patches in the grid of an image, V of them visible, Q cells along the side of a patch, K side of the
kernel, D channels; a map has H = R Q rows of W = S Q cells, `pitch` cells apart in memory.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from mmearth_ray.model.halo import LEAST_CELLS, Halos

FAST_COLUMNS = 3


class Canvas:
    """Maps on which the visible patches of a batch are laid out, over and over: what is hidden there stays zero."""

    def __init__(self, visible_BV: Tensor, grid: tuple[int, int], cells: int, kernel: int) -> None:
        rows, columns = grid
        self.cells, self.kernel = cells, kernel
        # Patches' worth of zeros between two rows: at least K // 2 cells, and at least one on either side of a row.
        gap = -(-max(kernel // 2, 2) // cells)
        self.left = min(cells, gap * cells // 2)  # cells of the gap that lie before a row; the others lie behind it
        self.shape = (len(visible_BV), rows * cells, (columns + gap) * cells)
        self.size = math.prod(self.shape)
        self.places = self._places(visible_BV, columns, columns + gap)
        self._sheets: dict[str, Tensor] = {}
        self._halos = Halos(visible_BV, grid, cells, kernel) if cells >= LEAST_CELLS else None

    def convolve(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None, spread_ND: Tensor | None = None) -> Tensor:
        """The depthwise convolution with zeros at hidden cells and outside: (B, V, Q, Q, D) -> the same.

        Large patches go with their surroundings; for small ones a whole map is cheaper, which may be there already.
        """
        if self._halos is not None:
            return self._halos.convolve(x_BVQQD, weight_D1KK, bias_D)
        flat_ND = self.spread(x_BVQQD, "features") if spread_ND is None else spread_ND
        return self.collect(_convolve(_read(flat_ND, self.shape, self.kernel), weight_D1KK, bias_D), x_BVQQD.shape)

    def _places(self, visible_BV: Tensor, columns: int, runs: int) -> Tensor:
        """Where each of the Q rows of each visible patch lies, counted in runs of Q cells: (B V Q,)."""
        image_B1 = torch.arange(self.shape[0], device=visible_BV.device)[:, None]
        first_BV = image_B1 * self.shape[1] * runs + visible_BV // columns * self.cells * runs + visible_BV % columns
        return (first_BV[..., None] + torch.arange(self.cells, device=visible_BV.device) * runs).flatten()

    def spread(self, x_BVQQD: Tensor, sheet: str) -> Tensor:
        """All maps in one row, with K // 2 cells of zeros before and behind them: (cells, D).

        Valid until the next features are spread on the same sheet.
        """
        margin, width = self.kernel // 2, x_BVQQD.shape[-1]
        flat_ND = self._sheets.get(sheet)
        if flat_ND is None or (flat_ND.shape[1], flat_ND.dtype) != (width, x_BVQQD.dtype):
            flat_ND = self._sheets[sheet] = x_BVQQD.new_zeros(self.size + 2 * margin, width)
        self._runs(flat_ND[margin : margin + self.size]).index_copy_(0, self.places, x_BVQQD.reshape(len(self.places), -1))
        return flat_ND

    def collect(self, map_BDHP: Tensor, shape: torch.Size) -> Tensor:
        """The visible cells of maps: (B, V, Q, Q, D)."""
        flat_ND = map_BDHP.permute(0, 2, 3, 1).reshape(self.size, -1)
        return self._runs(flat_ND).index_select(0, self.places).view(shape)

    def _runs(self, flat_ND: Tensor) -> Tensor:
        """Maps without margins as runs of Q cells, the first of which is the first patch's: (runs, Q D)."""
        width = flat_ND.shape[1]
        return flat_ND.flatten()[self.left * width :][: (self.size - self.cells) * width].view(-1, self.cells * width)


class PackedDepthwise(torch.autograd.Function):
    """Convolution with zeros at hidden cells and outside: packed (B, V, Q, Q, D) -> the same, stride 1, odd kernel."""

    @staticmethod
    def forward(ctx: Any, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None, canvas: Canvas) -> Tensor:
        ctx.save_for_backward(x_BVQQD, weight_D1KK)  # not the map: it is laid out again, and takes 2.5 times as much
        ctx.canvas, ctx.has_bias = canvas, bias_D is not None
        return canvas.convolve(x_BVQQD, weight_D1KK, bias_D)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_BVQQD, weight_D1KK = ctx.saved_tensors
        canvas: Canvas = ctx.canvas
        grad_ND = canvas.spread(grads[0], "gradient")
        d_x_BVQQD = d_weight_D1KK = None
        if ctx.needs_input_grad[0]:
            # Cells where there is output are cells where there is input: the gradient is a convolution of the same kind.
            d_x_BVQQD = canvas.convolve(grads[0], weight_D1KK.flip(2, 3), None, grad_ND)
        if ctx.needs_input_grad[1]:
            grad_BDHP = _read(grad_ND, canvas.shape, canvas.kernel)
            d_weight_D1KK = weight_gradient(canvas.spread(x_BVQQD, "features"), grad_BDHP, canvas.kernel)
        d_bias_D = grads[0].sum((0, 1, 2, 3)) if ctx.has_bias else None
        return d_x_BVQQD, d_weight_D1KK, d_bias_D, None


class DenseDepthwise(torch.autograd.Function):
    """The same of whole maps: (B, H, W, D) -> the same."""

    @staticmethod
    def forward(ctx: Any, x_BHWD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BHWD, weight_D1KK)
        ctx.has_bias = bias_D is not None
        return _convolve(x_BHWD.permute(0, 3, 1, 2), weight_D1KK, bias_D).permute(0, 2, 3, 1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x_BHWD, weight_D1KK = ctx.saved_tensors
        side = weight_D1KK.shape[-1]
        d_x_BDHW = _convolve(grads[0].permute(0, 3, 1, 2), weight_D1KK.flip(2, 3), None)
        left = max(side // 2 - 1, 1)
        x_BHPD, grad_BHPD = (functional.pad(part, (0, 0, left, 1)) for part in (x_BHWD, grads[0]))
        flat_ND = functional.pad(x_BHPD.flatten(0, 2), (0, 0, side // 2, side // 2))
        d_weight_D1KK = weight_gradient(flat_ND, grad_BHPD.permute(0, 3, 1, 2), side)
        return d_x_BDHW.permute(0, 2, 3, 1), d_weight_D1KK, grads[0].sum((0, 1, 2)) if ctx.has_bias else None


def _convolve(map_BDHP: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
    """As wide as before, with whatever comes out in the gaps between rows."""
    return functional.conv2d(map_BDHP, weight_D1KK, bias_D, padding=weight_D1KK.shape[-1] // 2, groups=len(weight_D1KK))


def _read(flat_ND: Tensor, shape: Sequence[int], kernel: int, shift: int = 0) -> Tensor:
    """Maps of `shape` (B, H, pitch), with K // 2 cells before them in memory, from `shift` cells on: (B, D, H, pitch)."""
    first = kernel // 2 + shift
    return flat_ND[first : first + math.prod(shape)].view(*shape, -1).permute(0, 3, 1, 2)


def weight_gradient(flat_ND: Tensor, grad_BDHP: Tensor, side: int) -> Tensor:
    """Gradient of the kernel, (D, 1, K, K), from the gradient of the output, zero in the gaps between rows, and the maps,
    with K // 2 cells of zeros before and behind them: (cells, D)."""
    batch, channels, rows, pitch = grad_BDHP.shape
    parts = []
    for first, columns in column_groups(side):
        centre = first + columns // 2 - side // 2
        part = conv2d_weight(
            _read(flat_ND, (batch, rows, pitch), side, centre), (channels, 1, side, columns), grad_BDHP,
            padding=(side // 2, columns // 2), groups=channels,  # pyright: ignore[reportArgumentType]  (its hint is too narrow)
        )  # fmt: skip
        parts.append(part)
    # With the strides of the weight, or DistributedDataParallel would copy it.
    return torch.cat(parts, 3).flatten().view(channels, 1, side, side)


def column_groups(side: int) -> Iterator[tuple[int, int]]:
    """First column and number of columns, 3 or 1, that together make the columns of a kernel."""
    first = 0
    while first < side:
        columns = FAST_COLUMNS if side - first >= FAST_COLUMNS else 1
        yield first, columns
        first += columns


def as_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast makes of the inputs of a convolution; gradients come back in the types they had."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [t if t is None else t.to(torch.get_autocast_dtype(device)) for t in tensors]
