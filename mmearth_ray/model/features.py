"""Maps of features of whole images, stage by stage: what segmentation and detection heads take.

Shapes: B images, C bands, H x W pixels, D_i channels of stage i, whose cells are patch / 8 * 2^i pixels wide.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmearth_ray.model.encoder import Encoder, Stem
from mmearth_ray.model.layers import CELLS
from mmearth_ray.model.normalise import Inputs, Normalise


class FeatureInfo(list[dict[str, Any]]):
    """A dict per stage with num_chs, reduction (pixels of a cell), module and index, and accessors, as timm's FeatureInfo.

    Indexing reaches all stages; the accessors answer for those in `out_indices`, unless asked for a stage by its index.
    """

    def __init__(self, dims: Sequence[int], patch_size: int, out_indices: Sequence[int]) -> None:
        stride = patch_size // CELLS
        super().__init__(
            {"num_chs": width, "reduction": stride * 2**i, "module": f"stages.{i}", "index": i} for i, width in enumerate(dims)
        )
        self.out_indices = tuple(out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)

    def get_dicts(self) -> list[dict[str, Any]]:
        return [self[i] for i in self.out_indices]


def pick_stages(indices: int | Sequence[int] | None, stages: int) -> tuple[int, ...]:
    """Ascending indices of stages: all for None, the last n for an int; negative ones count from the end.

    Raises ValueError for a stage that there is not, or none at all.
    """
    if indices is None:
        indices = stages
    wanted = range(stages - indices, stages) if isinstance(indices, int) else indices
    places = {i + stages if i < 0 and not isinstance(indices, int) else i for i in wanted}
    if not places or not places <= set(range(stages)):
        raise ValueError(f"there are stages 0 to {stages - 1}, or the last 1 to {stages}; got {indices}")
    return tuple(sorted(places))


class MapEncoder(Encoder):
    """The encoder on whole images of any size that is a multiple of the patch, its features as maps (B, D_i, H_i, W_i).

    Parameters and their names are those of `Encoder`.  GRN is per image, so an image's features never depend on its batch.
    `inputs` says what the channels are, where that is known.
    """

    def __init__(
        self,
        in_channels: int,
        depths: tuple[int, ...],
        dims: tuple[int, ...],
        patch_size: int = 8,
        stem: Stem = "modified",
        inputs: Inputs | None = None,
    ) -> None:
        if inputs is not None and len(inputs.bands) != in_channels:
            raise ValueError(f"{in_channels} channels cannot be the bands {', '.join(inputs.bands)}")
        super().__init__(in_channels, depths, dims, patch_size, stem)
        self.in_chans = in_channels
        self.inputs = inputs
        self.description: Any = None  # of pretraining, where the weights come from some: `checkpoints.load` sets it
        self.feature_info = FeatureInfo(dims, patch_size, range(len(dims)))

    def maps(self, image_BCHW: Tensor, last: int = -1) -> list[Tensor]:
        """Features after each stage up to `last`: (B, D_i, H_i, W_i), channels last in memory.

        Raises ValueError if the image has other channels than the encoder takes.
        """
        if image_BCHW.shape[1] != self.in_chans:
            named = f": {', '.join(self.bands)}" if self.bands else ""
            raise ValueError(f"an image of {image_BCHW.shape[1]} channels, the encoder takes {self.in_chans}{named}")
        return [x_B1HWD.squeeze(1).permute(0, 3, 1, 2) for x_B1HWD in self.stages_of(image_BCHW, last=last)]

    @property
    def bands(self) -> tuple[str, ...] | None:
        """Names of the channels of an image, in their order, where they are known."""
        return self.inputs.bands if self.inputs else None

    def normalise(self, product: str | None = None) -> Normalise:
        """A module that turns raw values of a product into what the encoder was pretrained on; see `Inputs.normalise`."""
        return (self.inputs or Inputs(())).normalise(product)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from the input to the output, as timm's layer-wise learning rates take them.

        A group per block, or with `coarse` per stage; a stage's downsampling goes with its first block.
        """
        halvings = [(rf"^downsample_layers\.{i}\.", (i + 1,) if coarse else (i + 1, 0)) for i in range(len(self.stages) - 1)]
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^(?:initial_conv|stem|stem_orig)\.", "blocks": [*halvings, (blocks, None)]}


class FeatureEncoder(MapEncoder):
    """A list of maps of the stages `out_indices` (all four by default), as timm's features_only.

    Stages after the last one asked for are not built, so their weights have no place here.
    """

    def __init__(
        self,
        in_channels: int,
        depths: tuple[int, ...],
        dims: tuple[int, ...],
        patch_size: int = 8,
        stem: Stem = "modified",
        inputs: Inputs | None = None,
        out_indices: int | Sequence[int] | None = None,
    ) -> None:
        places = pick_stages(out_indices, len(dims))
        built = places[-1] + 1
        super().__init__(in_channels, depths[:built], dims[:built], patch_size, stem, inputs)
        self.feature_info.out_indices = places

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        maps = self.maps(image_BCHW)
        return [maps[i] for i in self.feature_info.out_indices]
