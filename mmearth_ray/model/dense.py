"""The encoder for downstream use: whole images in; maps, pooled features or class scores out, by timm's conventions.

Source of the conventions: timm's ConvNeXt (github.com/huggingface/pytorch-image-models, timm/models/convnext.py).

Shapes: B images, C bands, H x W pixels, D channels of the last stage, K classes, P pixels along the side of a patch.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from mmearth_ray.modalities import DEFAULT_INPUT, get
from mmearth_ray.model.encoder import SIZES, Stem, check_patch_size
from mmearth_ray.model.features import FeatureEncoder, MapEncoder, pick_stages
from mmearth_ray.model.layers import LayerNorm
from mmearth_ray.model.normalise import Inputs

POOLS = ("avg", "")
PRETRAINING_GRID = 7  # patches along the side of an image in the published recipes: 56 px / 8, 112 px / 16


class Head(nn.Module):
    """Mean over the map, LayerNorm, linear: (B, D, H / P, W / P) -> (B, K).

    Without classes the bare mean comes out: pretraining has no norm after the last stage, so there is none to apply.
    With the pool "" and no classes the map comes out as it is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.global_pool = "avg"
        self.norm: nn.Module = nn.Identity()
        self.fc: nn.Module = nn.Identity()

    def reset(self, num_classes: int, global_pool: str | None) -> None:
        """New classifier weights; the norm stays if there is one.  Raises ValueError for a pool there is not."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLS or (pool == "" and num_classes > 0):
            raise ValueError(
                f"the pool must be 'avg', or '' where there are no classes; got '{pool}' and {num_classes} classes"
            )
        self.global_pool = pool
        if num_classes == 0:
            self.norm, self.fc = nn.Identity(), nn.Identity()
            return
        if isinstance(self.norm, nn.Identity):
            self.norm = LayerNorm(self.width)
        self.fc = nn.Linear(self.width, num_classes)
        start(self.fc)

    def forward(self, x_BDHW: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x_BDHW.mean((2, 3)) if self.global_pool else x_BDHW)
        return x if pre_logits else self.fc(x)


class DenseEncoder(MapEncoder):
    """Features of the last stage, pooled, with a classifier if there are classes.

    Without classes its parameters are exactly those of `Encoder`, by the same names; with classes there are also
    `head.norm` and `head.fc`.
    """

    def __init__(
        self,
        in_channels: int,
        depths: tuple[int, ...],
        dims: tuple[int, ...],
        patch_size: int = 8,
        stem: Stem = "modified",
        inputs: Inputs | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__(in_channels, depths, dims, patch_size, stem, inputs)
        self.image_size = PRETRAINING_GRID * patch_size
        self.num_features = self.head_hidden_size = self.width
        self.head = Head(self.width)
        self.reset_classifier(num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, C, H, W), sides multiples of P -> class scores (B, K), or (B, D) without classes."""
        return self.forward_head(self.forward_features(image_BCHW))

    def forward_features(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H / P, W / P)."""
        return self.maps(image_BCHW)[-1]

    def forward_head(self, x_BDHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Of `forward_features`: class scores (B, K), or what the classifier would see (B, D)."""
        return self.head(x_BDHW, pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages `indices` (see `pick_stages`), after the final map unless `intermediates_only`.

        With `stop_early` nothing is computed after the last stage asked for, whose map is then the final one.  `norm` changes
        nothing: there is none.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW'; got '{output_fmt}'")
        places = pick_stages(indices, len(self.stages))
        maps = self.maps(x, last=places[-1] if stop_early or intermediates_only else -1)
        found = [maps[i] for i in places]
        return found if intermediates_only else (maps[-1], found)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of so many classes, or none for 0; `global_pool` is "avg", or "" for maps without classes."""
        self.head.reset(num_classes, global_pool)
        self.head.to(next(self.stages.parameters()))
        self.num_classes = num_classes

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's tools ask of a model, and its bands.  `input_size` is that of pretraining; others work as well."""
        return {
            "architecture": "convnextv2",
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, self.image_size, self.image_size),
            "fixed_input_size": False,
            "pool_size": (self.image_size // self.patch_size,) * 2,
            "bands": self.bands,
            "patch_size": self.patch_size,
            "first_conv": "initial_conv.0" if hasattr(self, "initial_conv") else "stem_orig.0",
            "classifier": "head.fc",
        }

    default_cfg = pretrained_cfg  # its older name in timm


@overload
def create_encoder(
    size: str,
    *,
    bands: Sequence[str] | None = ...,
    in_channels: int | None = ...,
    patch_size: int = ...,
    stem: Stem = ...,
    num_classes: int = ...,
    features_only: Literal[False] = ...,
) -> DenseEncoder: ...
@overload
def create_encoder(
    size: str,
    *,
    bands: Sequence[str] | None = ...,
    in_channels: int | None = ...,
    patch_size: int = ...,
    stem: Stem = ...,
    features_only: Literal[True],
    out_indices: int | Sequence[int] | None = ...,
) -> FeatureEncoder: ...
def create_encoder(
    size: str,
    *,
    bands: Sequence[str] | None = None,
    in_channels: int | None = None,
    patch_size: int = 8,
    stem: Stem = "modified",
    num_classes: int = 0,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
) -> DenseEncoder | FeatureEncoder:
    """An encoder of a published size with fresh weights, for whole images.

    `bands` names bands of the input modality (by default those it is pretrained on); `in_channels` is for any other image.
    With `features_only` a list of maps comes out, of the stages `out_indices`; otherwise pooled features or class scores.
    Raises ValueError for arguments that do not go together.
    """
    if size not in SIZES:
        raise ValueError(f"there is no encoder size '{size}'; use one of {', '.join(SIZES)}")
    check_patch_size(patch_size)
    if bands is not None and in_channels is not None:
        raise ValueError(f"give bands or in_channels, not both; got {list(bands)} and {in_channels}")
    inputs = None
    if in_channels is None:
        entry = get(DEFAULT_INPUT)
        entry = entry.default_bands() if bands is None else entry.select(bands)
        inputs, in_channels = Inputs(entry.bands, entry.missing), len(entry.bands)
    model = build_dense(
        in_channels, *SIZES[size], patch_size, stem, inputs,
        num_classes=num_classes, features_only=features_only, out_indices=out_indices,
    )  # fmt: skip
    start(model)
    return model


def build_dense(
    in_channels: int,
    depths: tuple[int, ...],
    dims: tuple[int, ...],
    patch_size: int,
    stem: Stem,
    inputs: Inputs | None,
    *,
    num_classes: int,
    features_only: bool,
    out_indices: int | Sequence[int] | None,
) -> DenseEncoder | FeatureEncoder:
    """Whichever of the two was asked for.  Raises ValueError for classes of maps, or stages of pooled features."""
    if features_only and num_classes:
        raise ValueError(f"features_only gives maps, which have no classes; got num_classes={num_classes}")
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices chooses maps: add features_only=True; got out_indices={out_indices}")
    if features_only:
        return FeatureEncoder(in_channels, depths, dims, patch_size, stem, inputs, out_indices)
    return DenseEncoder(in_channels, depths, dims, patch_size, stem, inputs, num_classes)


@torch.no_grad()
def start(module: nn.Module) -> None:
    """Fresh weights as in pretraining and in timm: normal, std 0.02, cut at -2 and 2; biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
