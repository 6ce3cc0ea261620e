"""Scores and differences over several seeds, with an interval that holds both kinds of chance: labels drawn and test images.

Student's t over seeds says what other labelled subsets and initial weights would change, a bootstrap over test images says
what other test images would change.  They are independent of each other: their half widths are added in squares, on each
side.  With a single seed the bootstrap stands alone, and says nothing about other subsets.

Shapes: S seeds, R resamples, n test images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmearth_ray.evaluate.protocols.intervals import CONFIDENCE, over_seeds
from mmearth_ray.evaluate.protocols.metrics import Outcome

STREAM = 7301  # tells this use of a seed from others
BLOCK = 256  # resamples at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over so many seeds, and its interval, None where nothing can be said."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f}{interval}"


class Resamples:
    """The same resamples of the same test images for every outcome, so that all differences are paired."""

    def __init__(self, images: int, resamples: int, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, STREAM])
        self.images = images
        draws = (np.bincount(rng.integers(0, images, images), minlength=images) for _ in range(resamples))
        self.counts_Rn = np.array([np.minimum(draw, 255) for draw in draws], np.uint8).reshape(resamples, images)

    def values(self, outcome: Outcome) -> np.ndarray:
        """The primary metric (R,) in every resample; NaN of a single image, which says nothing about others."""
        if self.images < 2:
            return np.full(len(self.counts_Rn), np.nan)
        blocks = [self.counts_Rn[start : start + BLOCK] for start in range(0, len(self.counts_Rn), BLOCK)]
        found = [outcome.from_sums(block.astype(np.float64) @ outcome.sums) for block in blocks]
        return np.concatenate(found) if found else np.zeros(0)


def estimate(scores_S: Sequence[float], values_SR: Sequence[np.ndarray], bounds: tuple[float, float]) -> Estimate:
    """The mean over seeds, with its interval cut at the metric's bounds.  Raises ValueError without scores."""
    mean, low, high = over_seeds(scores_S)
    over_images = _percentiles(np.mean(np.stack(values_SR), axis=0))
    if over_images is None:
        return Estimate(mean, low, high, len(scores_S))
    below, above = (max(0.0, mean - over_images[0]), max(0.0, over_images[1] - mean))
    if low is not None and high is not None:
        below, above = math.hypot(below, mean - low), math.hypot(above, high - mean)
    return Estimate(mean, max(bounds[0], mean - below), min(bounds[1], mean + above), len(scores_S))


@dataclass(frozen=True, eq=False)
class Scored:
    """One seed's score, and its values (R,) in the resamples."""

    score: float
    values: np.ndarray


def mean_of(found: Mapping[int, Scored], bounds: tuple[float, float]) -> Estimate | None:
    """The mean over seeds of {seed: score}; None without any."""
    return estimate([s.score for s in found.values()], [s.values for s in found.values()], bounds) if found else None


def difference(first: Mapping[int, Scored], second: Mapping[int, Scored], *, alone: bool) -> Estimate | None:
    """First minus second, {seed: score} each, paired by seed and by resample; None where no seed has both.

    `alone`: one of them does not depend on the seed, and its one score is paired with every seed of the other.
    """
    pairs = [(a, b) for seed, a in first.items() for other, b in second.items() if seed == other or alone]
    if not pairs:
        return None
    return estimate([a.score - b.score for a, b in pairs], [a.values - b.values for a, b in pairs], (-math.inf, math.inf))


def _percentiles(values_R: np.ndarray) -> tuple[float, float] | None:
    defined = values_R[np.isfinite(values_R)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)
