"""What a head is trained with and what its outputs mean, for each goal.

Shapes: B images or cells, K classes, H x W pixels; outputs are (B, K), (B, 1) of a regression, (B, K, H, W) of maps.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional

from mmearth_ray.evaluate.datasets.task import Goal


@dataclass(frozen=True)
class Target:
    """The loss of a goal; of a regression values count in units of the training labels' `std` from their `mean`."""

    goal: Goal
    smoothing: float
    mean: float = 0.0
    std: float = 1.0

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean over images; over labelled cells or pixels where labels are classes of them, 0 where none is labelled.

        SINGLE: cross-entropy with smoothed labels.  MULTI: binary cross-entropy of y (1 - s) + (1 - y) s, as published.
        REGRESSION: squared error.
        """
        if self.goal is Goal.MULTI:
            soft = labels.float() * (1 - 2 * self.smoothing) + self.smoothing
            return functional.binary_cross_entropy_with_logits(outputs, soft)
        if self.goal is Goal.REGRESSION:
            return functional.mse_loss(outputs[:, 0], (labels.float() - self.mean) / self.std)
        classes, smoothing = labels.long(), self.smoothing
        total = functional.cross_entropy(outputs, classes, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
        return total / (labels >= 0).sum().clamp(min=1)

    def predict(self, outputs: Tensor) -> np.ndarray:
        """Classes, int64 (B,) or (B, H, W); probabilities (B, K) of MULTI; values (B,) of REGRESSION, in the labels' unit."""
        if self.goal is Goal.MULTI:
            return outputs.double().sigmoid().cpu().numpy()
        if self.goal is Goal.REGRESSION:
            return outputs[:, 0].double().cpu().numpy() * self.std + self.mean
        return outputs.argmax(dim=1).cpu().numpy()


def target_of(goal: Goal, labels: np.ndarray, smoothing: float) -> Target:
    """The target of a training on these labels."""
    if goal is not Goal.REGRESSION:
        return Target(goal, smoothing)
    std = float(np.std(labels))
    return Target(goal, smoothing, float(np.mean(labels)), std if std > 0 else 1.0)
