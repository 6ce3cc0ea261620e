"""Protocols on frozen features: what they have in common, and nearest neighbours.

A `Fit` takes features and labels of training and validation and gives a `Fitted`, which predicts; `run_frozen` makes an
`Outcome` of one.  Labels are as `Task.labels` gives them; of SEGMENTATION a sample is a cell of a map and its label a class.

Shapes: n images (or cells), D features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal, Task
from mmearth_ray.evaluate.protocols.metrics import Outcome, confusion_of
from mmearth_ray.evaluate.protocols.splits import Round

NEIGHBOURS = 5
CONSTANT = 1e-6  # a feature that varies less than this share of its mean is constant to the precision of float32

Predict: TypeAlias = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What predicts from features (n, D): classes (n,), probabilities (n, K) of MULTI, values (n,) of REGRESSION.

    `chosen`: what was chosen on validation, and what a reader should know of the fit.
    """

    predict: Predict
    chosen: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Answer:
    """The predictions of a `Fitted` for one matrix of features."""

    prediction: np.ndarray
    chosen: dict[str, Any]


Fit: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Fitted]
"""(X_train, y_train, X_valid, y_valid) -> Fitted"""


def knn(X_train: np.ndarray, y_train: np.ndarray, X_test: np.ndarray, goal: Goal, classes: int, k: int = NEIGHBOURS) -> Answer:
    """Predictions of `fit_knn` for X_test."""
    fitted = fit_knn(X_train, y_train, X_train[:0], y_train[:0], goal=goal, classes=classes, k=k)
    require_finite(X_test, "test")
    return Answer(fitted.predict(X_test), fitted.chosen)


def run_frozen(fit: Fit, features_ND: np.ndarray, task: Task, rows: Round, encoder: str = "") -> tuple[Outcome, dict[str, Any]]:
    """Fit on the training rows of a data set, choose on the validation rows, predict the test rows.

    `features_ND` are those of all N images.  Raises DataError for features that are not finite, UsageError for SEGMENTATION,
    whose features are maps (`cells.run_cells`).
    """
    if task.info.goal is Goal.SEGMENTATION:
        raise UsageError("segmentation needs a feature per cell of an image, not one per image")
    parts = []
    for split, chosen in (("train", rows.train), ("valid", rows.valid), ("test", rows.test)):
        parts.append(np.asarray(features_ND[chosen]))
        require_finite(parts[-1], split, encoder, task.ids[chosen])
    fitted = fit(parts[0], task.labels(rows.train), parts[1], task.labels(rows.valid))
    truth = task.labels(rows.test)
    return Outcome(task.info.goal, task.info.outputs, task.ids[rows.test], truth, fitted.predict(parts[2])), fitted.chosen


def require_finite(values: np.ndarray, split: str, encoder: str = "", ids: Sequence[str] | np.ndarray | None = None) -> None:
    """Raise DataError naming the first image whose features (n, ...) are not all finite."""
    wrong = np.array([not np.isfinite(row).all() for row in values], bool)
    if wrong.any():
        place = int(wrong.argmax())
        image = f"image '{ids[place]}'" if ids is not None else f"row {place}"
        of = f" of encoder '{encoder}'" if encoder else ""
        raise DataError(
            f"features{of} for {image} of the {split} split are not finite ({int(wrong.sum())} of {len(wrong)}); check the "
            "values of the image and the weights of the encoder"
        )


def fit_knn(
    X_train: np.ndarray,
    y_train: np.ndarray,
    X_valid: np.ndarray,
    y_valid: np.ndarray,
    *,
    goal: Goal,
    classes: int,
    k: int = NEIGHBOURS,
) -> Fitted:
    """The k nearest training samples (all, where there are fewer) by cosine of features centred by the training mean.

    Most votes win, of equal ones the class whose sample is nearest.  MULTI: the share of neighbours that have a class.
    REGRESSION: their mean.  Validation is not used.  Raises DataError for features that are not finite or absent, UsageError
    for k below 1.
    """
    from sklearn.neighbors import NearestNeighbors

    if k < 1:
        raise UsageError(f"k must be at least 1 neighbour; got {k}")
    require(X_train, y_train, "train")
    mean_D = X_train.mean(axis=0, dtype=np.float64)
    neighbours = min(k, len(X_train))
    index = NearestNeighbors(n_neighbors=neighbours, algorithm="brute", metric="cosine").fit(X_train - mean_D)

    def predict(X: np.ndarray) -> np.ndarray:
        if not len(X):
            return y_train[:0] * (1.0 if goal in (Goal.MULTI, Goal.REGRESSION) else 1)
        found_nk = y_train[index.kneighbors(X - mean_D, return_distance=False)]
        return found_nk.mean(axis=1) if goal in (Goal.MULTI, Goal.REGRESSION) else _vote(found_nk, classes)

    return Fitted(predict, {"k": neighbours})


def _vote(classes_nk: np.ndarray, classes: int) -> np.ndarray:
    """The class that occurs most often, of equals the one that occurs first: (n,)."""
    n, k = classes_nk.shape
    weight_nK = np.zeros((n, classes))
    for place in range(k):  # a vote weighs more than all the parts by which nearer ones are preferred
        weight_nK[np.arange(n), classes_nk[:, place]] += 1 + 2.0 ** -(place + 1) / (k + 1)
    return weight_nK.argmax(axis=1)


def require(X: np.ndarray, y: np.ndarray, split: str) -> None:
    """Raise DataError for features that are not finite, or none at all."""
    assert len(X) == len(y)
    if not len(X):
        raise DataError(f"the {split} split has no image with a label; an evaluation needs at least one")
    require_finite(X, split)


class Standardised:
    """Features less the mean, over the standard deviation, of training samples; a constant feature is centred only."""

    def __init__(self, X_train: np.ndarray) -> None:
        self.mean_D = X_train.mean(axis=0, dtype=np.float64)
        std_D = X_train.std(axis=0, dtype=np.float64)
        self.std_D = np.where(std_D > CONSTANT * np.abs(self.mean_D), std_D, 1.0)

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """float64 (n, D)."""
        return (X - self.mean_D) / self.std_D


def score(goal: Goal, classes: int, truth: np.ndarray, prediction: np.ndarray) -> float:
    """What settings are chosen by: the primary metric, or minus the squared error of REGRESSION (which orders alike, and is
    defined for any truth); minus infinity where it is undefined."""
    if goal is Goal.REGRESSION:
        return -float(np.mean((truth - prediction) ** 2))
    ids = np.arange(len(truth)).astype(object)
    if goal is Goal.SEGMENTATION:
        outcome = Outcome(goal, classes, ids[:1], confusion=confusion_of(truth, prediction, classes)[None])
    else:
        outcome = Outcome(goal, classes, ids, truth, prediction)
    value = outcome.primary()
    return value if np.isfinite(value) else -np.inf
