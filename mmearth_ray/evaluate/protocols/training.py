"""The training loop that probes and fine-tuning share: AdamW by a recipe, the best weights or the last.

Every draw comes from one generator, so a seed decides the result.  Shapes: n training images or cells.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mmearth_ray.evaluate.protocols.recipes import Recipe

EPS = 1e-8  # of AdamW, published
CHECKS = 25  # times that validation is looked at

Score: TypeAlias = tuple[float, float]
"""What weights are kept by: the score on validation, then minus the loss there."""


class DivergedError(ArithmeticError):
    """The loss is not a finite number any more; `step` says since when."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step}")
        self.step = step


@dataclass(frozen=True)
class Best:
    """Which step the module's weights are of, and their score; None where validation was not looked at."""

    step: int
    score: Score | None


def train(
    module: nn.Module,
    groups: list[dict[str, Any]],
    loss_of: Callable[[Tensor, int], Tensor],
    *,
    images: int,
    batch: int,
    steps: int,
    rate: float,
    recipe: Recipe,
    generator: torch.Generator,
    validate: Callable[[], Score] | None,
    at_once: int | None = None,
) -> Best:
    """Train a module in place; it ends with the best weights on validation where the recipe says so and `validate` is given.

    `groups`: parameters for AdamW; "share" is a factor of the learning rate.  `loss_of(places, step)`: mean loss of images at
    places (b,) of the training images.  `at_once`: images that pass together, gradients of a batch add up over its parts.
    Raises DivergedError.
    """
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=recipe.weight_decay, eps=EPS)
    best, kept = Best(steps, None), None
    every = max(1, steps // CHECKS)
    for step, places in enumerate(draw_batches(images, batch, steps, generator, recipe.drop_last), start=1):
        for group in optimizer.param_groups:
            group["lr"] = group.get("share", 1.0) * learning_rate(step, steps, rate, recipe)
        optimizer.zero_grad()
        total = 0.0
        for part in places.split(at_once or batch):
            loss = loss_of(part, step) * (len(part) / len(places))
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise DivergedError(step)
        optimizer.step()
        if recipe.best and validate is not None and (step % every == 0 or step == steps):
            score = validate()
            if kept is None or best.score is None or score > best.score:
                best, kept = Best(step, score), _copied(module)
    if kept is not None:
        module.load_state_dict(kept)
    elif validate is not None:
        best = Best(steps, validate())
    return best


def learning_rate(step: int, steps: int, peak: float, recipe: Recipe) -> float:
    """Of 1-based `step`: a linear warm-up that ends at the peak, then half a cosine towards the recipe's minimum."""
    warmup = recipe.warmup * steps
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / max(steps - warmup, 1.0)
    low = min(recipe.minimum, peak)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * max(0.0, progress)))


def draw_batches(images: int, batch: int, steps: int, generator: torch.Generator, drop_last: bool = False) -> Iterator[Tensor]:
    """Places (b,) of the images of each step: every image once in a random order, then again; all where they are no batch.

    With `drop_last` those that fill no batch at the end of an order are left out of it.
    """
    whole = images // batch * batch if drop_last and images >= batch else images
    done = 0
    while done < steps:
        for places in torch.randperm(images, generator=generator)[:whole].split(batch)[: steps - done]:
            yield places
            done += 1


def decayed(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: vectors, which are biases and norms' scales, without weight decay, as ConvNeXt is trained."""
    parts = [[p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim <= 1]]
    groups = [{"params": part, "weight_decay": wd} for part, wd in zip(parts, (weight_decay, 0.0), strict=True)]
    return [group for group in groups if group["params"]]


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
