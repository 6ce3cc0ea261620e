"""MP-MAE (arXiv:2405.02771): see a few patches of an image, predict all modalities where it is hidden.

Shapes: B images, C bands, H x W pixels, V visible and N hidden patches, P pixels along the side of a patch.
"""

import re
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from mmearth_ray.modalities import Modality
from mmearth_ray.model.decoder import Decoder
from mmearth_ray.model.encoder import Backend, Encoder, Stem, build_encoder, check_image_size
from mmearth_ray.model.layers import Scope

# Weights that the published code leaves at its library's default of 1.0: those of the sparse depthwise convolutions and
# matrices, and of all its dense convolutions, to which the projection and the heads of maps belong there
# (github.com/vishalned/MMEarth-train, models/fcmae.py, FCMAE._init_weights).
PUBLISHED_WIDE = (
    "encoder.stem.0.weight",
    "encoder.stages.*.dwconv.weight",
    "encoder.stages.*.pwconv[12].weight",
    "decoder.projection.weight",
    "decoder.blocks.*.dwconv.weight",
    "decoder.pixel_heads.*.weight",
)
WIDE: dict[str, tuple[str, ...]] = {"uniform": (), "published": PUBLISHED_WIDE}


# A cell without data is zero.  Were this bias zero as well, every norm after it would see a vector of zeros and multiply
# gradients by 1 / sqrt(eps) = 1000, and the first step would fill AdamW's second moments with that.
FIRST_BIAS = ("encoder.initial_conv.0.bias", "encoder.stem_orig.0.bias")

OF_A_SIZE = re.compile(r"^sizes\.\d+\.")  # how the names of parameters of further patch sizes begin

DECODER_GRN_EPS = 1e-4  # published: the dense decoder's GRN has another eps than the sparse encoder's 1e-6


class MPMAE(nn.Module):
    """The encoder and the decoder, one after the other.

    It can be trained with images of several sizes, in as many patches each: `others` are further patch sizes.  `sizes` holds
    a model for each, which shares all layers and weights with this one but the stem and the heads of maps.  What is shared
    keeps the name that it has without them; the others' own parameters are `sizes.PATCH.encoder...`, `sizes.PATCH.decoder...`.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, others: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.sizes = nn.ModuleDict({str(p): MPMAE(encoder.resized(p), decoder.resized(p)) for p in others})

    def forward(self, image_BCHW: Tensor, visible_BV: Tensor, hidden_BN: Tensor) -> dict[str, Tensor]:
        """Predictions by modality: maps (B, N, P P, outputs) at the patches `hidden_BN`, image level (B, outputs).

        Patches are row-major int64 indices; any may be asked for in place of the hidden ones, visible ones as well.
        """
        features_BVD = self.encoder(image_BCHW, visible_BV).flatten(1, 3)
        return self.decoder(features_BVD, visible_BV, hidden_BN, self.grid(image_BCHW))

    def at(self, patch_size: int) -> "MPMAE":
        """The model for images in patches of that size, one of its own or of `others`."""
        return self if patch_size == self.encoder.patch_size else cast(MPMAE, self.sizes[str(patch_size)])

    def idle(self, patch_size: int) -> list[nn.Parameter]:
        """The parameters that images in patches of that size do not pass: stems and heads of the other sizes."""
        others = [m for m in (self, *(self.at(int(p)) for p in self.sizes)) if m.encoder.patch_size != patch_size]
        return [p for m in others for part in (m.encoder.sized, m.decoder.pixel_heads) for p in part.parameters()]

    def grid(self, image_BCHW: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        height, width = image_BCHW.shape[2:]
        return height // self.encoder.patch_size, width // self.encoder.patch_size


def build_mpmae(
    *,
    size: str,
    in_channels: int,
    image_size: int,
    patch_size: int,
    targets: tuple[Modality, ...],
    stem: Stem = "modified",
    grn: Scope = "image",
    backend: Backend = "packed",
    decoder_width: int = 512,
    decoder_depth: int = 1,
    others: tuple[int, ...] = (),
) -> MPMAE:
    """The model of a published size.  The defaults, width 512 and one block, are the published decoder's.

    `others`: further patch sizes, for images of as many patches.
    Raises ValueError for an unknown size, a patch other than 8, 16 or 32, or an image that is not whole patches.
    """
    encoder = build_encoder(size, in_channels, patch_size, stem, grn, backend)
    check_image_size((image_size,), patch_size)
    return with_decoder(encoder, targets, decoder_width, decoder_depth, others)


def with_decoder(
    encoder: Encoder, targets: tuple[Modality, ...], width: int = 512, depth: int = 1, others: tuple[int, ...] = ()
) -> MPMAE:
    """The pretraining model of an encoder, and of `others`, further patch sizes."""
    return MPMAE(encoder, Decoder(encoder.width, encoder.patch_size, targets, width, depth, DECODER_GRN_EPS), others)


@torch.no_grad()
def initialise(model: nn.Module, scheme: str, generator: torch.Generator) -> None:
    """Set every parameter, in their order, from `generator`; those of further patch sizes come last.

    | parameter                        | "uniform"             | "published"                                        |
    |----------------------------------|-----------------------|----------------------------------------------------|
    | kernels and matrices             | normal, std 0.02      | the same                                           |
    | those that `PUBLISHED_WIDE` names| normal, std 0.02      | normal, std 1.0, for models made by `build_mpmae`  |
    | mask token                       | normal, std 0.02      | the same                                           |
    | LayerNorm scale                  | 1                     | the same                                           |
    | bias of the first convolution    | normal, std 0.02      | the same (published: 0)                            |
    | other biases, GRN gamma and beta | 0                     | the same                                           |

    Normals of kernels and matrices are cut at -2 and 2 (absolute, as in timm's trunc_normal_).  Raises ValueError for an
    unknown scheme.
    """
    if scheme not in WIDE:
        raise ValueError(f"there is no initialisation '{scheme}'; use one of {', '.join(WIDE)}")
    for full_name, parameter in model.named_parameters():
        name = OF_A_SIZE.sub("", full_name)
        if name.endswith("mask_token") or name in FIRST_BIAS:
            parameter.normal_(0.0, 0.02, generator=generator)
        elif parameter.ndim > 1:
            std = 1.0 if any(fnmatchcase(name, pattern) for pattern in WIDE[scheme]) else 0.02
            nn.init.trunc_normal_(parameter, std=std, a=-2.0, b=2.0, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
