"""Random patches and weights for tests of the model, and how near two tensors must be.

Shapes: B images, L patches, V of them visible.
"""

import torch
from torch import Tensor


def draw_patches(batch: int, patches: int, visible: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random ascending indices of visible (B, V) and hidden (B, L - V) patches."""
    order = torch.stack([torch.randperm(patches, generator=generator) for _ in range(batch)])
    return order[:, :visible].sort().values, order[:, visible:].sort().values


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Parameters of everyday size everywhere, so that no part of a model is switched off by zeros."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """|a - b| <= tolerance max(1, |b|), everywhere."""
    assert actual.shape == expected.shape, what
    excess = (actual - expected).abs() / expected.abs().clamp(min=1)
    assert excess.max() <= tolerance, f"{what} differs by {excess.max().item():.2e}"
