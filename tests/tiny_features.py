"""Features of a few classes, labels or values, that tell them but for noise."""

import numpy as np

from mmearth_ray.evaluate.datasets.task import Goal

K, D = 3, 6


def samples(goal: Goal, n: int = 120, noise: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features that tell the labels, but for noise, far from the origin and of unlike sizes."""
    rng = np.random.default_rng([seed, 1])
    mixing = np.random.default_rng(0).normal(size=(K, D)) * np.logspace(-2, 2, D)
    if goal is Goal.MULTI:
        y = (rng.random((n, K)) < 0.4).astype(np.uint8)
        known = y - 0.5
    elif goal is Goal.REGRESSION:
        known = rng.normal(size=(n, K))
        y = 10 + known @ [1.0, -2.0, 0.5]
    else:
        y = rng.integers(0, K, n)
        known = np.eye(K)[y]
    X = known @ mixing + noise * rng.normal(size=(n, D)) * np.logspace(-2, 2, D) + 1000
    return X.astype(np.float32), y
