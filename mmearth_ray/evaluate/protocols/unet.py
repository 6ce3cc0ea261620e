"""A UNet on top of an encoder: maps of class scores as large as the image.

The published decoder of MP-MAE's segmentation (github.com/vishalned/MMEarth-train, arXiv:2405.02771): nearest upsampling, 3x3
convolution, LayerNorm, GELU, then the encoder's features of that resolution beside it; skips from the first convolution, the
stem, stage 2 and stage 3.  At full resolution a 3x3 convolution to half the first width, LayerNorm, GELU, and a 1x1 head.

Shapes: B images, C bands, H x W pixels, D_i channels of level i, from the largest map to the smallest, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmearth_ray.model.encoder import Encoder
from mmearth_ray.model.layers import DenseLayout, LayerNorm


class UNet(nn.Module):
    """An encoder and a decoder: (B, C, H, W), sides multiples of the patch, -> class scores (B, K, H, W).

    `channels`: C.  `head_std`: of the head's fresh weights.  `resting`: no gradient flows into the encoder, which may change
    between steps.
    """

    def __init__(
        self,
        encoder: nn.Module,
        channels: int,
        patch: int,
        classes: int,
        generator: torch.Generator,
        head_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.resting = False
        training = encoder.training
        encoder.eval()  # nothing that is drawn is drawn here
        with torch.no_grad():
            widths = [level.shape[1] for level in levels(encoder, torch.zeros(1, channels, 2 * patch, 2 * patch))]
        encoder.train(training)
        with torch.random.fork_rng(devices=[]):  # layers draw weights when they are made, which nobody else is to notice
            self.decoder = Decoder(widths, encoder_width(encoder, widths), classes)
        fresh(self.decoder, generator)
        nn.init.trunc_normal_(self.decoder.head.weight, std=head_std, a=-2 * head_std, b=2 * head_std, generator=generator)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.resting):
            found = levels(self.encoder, image_BCHW)
        return self.decoder(found, image_BCHW.shape[2:])


class Decoder(nn.Module):
    """From the smallest map to the largest, and to class scores.  `widths`: D_i; `narrow`: channels at full resolution."""

    def __init__(self, widths: Sequence[int], narrow: int, classes: int) -> None:
        super().__init__()
        self.steps, before = nn.ModuleList(), widths[-1]
        for number in range(len(widths) - 2, -1, -1):
            width = widths[number] if number else narrow
            self.steps.append(Step(before, width))
            before = width + widths[number]
        self.last = nn.Conv2d(before, max(1, narrow // 2), 3, padding=1)
        self.norm = LayerNorm(max(1, narrow // 2))
        self.head = nn.Conv2d(max(1, narrow // 2), classes, 1)

    def forward(self, levels_BDHW: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        x_BDHW = levels_BDHW[-1]
        for step, skip_BDHW in zip(self.steps, reversed(levels_BDHW[:-1]), strict=True):
            x_BDHW = torch.cat([step(x_BDHW, skip_BDHW.shape[2:]), skip_BDHW], dim=1)
        if x_BDHW.shape[2:] != torch.Size(size):
            x_BDHW = functional.interpolate(x_BDHW, size=tuple(size))
        x_BHWD = functional.gelu(self.norm(self.last(x_BDHW).permute(0, 2, 3, 1)))
        return self.head(x_BHWD.permute(0, 3, 1, 2))


class Step(nn.Module):
    """To the size of the next larger map: nearest neighbours, 3x3 convolution, LayerNorm over channels, GELU."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, width, 3, padding=1)
        self.norm = LayerNorm(width)

    def forward(self, x_BDHW: Tensor, size: Sequence[int]) -> Tensor:
        x_BDHW = self.convolution(functional.interpolate(x_BDHW, size=tuple(size)))
        return functional.gelu(self.norm(x_BDHW.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def levels(encoder: nn.Module, image_BCHW: Tensor) -> list[Tensor]:
    """Maps (B, D_i, H_i, W_i) from the largest to the smallest.

    Of an encoder with the modified stem: its first convolution (with norm and GELU), the stem, stages 2, 3 and 4.  Of any
    other, which has no features at full resolution: the image itself, and all its stages.
    """
    if not (isinstance(encoder, Encoder) and hasattr(encoder, "initial_conv")):
        given: Any = encoder  # an ImageEncoder
        return [image_BCHW, *given.maps(image_BCHW)]
    layout = DenseLayout()
    (convolution, first_norm), (depthwise, norm) = encoder.initial_conv, encoder.stem
    first = functional.gelu(first_norm(convolution(image_BCHW, layout)))
    x = norm(depthwise(first, layout))
    found = [first, x]
    for number, blocks in enumerate(encoder.stages):
        if number > 0:
            halving_norm, halve = encoder.downsample_layers[number - 1]  # type: ignore[misc]
            x = halve(halving_norm(x), layout)
        for block in blocks:  # type: ignore[attr-defined]
            x = block(x, layout)
        if number > 0:
            found.append(x)
    return [level.squeeze(1).permute(0, 3, 1, 2) for level in found]


def encoder_width(encoder: nn.Module, widths: Sequence[int]) -> int:
    """Channels at full resolution: those of the first convolution, or of the first stage where the image stands for it."""
    return widths[0] if isinstance(encoder, Encoder) and hasattr(encoder, "initial_conv") else widths[1]


def fresh(module: nn.Module, generator: torch.Generator) -> None:
    """Fresh weights as in pretraining (see `dense.start`), drawn from a generator."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        for part in module.modules():
            if isinstance(part, nn.Conv2d) and part.bias is not None:
                nn.init.zeros_(part.bias)
