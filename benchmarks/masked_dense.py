"""The published computation of a sparse encoder in plain torch: dense convolutions on the whole map, and a mask.

Independent of the package: it reads parameters by name from a dictionary.  The baseline that the packed encoder is
measured against, and must agree with.  So it is written to be fast as far as ordinary torch goes: memory is channels-last,
which makes every permutation a view, and the mask is multiplied in only where hidden cells would reach visible ones,
which is before convolutions that look across cells and before GRN.

Shapes: B images, C channels, H x W pixels or cells, L patches, F = 4 C.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6  # of LayerNorm everywhere and of the encoder's GRN: published

Parameters = Mapping[str, Tensor]


def encode(
    parameters: Parameters,
    image_BCHW: Tensor,
    seen_BL: Tensor,
    patch_size: int,
    depths: tuple[int, ...],
    batch_wide: bool = False,
) -> Tensor:
    """Features of the last stage on the whole grid of patches, zero where `seen_BL` is 0.

    `batch_wide`: GRN takes its norm over the whole batch, as published, instead of over each image.
    """
    stride = patch_size // 8
    batch, _, height, width = image_BCHW.shape
    grid_B1RS = seen_BL.view(batch, 1, height // patch_size, width // patch_size).float()

    x = (image_BCHW * enlarge(grid_B1RS, patch_size)).contiguous(memory_format=torch.channels_last)
    if "initial_conv.0.weight" in parameters:
        x = functional.gelu(norm(parameters, "initial_conv.1", conv(parameters, "initial_conv.0", x, padding=1)))
        x = norm(parameters, "stem.1", conv(parameters, "stem.0", x, stride=stride, groups=x.shape[1]))
    else:
        x = norm(parameters, "stem_orig.1", conv(parameters, "stem_orig.0", x, stride=stride))
    for stage, depth in enumerate(depths):
        if stage > 0:
            name = f"downsample_layers.{stage - 1}"
            x = conv(parameters, f"{name}.1", norm(parameters, f"{name}.0", x), stride=2)
        seen_B1HW = enlarge(grid_B1RS, x.shape[2] // grid_B1RS.shape[2])
        x = x * seen_B1HW
        for number in range(depth):
            x = block(parameters, f"stages.{stage}.{number}", x, seen_B1HW, batch_wide=batch_wide)
    return x


def block(
    parameters: Parameters,
    name: str,
    x_BCHW: Tensor,
    seen_B1HW: Tensor | None = None,
    grn_eps: float = EPS,
    batch_wide: bool = False,
) -> Tensor:
    """A block of ConvNeXt V2.  With `seen_B1HW` only those cells exist: the others are zero before it and after it."""
    seen_BHW1 = None if seen_B1HW is None else seen_B1HW.permute(0, 2, 3, 1)
    y_BHWC = conv(parameters, f"{name}.dwconv", x_BCHW, padding=3, groups=x_BCHW.shape[1]).permute(0, 2, 3, 1)
    y_BHWC = _norm_last(parameters, f"{name}.norm", y_BHWC)
    y_BHWF = functional.gelu(_linear(parameters, f"{name}.pwconv1", y_BHWC))
    if seen_BHW1 is not None:
        y_BHWF = y_BHWF * seen_BHW1
    y_BHWC = _linear(parameters, f"{name}.pwconv2", _grn(parameters, f"{name}.grn", y_BHWF, grn_eps, batch_wide))
    if seen_BHW1 is not None:
        y_BHWC = y_BHWC * seen_BHW1
    return x_BCHW + y_BHWC.permute(0, 3, 1, 2)


def conv(parameters: Parameters, name: str, x_BCHW: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """A dense convolution."""
    return functional.conv2d(x_BCHW, parameters[f"{name}.weight"], parameters[f"{name}.bias"], stride, padding, groups=groups)


def norm(parameters: Parameters, name: str, x_BCHW: Tensor) -> Tensor:
    """LayerNorm over channels."""
    return _norm_last(parameters, name, x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def enlarge(grid_B1RS: Tensor, scale: int) -> Tensor:
    """A mask of patches as one of cells, `scale` of them along the side of a patch."""
    return grid_B1RS.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def _norm_last(parameters: Parameters, name: str, x_BHWC: Tensor) -> Tensor:
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    return functional.layer_norm(x_BHWC, x_BHWC.shape[-1:], weight, bias, EPS)


def _linear(parameters: Parameters, name: str, x_BHWC: Tensor) -> Tensor:
    return functional.linear(x_BHWC, parameters[f"{name}.weight"], parameters[f"{name}.bias"])


def _grn(parameters: Parameters, name: str, x_BHWF: Tensor, eps: float, batch_wide: bool) -> Tensor:
    """The L2 norm is spelled out: torch's own is slower over dimensions that are not the last."""
    squares = x_BHWF.square().sum((0, 1, 2) if batch_wide else (1, 2), keepdim=True)
    length = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()  # a silent channel: its gradient is 0, not NaN
    response = length / (length.mean(-1, keepdim=True) + eps)
    return parameters[f"{name}.gamma"] * (x_BHWF * response) + parameters[f"{name}.beta"] + x_BHWF
