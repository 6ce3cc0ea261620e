"""What fine-tuning adds to an encoder: a head, drop path, and a learning rate per layer.

Shapes: B images, D features, K outputs.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from mmearth_ray.evaluate.protocols.probe import new_head
from mmearth_ray.evaluate.protocols.training import decayed
from mmearth_ray.model.layers import Block, LayerNorm


class Classifier(nn.Module):
    """An encoder's pooled features, LayerNorm, linear: (B, C, H, W) -> (B, K).  `resting`: no gradient into the encoder."""

    def __init__(self, encoder: nn.Module, width: int, outputs: int, head_std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.encoder = encoder
        self.resting = False
        self.norm = LayerNorm(width)
        self.head = new_head(width, outputs, head_std, generator)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.resting):
            pooled_BD = self.encoder(image_BCHW)
        return self.head(self.norm(pooled_BD))


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training a block's branch is left out for some images, the others' scaled up."""

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rate, self.generator = rate, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept_B = torch.rand(len(x), generator=self.generator) >= self.rate
        return x * (kept_B.to(x) / (1 - self.rate)).view(-1, *[1] * (x.ndim - 1))


def add_drop_path(encoder: nn.Module, rate: float, generator: torch.Generator) -> int:
    """Give every block a drop path, from 0 at the first to `rate` at the last; returns how many blocks there are.

    Blocks are those of ours, whose branch ends in its second matrix, and those of timm, which have a place for it.
    """
    blocks = [m for m in encoder.modules() if isinstance(m, Block) or hasattr(m, "drop_path")]
    for number, block in enumerate(blocks):
        path = DropPath(rate * number / max(1, len(blocks) - 1), generator).train(encoder.training)
        if isinstance(block, Block):
            block.pwconv2 = nn.Sequential(block.pwconv2, path)  # type: ignore[assignment]
        else:
            block.drop_path = path
    return len(blocks)


def layer_groups(encoder: nn.Module, decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW whose "share" of the learning rate is decay to the power of the blocks between a layer and the head.

    As published ("single" of ConvNeXt V2's fine-tuning): the stem and the first convolution have the whole rate, as the head
    has, and a halving that of the first block before which it could stand, one stage too early.
    """
    named = list(encoder.named_parameters())
    if decay == 1:
        return decayed(named, weight_decay)
    depths = _depths([name for name, _ in named])
    groups = []
    layers = {name: _layer(name, depths) for name, _ in named}
    for layer in sorted(set(layers.values())):
        part = decayed([(name, p) for name, p in named if layers[name] == layer], weight_decay)
        groups += [{**group, "share": decay ** (sum(depths) + 1 - layer)} for group in part]
    return groups


_BLOCK = re.compile(r"(?:^|\.)stages\.(\d+)\.(?:blocks\.)?(\d+)\.")
_HALVING = re.compile(r"(?:^|\.)downsample_layers\.(\d+)\.")
_TIMM_HALVING = re.compile(r"(?:^|\.)stages\.(\d+)\.downsample\.")


def _depths(names: list[str]) -> list[int]:
    """Blocks of each stage."""
    found = [(int(m[1]), int(m[2])) for name in names if (m := _BLOCK.search(name))]
    return [1 + max(block for s, block in found if s == stage) for stage in sorted({s for s, _ in found})]


def _layer(name: str, depths: list[int]) -> int:
    """Number of a layer from the input, 1 to blocks + 1.

    Source: facebookresearch/ConvNeXt-V2, optim_factory.py, get_num_layer_for_convnext_single, on our names.
    """
    if m := _HALVING.search(name):
        return sum(depths[: int(m[1])]) + 1
    if m := _TIMM_HALVING.search(name):
        return sum(depths[: int(m[1]) - 1]) + 1
    if m := _BLOCK.search(name):
        return sum(depths[: int(m[1])]) + int(m[2]) + 1
    return sum(depths) + 1
