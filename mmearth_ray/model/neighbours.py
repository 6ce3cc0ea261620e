"""Where the patches around a visible patch are packed: an index, so that no map needs to be filled to find a neighbour.

Shapes: B images, V visible patches of an image, R x S patches in the grid of an image, M patches of margin around it.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Neighbours(NamedTuple):
    """An index of packed patches by their places, small (a few hundred int32 per image) and the same for all stages."""

    slots_BRS: Tensor
    """int32 (B, R + 2 M, S + 2 M): which of the B V packed patches lies there, -1 where a patch is hidden or outside."""

    places_BV: Tensor
    """int32 (B, V): where each packed patch lies in the flattened `slots_BRS`; its neighbour below is S + 2 M further."""


def find_neighbours(visible_BV: Tensor, grid: tuple[int, int], margin: int) -> Neighbours:
    """The index of the visible patches (row-major indices in a grid of R x S), with a margin of that many patches."""
    (batch, shown), (rows, columns) = visible_BV.shape, (grid[0] + 2 * margin, grid[1] + 2 * margin)
    inner_BV = (visible_BV // grid[1] + margin) * columns + visible_BV % grid[1] + margin
    packed_BV = torch.arange(batch * shown, dtype=torch.int32, device=visible_BV.device).view(batch, shown)
    slots_BL = packed_BV.new_full((batch, rows * columns), -1).scatter_(1, inner_BV, packed_BV)
    first_B1 = torch.arange(batch, device=visible_BV.device)[:, None] * rows * columns
    return Neighbours(slots_BL.view(batch, rows, columns), (first_B1 + inner_BV).int())
