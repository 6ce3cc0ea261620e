"""An exported encoder as a TerraTorch backbone.  Importing this module registers "mmearth_ray_encoder".

TerraTorch pads images to an even number of patches before the backbone (`backbone_padding`) and crops what comes out.  Its data
modules normalise, with means and stds as in the exported model card; they know no missing values.  With `normalise` the
backbone does it as in pretraining instead: then give the data module means of 0 and stds of 1.
"""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmearth_ray.adapters.bands import keep_bands, require
from mmearth_ray.checkpoints.load import load_encoder
from mmearth_ray.model.features import MapEncoder

_registry = require("terratorch.registry", "terratorch")


class Backbone(nn.Module):
    """An encoder under TerraTorch's contract: a list of maps comes out, `out_channels` gives their widths.

    `bands` names the channels of the input; `patch_size` is what TerraTorch pads to.
    """

    def __init__(self, encoder: MapEncoder, product: str | None = None) -> None:
        super().__init__()
        self.normalise = nn.Identity() if product is None else encoder.normalise(product)
        self.encoder = encoder
        self.bands, self.patch_size = encoder.bands, encoder.patch_size
        self.out_channels: list[int] = encoder.feature_info.channels()

    def forward(self, x: Tensor, **_: Any) -> list[Tensor]:
        """(B, C, H, W) -> a map (B, out_channels[i], H / s_i, W / s_i) per stage; metadata from TerraTorch is not used."""
        return self.encoder(self.normalise(x))


@_registry.TERRATORCH_BACKBONE_REGISTRY.register
def mmearth_ray_encoder(
    checkpoint: str | Path,
    bands: Sequence[str | Enum] | None = None,
    out_indices: Sequence[int] | None = None,
    normalise: str | None = None,
    padding: str = "reflect",
) -> Backbone:
    """The encoder exported to `checkpoint` (that folder, or its run), with its weights.

    `bands`: the data's bands in the data's order; some or all of the encoder's own (`keep_bands`), by default exactly those.
    `out_indices`: the stages whose maps come out, by default all four.  `normalise`: the product whose statistics turn raw
    values into the encoder's input; without it they must come normalised.  `padding`: TerraTorch's factory reads it, not we.
    """
    del padding
    encoder = load_encoder(checkpoint, features_only=True, out_indices=out_indices)
    return Backbone(keep_bands(encoder, bands), normalise)
