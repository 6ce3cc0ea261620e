"""The decoder: from features of visible patches to a prediction of every modality at hidden patches.

As in the published code one block is shared by all modalities, so it runs once; heads follow from the table's rows.

Shapes: B images, V visible and N asked-for patches, L = R S patches in the grid, P pixels along the side of a patch,
D channels of the encoder, E of the decoder, C outputs of a head (bands or classes).
"""

import torch
from torch import Tensor, nn

from mmearth_ray.modalities import Level, Modality
from mmearth_ray.model.layers import EPS, Block, DenseLayout, LayerNorm


class Decoder(nn.Module):
    """Project, put the mask token at hidden places, run the shared blocks on the grid of patches, apply the heads.

    A map's head gives P P C numbers per patch, channel ((row * P) + column) * C + c, and is applied where asked only.
    Heads of image-level modalities share one LayerNorm over channels, applied at every place before the mean over places;
    mask tokens count as well.  Both as published.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        targets: tuple[Modality, ...],
        width: int = 512,
        depth: int = 1,
        grn_eps: float = EPS,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.maps = tuple(m for m in targets if m.level is Level.PIXEL)
        scalars = [m for m in targets if m.level is Level.IMAGE]
        self.projection = nn.Linear(in_channels, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, grn_eps) for _ in range(depth))
        self.pixel_heads = nn.ModuleDict({m.name: nn.Linear(width, patch_size**2 * m.width) for m in self.maps})
        self.image_norm = LayerNorm(width) if scalars else None
        self.image_heads = nn.ModuleDict({m.name: nn.Linear(width, m.width) for m in scalars})

    def forward(self, features_BVD: Tensor, visible_BV: Tensor, asked_BN: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Predictions by modality: maps (B, N, P P, C) at the patches `asked_BN`, image-level values (B, C)."""
        x_BLE = self._place(self.projection(features_BVD), visible_BV, grid)
        x_B1RSE = x_BLE.unflatten(1, (1, *grid))
        for block in self.blocks:
            x_B1RSE = block(x_B1RSE, DenseLayout())
        x_BLE = x_B1RSE.flatten(1, 3)
        return self._maps(x_BLE, asked_BN) | self._scalars(x_BLE)

    def resized(self, patch_size: int) -> "Decoder":
        """The decoder for patches of another size: heads of maps of its own, all else and its weights shared with this one."""
        other = Decoder(self.projection.in_features, patch_size, self.maps, self.projection.out_features, depth=0)
        other.projection, other.mask_token, other.blocks = self.projection, self.mask_token, self.blocks
        other.image_norm, other.image_heads = self.image_norm, self.image_heads
        return other

    def _place(self, x_BVE: Tensor, visible_BV: Tensor, grid: tuple[int, int]) -> Tensor:
        """Visible tokens at their places, the mask token everywhere else: (B, L, E)."""
        batch, _, width = x_BVE.shape
        empty_BLE = self.mask_token.to(x_BVE.dtype).expand(batch, grid[0] * grid[1], width)
        return empty_BLE.scatter(1, visible_BV[..., None].expand_as(x_BVE), x_BVE)

    def _maps(self, x_BLE: Tensor, asked_BN: Tensor) -> dict[str, Tensor]:
        x_BNE = x_BLE.gather(1, asked_BN[..., None].expand(-1, -1, x_BLE.shape[-1]))
        return {name: head(x_BNE).unflatten(2, (self.patch_size**2, -1)) for name, head in self.pixel_heads.items()}

    def _scalars(self, x_BLE: Tensor) -> dict[str, Tensor]:
        if self.image_norm is None:
            return {}
        pooled_BE = self.image_norm(x_BLE).mean(1)
        return {name: head(pooled_BE) for name, head in self.image_heads.items()}
