"""The linear probe: one linear layer on frozen features, trained with AdamW.

Features are computed once, so nothing that acts inside the encoder can act here: the published recipe's drop path of 0.1 does
not (its frozen encoder was in train mode), and `chosen` says so.

Shapes: n images (or cells), D features, K outputs.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.frozen import Fitted, Standardised, require_finite, score
from mmearth_ray.evaluate.protocols.recipes import Recipe, probe_recipe
from mmearth_ray.evaluate.protocols.targets import Target, target_of
from mmearth_ray.evaluate.protocols.training import Best, DivergedError, Score, decayed, train
from mmearth_ray.model.layers import EPS

STREAM = 7301  # tells this use of a seed from others
BLOCK = 16_384  # samples that are predicted at once


def fit_probe(
    X_train: np.ndarray,
    y_train: np.ndarray,
    X_valid: np.ndarray,
    y_valid: np.ndarray,
    *,
    goal: Goal,
    classes: int,
    recipe: str = "converged",
    all_labels: bool = True,
    seed: int = 0,
    steps: int | None = None,
    batch: int | None = None,
) -> Fitted:
    """A linear layer by a recipe ("published" or "converged"), at most `steps` steps; see `Recipe` and `frozen.Fit`.

    "converged" takes the learning rate, and the step, that are best on validation by the primary metric, of equals those of
    the lowest loss there.  Raises DataError for features that are not finite or absent, or if no rate gives a finite loss.
    """
    plan = probe_recipe(recipe, all_labels=all_labels)
    for X, split in ((X_train, "train"), (X_valid, "valid")):
        if not len(X):
            raise DataError(f"the {split} split has no image with a label; a probe needs at least one")
        require_finite(X, split)
    inputs = Inputs(X_train, plan)
    target = target_of(goal, y_train, 0.0 if goal is Goal.SEGMENTATION else plan.smoothing)  # published: none for pixels
    size = min(batch or plan.batch, len(X_train))
    planned = plan.steps(len(X_train), size, steps)
    data = (inputs(X_train), torch.from_numpy(np.asarray(y_train))), (inputs(X_valid), np.asarray(y_valid))
    found: tuple[float, Best, nn.Linear] | None = None
    for rate in plan.rates:
        try:
            best, layer = _fit(data, target, goal, classes, plan, rate, size, planned, seed)
        except DivergedError:
            continue
        if found is None or (best.score is not None and found[1].score is not None and best.score > found[1].score):
            found = rate, best, layer
    if found is None:
        raise DataError(f"no learning rate of {plan.rates} gives the probe a finite loss; check the features' values")
    rate, best, layer = found
    chosen: dict[str, Any] = {"recipe": plan.name, "best_lr": rate, "best_batch_size": size, "steps": planned,
                              "best_step": best.step}  # fmt: skip
    if plan.name == "published":
        chosen["note"] = "drop path 0.1 of the published probe cannot act on features that are computed once"
    return Fitted(lambda X: _predict(layer, inputs, target, X), chosen)


class Inputs:
    """Features as the layer takes them: standardised by training's, or each image's by itself (LayerNorm, which stays so)."""

    def __init__(self, X_train: np.ndarray, recipe: Recipe) -> None:
        self.scaler = Standardised(X_train) if recipe.standardise else None

    def __call__(self, X: np.ndarray) -> Tensor:
        """float32 (n, D)."""
        if self.scaler is not None:
            return torch.from_numpy(self.scaler(X).astype(np.float32))
        return torch.nn.functional.layer_norm(torch.from_numpy(X.astype(np.float32)), X.shape[1:], eps=EPS)


def _fit(
    data: tuple[tuple[Tensor, Tensor], tuple[Tensor, np.ndarray]],
    target: Target,
    goal: Goal,
    classes: int,
    plan: Recipe,
    rate: float,
    batch: int,
    steps: int,
    seed: int,
) -> tuple[Best, nn.Linear]:
    (X, y), (V, y_valid) = data
    generator = torch.Generator().manual_seed(seed * 10_000 + STREAM)
    layer = new_head(X.shape[1], classes, plan.head_std, generator)

    def validate() -> Score:
        with torch.no_grad():
            outputs = layer(V)
            loss = float(target.loss(outputs, torch.from_numpy(y_valid)))
        return score(goal, classes, y_valid, target.predict(outputs)), -loss

    groups = decayed(list(layer.named_parameters()), plan.weight_decay)
    best = train(
        layer, groups, lambda places, _: target.loss(layer(X[places]), y[places]), images=len(X), batch=batch, steps=steps,
        rate=rate, recipe=plan, generator=generator, validate=validate if plan.best else None,
    )  # fmt: skip
    return best, layer


def new_head(width: int, outputs: int, std: float, generator: torch.Generator) -> nn.Linear:
    """Fresh weights, normal and cut at two deviations, and no bias."""
    with torch.random.fork_rng(devices=[]):  # a layer draws weights when it is made, which nobody else is to notice
        layer = nn.Linear(width, outputs)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _predict(layer: nn.Linear, inputs: Inputs, target: Target, X: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        parts = [target.predict(layer(inputs(X[start : start + BLOCK]))) for start in range(0, max(1, len(X)), BLOCK)]
    return np.concatenate(parts)
