"""The encoder: ConvNeXt V2, on the visible patches of masked images or on whole images, with the same code and weights.

Published names and layouts of parameters are kept (initial_conv, stem, downsample_layers, stages; kernels as (O, D, k, k)),
so a state dict of this encoder is an ordinary dense ConvNeXt V2.

Shapes: B images, C bands, H x W pixels, V visible patches, Q cells along the side of a block (see layers), D channels.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from mmearth_ray.model.layers import (
    CELLS,
    SCOPES,
    Block,
    BlockConv,
    DenseLayout,
    ImageConv,
    LayerNorm,
    Layout,
    PackedLayout,
    Scope,
)
from mmearth_ray.model.minkowski import MinkowskiLayout, require_minkowski
from mmearth_ray.model.triton_layout import TritonLayout, require_triton

Stem = Literal["modified", "original"]

Backend = Literal["packed", "minkowski", "triton"]

STEMS: tuple[Stem, ...] = ("modified", "original")
BACKENDS: tuple[Backend, ...] = ("packed", "minkowski", "triton")
PATCH_SIZES = (8, 16, 32)


class Size(NamedTuple):
    """Blocks and channels of the four stages."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]


# ConvNeXt V2, arXiv:2301.00808, table 8 in its appendix, and its code (facebookresearch/ConvNeXt-V2, convnextv2.py).
SIZES: dict[str, Size] = {
    "atto": Size((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": Size((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": Size((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": Size((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": Size((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": Size((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": Size((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": Size((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


class Encoder(nn.Module):
    """ConvNeXt V2 for patches of 8, 16 or 32 pixels; `dims[-1]` channels per patch come out.

    The modified stem of MP-MAE (arXiv:2405.02771) is a 3x3 convolution, LayerNorm, GELU, then a depthwise convolution with
    kernel = stride = patch / 8 and LayerNorm; the original one a single convolution with that stride and LayerNorm.
    There is no norm at the end.
    """

    def __init__(
        self,
        in_channels: int,
        depths: tuple[int, ...],
        dims: tuple[int, ...],
        patch_size: int,
        stem: Stem = "modified",
        grn: Scope = "image",
        backend: Backend = "packed",
    ) -> None:
        super().__init__()
        check_patch_size(patch_size)
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}; got '{stem}'")
        if grn not in SCOPES:
            raise ValueError(f"grn must be one of {', '.join(SCOPES)}; got '{grn}'")
        self.sparse_layout = sparse_layout(backend)
        self.patch_size = patch_size
        self.in_channels, self.dims, self.width = in_channels, dims, dims[-1]
        stride = patch_size // CELLS
        if stem == "modified":
            self.initial_conv = nn.ModuleList([ImageConv(in_channels, dims[0]), LayerNorm(dims[0])])
            self.stem = nn.ModuleList([BlockConv(dims[0], dims[0], stride, groups=dims[0]), LayerNorm(dims[0])])
        else:
            self.stem_orig = nn.ModuleList([BlockConv(in_channels, dims[0], stride), LayerNorm(dims[0])])
        self._embed = self._modified_stem if stem == "modified" else self._original_stem
        self.downsample_layers = nn.ModuleList(
            nn.ModuleList([LayerNorm(narrow), BlockConv(narrow, wide, 2)]) for narrow, wide in pairwise(dims)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(width, grn_scope=grn) for _ in range(depth)) for depth, width in zip(depths, dims, strict=True)
        )

    def forward(self, image_BCHW: Tensor, visible_BV: Tensor | None = None) -> Tensor:
        """Features of the last stage.

        With `visible_BV` (int64, ascending row-major indices of patches) only those patches exist: (B, V, 1, 1, D).
        Without it, the whole image is one block: (B, 1, H / patch, W / patch, D).
        """
        return self.stages_of(image_BCHW, visible_BV)[-1]

    def stages_of(self, image_BCHW: Tensor, visible_BV: Tensor | None = None, last: int = -1) -> list[Tensor]:
        """Features after each stage up to `last`, whose cells are patch / 8 * 2^i px wide: (B, V, 8 / 2^i, 8 / 2^i, D_i), or
        dense maps."""
        layout = self._layout(image_BCHW, visible_BV)
        x_BVQQD, found = self._embed(image_BCHW, layout), []
        for number in range(len(self.stages))[: last + 1 or None]:
            if number > 0:
                norm, halve = self.downsample_layers[number - 1]  # type: ignore[misc]
                x_BVQQD = halve(norm(x_BVQQD), layout)
            for block in self.stages[number]:  # type: ignore[attr-defined]
                x_BVQQD = block(x_BVQQD, layout)
            found.append(x_BVQQD)
        return found

    @property
    def sized(self) -> nn.Module:
        """The layers that only fit patches of this size: the stem's convolution, whose kernel is its stride, and its norm."""
        return self.stem if hasattr(self, "stem") else self.stem_orig

    def resized(self, patch_size: int) -> "Encoder":
        """The encoder for patches of another size: a stem of its own, all other layers and their weights shared with this one.

        The norm after the stem's convolution is not shared, as it scales what just that convolution gives.  The 3x3 convolution
        before it is: it sees pixels of the same ground size.
        """
        stem: Stem = "modified" if hasattr(self, "stem") else "original"
        other = Encoder(self.in_channels, (0,) * len(self.dims), self.dims, patch_size, stem)
        other.sparse_layout, other.downsample_layers, other.stages = self.sparse_layout, self.downsample_layers, self.stages
        if stem == "modified":
            other.initial_conv = self.initial_conv
        return other

    def _layout(self, image_BCHW: Tensor, visible_BV: Tensor | None) -> Layout:
        height, width = image_BCHW.shape[2:]
        check_image_size((height, width), self.patch_size)
        if visible_BV is None:
            return DenseLayout()
        return self.sparse_layout(visible_BV, (height // self.patch_size, width // self.patch_size))

    def _modified_stem(self, image_BCHW: Tensor, layout: Layout) -> Tensor:
        (convolution, first_norm), (depthwise, norm) = self.initial_conv, self.stem
        x_BVPPD = functional.gelu(first_norm(convolution(image_BCHW, layout)))
        return norm(depthwise(x_BVPPD, layout))

    def _original_stem(self, image_BCHW: Tensor, layout: Layout) -> Tensor:
        convolution, norm = self.stem_orig
        return norm(convolution(layout.pixels(image_BCHW), layout))


def sparse_layout(backend: Backend) -> Callable[[Tensor, tuple[int, int]], Layout]:
    """What convolves visible patches.  Raises ValueError for an unknown backend, UsageError for one that is not installed."""
    if backend == "packed":
        return PackedLayout
    if backend == "minkowski":
        require_minkowski()
        return MinkowskiLayout
    if backend == "triton":
        require_triton()
        return TritonLayout
    raise ValueError(f"there is no backend '{backend}'; use one of {', '.join(BACKENDS)}")


def build_encoder(
    size: str, in_channels: int, patch_size: int, stem: Stem = "modified", grn: Scope = "image", backend: Backend = "packed"
) -> Encoder:
    """The encoder of a published size (`SIZES`).  Raises ValueError for an unknown size, patch, stem, scope or backend."""
    if size not in SIZES:
        raise ValueError(f"there is no encoder size '{size}'; use one of {', '.join(SIZES)}")
    return Encoder(in_channels, *SIZES[size], patch_size=patch_size, stem=stem, grn=grn, backend=backend)


def check_patch_size(patch_size: int) -> None:
    """Raise ValueError unless three halvings of 8 cells fit: the patch must be 8, 16 or 32 pixels."""
    if patch_size not in PATCH_SIZES:
        raise ValueError(f"a patch must be {', '.join(map(str, PATCH_SIZES))} pixels wide; got {patch_size}")


def check_image_size(sides: tuple[int, ...], patch_size: int) -> None:
    """Raise ValueError unless every side of the image is a whole number of patches."""
    for side in sides:
        if side < patch_size or side % patch_size:
            below = side // patch_size * patch_size
            remedy = f"crop to {below} or pad to {below + patch_size}" if below else f"pad to {patch_size}"
            raise ValueError(f"image sides must be multiples of the patch size {patch_size}; got {side}: {remedy}")
