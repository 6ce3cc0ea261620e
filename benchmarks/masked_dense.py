"""The published computation of a sparse encoder in plain torch: dense convolutions, the mask multiplied in after every one.

Independent of the package: it reads parameters by name from a dictionary.  The baseline that the packed encoder is
measured against, and must agree with.

Shapes: B images, C channels, H x W pixels or cells, L patches.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6


def encode(
    parameters: Mapping[str, Tensor],
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

    def masked(x_BCHW: Tensor) -> Tensor:
        scale = x_BCHW.shape[2] // grid_B1RS.shape[2]
        return x_BCHW * grid_B1RS.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

    def conv(x: Tensor, name: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        return masked(functional.conv2d(x, weight, bias, stride, padding, groups=groups))

    def norm(x: Tensor, name: str) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        weight, bias = parameters[f"{name}.weight"].view(1, -1, 1, 1), parameters[f"{name}.bias"].view(1, -1, 1, 1)
        return masked((x - mean) / (variance + EPS).sqrt() * weight + bias)

    def matrix(x: Tensor, name: str) -> Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        return masked(functional.conv2d(x, weight[:, :, None, None], bias))

    def grn(x: Tensor, name: str) -> Tensor:
        over = (0, 2, 3) if batch_wide else (2, 3)
        length = torch.linalg.vector_norm(x, dim=over, keepdim=True)  # hidden places are zero, so they do not count
        response = length / (length.mean(1, keepdim=True) + EPS)
        gamma, beta = parameters[f"{name}.gamma"].view(1, -1, 1, 1), parameters[f"{name}.beta"].view(1, -1, 1, 1)
        return masked(gamma * (x * response) + beta + x)

    x = masked(image_BCHW)
    if "initial_conv.0.weight" in parameters:
        x = masked(functional.gelu(norm(conv(x, "initial_conv.0", padding=1), "initial_conv.1")))
        x = norm(conv(x, "stem.0", stride=stride, groups=x.shape[1]), "stem.1")
    else:
        x = norm(conv(x, "stem_orig.0", stride=stride), "stem_orig.1")
    for stage, depth in enumerate(depths):
        if stage > 0:
            name = f"downsample_layers.{stage - 1}"
            x = conv(norm(x, f"{name}.0"), f"{name}.1", stride=2)
        for number in range(depth):
            name = f"stages.{stage}.{number}"
            y = norm(conv(x, f"{name}.dwconv", padding=3, groups=x.shape[1]), f"{name}.norm")
            y = masked(functional.gelu(matrix(y, f"{name}.pwconv1")))
            x = x + matrix(grn(y, f"{name}.grn"), f"{name}.pwconv2")
    return x
