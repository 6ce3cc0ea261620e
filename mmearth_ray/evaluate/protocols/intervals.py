"""Intervals around scores: over test images by a bootstrap, paired for differences, and over seeds by Student's t.

A bootstrap over test images says how much a score would change with other test images, the fitted model being what it is;
the interval over seeds says how much it changes with the labelled subset and the initial weights.  Neither holds the other.

Shapes: n test images, R resamples.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mmearth_ray.evaluate.protocols.metrics import Outcome

RESAMPLES = 1000
CONFIDENCE = 0.95
BLOCK = 4_000_000  # numbers of a block of weights: 32 MB
STREAM = 7001  # tells this use of a seed from others

Bounds = tuple[float | None, float | None]


def bootstrap(outcome: Outcome, resamples: int = RESAMPLES, seed: int = 0, confidence: float = CONFIDENCE) -> Bounds:
    """(low, high) of the primary metric: percentiles over resamples of test images (Efron and Tibshirani 1993, ch. 13).

    (None, None) where nothing can be said: fewer than two images, or a metric that is undefined.  Resamples in which the
    metric is undefined are left out.  A perfect score gives an interval of no width, as every percentile bootstrap does.
    """
    if len(outcome) < 2:
        return None, None
    values = np.concatenate([outcome.from_sums(weights @ outcome.sums) for weights in _weights(len(outcome), resamples, seed)])
    return _percentiles(values, confidence)


def paired(
    first: Outcome, second: Outcome, resamples: int = RESAMPLES, seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[float, float | None, float | None]:
    """(difference, low, high) of the primary metric, first minus second, on the same resamples of the same images.

    Raises ValueError unless both are of the same images in the same order with the same truth.
    """
    if (first.goal, first.classes) != (second.goal, second.classes) or not np.array_equal(first.ids, second.ids):
        raise ValueError("a paired difference needs two outcomes of the same task and the same test images in the same order")
    if not np.array_equal(_truth(first), _truth(second)):
        raise ValueError("a paired difference needs the same truth in both outcomes; the labels of the test images differ")
    difference = first.primary() - second.primary()
    if len(first) < 2:
        return difference, None, None
    values = [
        first.from_sums(weights @ first.sums) - second.from_sums(weights @ second.sums)
        for weights in _weights(len(first), resamples, seed)
    ]
    return difference, *_percentiles(np.concatenate(values), confidence)


def over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float | None, float | None]:
    """(mean, low, high) by Student's t with n - 1 degrees of freedom; no interval of a single value.

    Raises ValueError without values.
    """
    from scipy.stats import t

    found = np.asarray(values, np.float64)
    if not len(found):
        raise ValueError("a mean needs at least one value; got none")
    mean = float(found.mean())
    if len(found) < 2 or not np.isfinite(found).all():
        return mean, None, None
    half = float(t.ppf(0.5 + confidence / 2, len(found) - 1)) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return mean, mean - half, mean + half


def _weights(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (r, n) of how often each image occurs in a resample; the draws depend on n and the seed alone."""
    if resamples < 1:
        raise ValueError(f"a bootstrap needs at least 1 resample; got {resamples}")
    rng = np.random.default_rng([seed, STREAM])
    step = max(1, BLOCK // images)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        places = rng.integers(0, images, (count, images)) + images * np.arange(count)[:, None]
        yield np.bincount(places.ravel(), minlength=count * images).reshape(count, images).astype(np.float64)


def _percentiles(values_R: np.ndarray, confidence: float) -> Bounds:
    defined = values_R[np.isfinite(values_R)]
    if not len(defined):
        return None, None
    low, high = np.percentile(defined, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def _truth(outcome: Outcome) -> np.ndarray:
    """What is true of each image; of maps the pixels of each class."""
    if outcome.truth is not None:
        return outcome.truth
    assert outcome.confusion is not None  # checked when the outcome was made
    return outcome.confusion.sum(axis=2)
