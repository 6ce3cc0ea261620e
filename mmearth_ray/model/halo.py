"""Visible patches with the cells around them, side by side: what a convolution reads whose results only they want.

A map of all patches is 2.5 times as much work as that of the 40 % that are visible.  Patches of 8 x 8 and 4 x 4 cells with
three cells around them are less; smaller ones are mostly surroundings, and a whole map is cheaper.

Shapes: B images, R x S patches in the grid of an image, V of them visible, Q cells along the side of a patch, K side of the
kernel, E = Q + K - 1 cells along the side of a patch with what surrounds it, D channels.
"""

import torch
from torch import Tensor
from torch.nn import functional

LEAST_CELLS = 4  # measured on two cores: 0.5 of the time of whole maps at Q = 8, 0.76 at 4, 1.5 at 2


class Halos:
    """Maps with a zero margin around every image, from which patches are read with their surroundings, over and over."""

    def __init__(self, visible_BV: Tensor, grid: tuple[int, int], cells: int, kernel: int) -> None:
        (rows, columns), halo, device = grid, kernel // 2, visible_BV.device
        self.cells, self.side = cells, cells + 2 * halo
        # Patches' widths from one row of a map to the next: the margin behind a row is that before the next one.
        runs = columns + -(-halo // cells)
        pitch, lines = runs * cells, rows * cells + halo
        self.first = halo * pitch + halo  # the first cell of the first image
        self.size = self.first + (len(visible_BV) * lines + halo) * pitch + halo
        line_BV = torch.arange(len(visible_BV), device=device)[:, None] * lines + visible_BV // columns * cells
        column_BV = visible_BV % columns
        steps_Q, steps_E = (torch.arange(n, device=device) for n in (cells, self.side))
        self.places = ((line_BV * runs + column_BV)[..., None] + steps_Q * runs).flatten()
        self.starts = ((line_BV * pitch + column_BV * cells)[..., None] + steps_E * pitch).flatten()
        self._maps: Tensor | None = None

    def convolve(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
        """The depthwise convolution with zeros at hidden cells and outside: (B, V, Q, Q, D) -> the same."""
        windows_NDEE = self._windows(x_BVQQD).permute(0, 3, 1, 2)
        out_NDQQ = functional.conv2d(windows_NDEE, weight_D1KK, bias_D, groups=len(weight_D1KK))
        return out_NDQQ.permute(0, 2, 3, 1).reshape(x_BVQQD.shape)

    def _windows(self, x_BVQQD: Tensor) -> Tensor:
        """Every visible patch with its surroundings: (B V, E, E, D)."""
        width = x_BVQQD.shape[-1]
        if self._maps is None or (self._maps.shape[1], self._maps.dtype) != (width, x_BVQQD.dtype):
            self._maps = x_BVQQD.new_zeros(self.size, width)
        patches = (self.size - self.first) // self.cells
        runs = self._maps.flatten()[self.first * width :][: patches * self.cells * width].view(patches, -1)
        runs.index_copy_(0, self.places, x_BVQQD.reshape(len(self.places), -1))
        rows = self._maps.as_strided((self.size - self.side + 1, self.side * width), (width, 1))  # from every cell on
        return rows.index_select(0, self.starts).view(-1, self.side, self.side, width)
