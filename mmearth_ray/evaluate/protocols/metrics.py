"""How good predictions are: every metric over the whole of a test set, and never an average over batches.

The primary metric of every goal is a function of sums over images, `Outcome.sums`, so that a resample of images is a weighted
sum and a bootstrap of a thousand resamples one matrix product.

Shapes: n test images, K classes, S sums of an image, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.task import Goal

PRIMARY = {Goal.SINGLE: "accuracy", Goal.MULTI: "micro_f1", Goal.SEGMENTATION: "miou", Goal.REGRESSION: "r2"}
"""What the published evaluation reports for each goal (GEO-Bench, arXiv:2306.03831, table 1); R2 where it has no such goal."""
THRESHOLD = 0.5
"""A class is predicted when its probability is above this, as scikit-learn and torchmetrics do it."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was predicted for test images, and what is true.

    `ids`: text (n,).  `truth` and `prediction`: classes (n,) of SINGLE; 0 or 1, and probabilities, (n, K) of MULTI; values (n,)
    of REGRESSION.  Of SEGMENTATION `confusion` (n, K, K) stands for both: pixels of an image by truth (rows) and prediction
    (columns), ignored pixels left out.  `classes` is K, 1 of REGRESSION.  Raises DataError for predictions that are not finite,
    ValueError for shapes that do not go together.
    """

    goal: Goal
    classes: int
    ids: np.ndarray
    truth: np.ndarray | None = None
    prediction: np.ndarray | None = None
    confusion: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        wanted = {Goal.MULTI: (n, self.classes), Goal.SEGMENTATION: (n, self.classes, self.classes)}.get(self.goal, (n,))
        parts = ("confusion",) if self.goal is Goal.SEGMENTATION else ("truth", "prediction")
        for part in parts:
            values = getattr(self, part)
            if values is None or np.shape(values) != wanted:
                found = "nothing" if values is None else np.shape(values)
                raise ValueError(f"{part} of a {self.goal} outcome must be {wanted}; got {found}")
            object.__setattr__(self, part, np.asarray(values))
            wrong = ~np.isfinite(getattr(self, part)).reshape(n, int(np.prod(wanted[1:]))).all(axis=1)
            if wrong.any():
                raise DataError(f"the {part} of image '{self.ids[wrong.argmax()]}' of the test split is not a finite number")
        object.__setattr__(self, "ids", np.asarray(self.ids, dtype=str))
        if self.goal is Goal.SINGLE:
            self._check_classes()

    def _check_classes(self) -> None:
        for part in ("truth", "prediction"):
            values = getattr(self, part)
            outside = (values < 0) | (values >= self.classes)
            if outside.any():
                place = outside.argmax()
                raise ValueError(f"{part} of image '{self.ids[place]}' must be 0 to {self.classes - 1}; got {values[place]}")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def sums(self) -> np.ndarray:
        """float64 (n, S): what the primary metric is computed from, once it is summed over images."""
        if self.goal is Goal.SEGMENTATION:
            return _array(self.confusion).reshape(len(self), -1).astype(np.float64)
        truth, prediction = _array(self.truth), _array(self.prediction)
        if self.goal is Goal.SINGLE:
            return np.stack([truth == prediction, np.ones(len(self))], axis=1).astype(np.float64)
        if self.goal is Goal.MULTI:
            true, said = truth > 0, prediction > THRESHOLD
            return np.stack([(true & said).sum(1), true.sum(1) + said.sum(1)], axis=1).astype(np.float64)
        centred = truth - truth.mean() if len(self) else truth  # so that large values of little variance lose no digits
        return np.stack([(truth - prediction) ** 2, centred**2, centred, np.ones(len(self))], axis=1).astype(np.float64)

    def from_sums(self, sums_RS: np.ndarray) -> np.ndarray:
        """The primary metric (R,) of sums over images; NaN where it is undefined (nothing positive, a constant truth)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.goal is Goal.SINGLE:
                return sums_RS[:, 0] / sums_RS[:, 1]
            if self.goal is Goal.MULTI:
                return 2 * sums_RS[:, 0] / sums_RS[:, 1]
            if self.goal is Goal.SEGMENTATION:
                return _mean_iou(sums_RS.reshape(-1, self.classes, self.classes))
            errors, squares, total, count = sums_RS.T
            spread = squares - total**2 / count
            return np.where(spread > 1e-12 * squares, 1 - errors / spread, np.nan)

    def primary(self, rows: np.ndarray | None = None) -> float:
        """The primary metric of all images, or of some of them, where a row may occur more than once."""
        sums_nS = self.sums if rows is None else self.sums[rows]
        return float(self.from_sums(sums_nS.sum(axis=0, keepdims=True))[0])

    def metrics(self, rows: np.ndarray | None = None) -> dict[str, float]:
        """All metrics of the goal, the primary one first; see `primary` for `rows`.

        SINGLE and SEGMENTATION (of pixels): accuracy, macro_f1, micro_f1 (the same number as accuracy, as each has one class),
        and of SEGMENTATION miou.  Means over classes go over those that occur in truth or prediction.  MULTI: micro_f1,
        macro_f1, and map, the mean average precision over classes with positives.  REGRESSION: r2, rmse.  NaN where a
        metric is undefined.
        """
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        if self.goal is Goal.SEGMENTATION:
            matrix = _array(self.confusion)[chosen].sum(axis=0, dtype=np.int64)
            return {"miou": self.primary(rows), **_of_confusion(matrix)}
        truth, prediction = _array(self.truth)[chosen], _array(self.prediction)[chosen]
        if self.goal is Goal.SINGLE:
            return _of_confusion(confusion_of(truth, prediction, self.classes))
        if self.goal is Goal.MULTI:
            true, said = truth > 0, prediction > THRESHOLD
            hits, both = (true & said).sum(0), true.sum(0) + said.sum(0)
            return {"micro_f1": self.primary(rows), "macro_f1": _macro_f1(hits, both), "map": mean_precision(true, prediction)}
        rmse = float(np.sqrt(np.mean((truth - prediction) ** 2))) if len(truth) else float("nan")
        return {"r2": self.primary(rows), "rmse": rmse}


def primary(goal: Goal) -> str:
    """Name of the metric that protocols choose by and reports show."""
    return PRIMARY[goal]


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of all images of several, as of the folds of a data set.

    Raises ValueError if there are none, they are of other tasks, or an image is in more than one.
    """
    if len({(o.goal, o.classes) for o in outcomes}) != 1:
        raise ValueError("outcomes can be joined if there are some, of one goal and one number of classes")
    ids = np.concatenate([o.ids for o in outcomes])
    if len(set(ids.tolist())) != len(ids):
        raise ValueError("an image is in more than one of the outcomes to be joined; folds must not overlap")
    joined = {
        part: np.concatenate([getattr(o, part) for o in outcomes])
        for part in ("truth", "prediction", "confusion")
        if getattr(outcomes[0], part) is not None
    }
    return Outcome(outcomes[0].goal, outcomes[0].classes, ids, **joined)


def confusion_of(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """int64 (K, K): counts by truth (rows) and prediction (columns), of any shape; a truth below 0 counts for nothing."""
    known = truth >= 0
    places = truth[known].astype(np.int64) * classes + prediction[known].astype(np.int64)
    return np.bincount(places.ravel(), minlength=classes**2).reshape(classes, classes)


def mean_precision(true_nK: np.ndarray, scores_nK: np.ndarray) -> float:
    """Mean of the average precision over classes with positives, NaN if no class has one."""
    from sklearn.metrics import average_precision_score

    present = np.flatnonzero(true_nK.any(axis=0))
    values = [average_precision_score(true_nK[:, c], scores_nK[:, c]) for c in present]
    return float(np.mean(values)) if values else float("nan")


def _array(values: np.ndarray | None) -> np.ndarray:
    assert values is not None  # checked when the outcome was made
    return values


def _of_confusion(matrix_KK: np.ndarray) -> dict[str, float]:
    hits, both = np.diag(matrix_KK), matrix_KK.sum(0) + matrix_KK.sum(1)
    total = matrix_KK.sum()
    accuracy = float(hits.sum() / total) if total else float("nan")
    return {"accuracy": accuracy, "macro_f1": _macro_f1(hits, both), "micro_f1": accuracy}


def _macro_f1(hits_K: np.ndarray, both_K: np.ndarray) -> float:
    """Mean of 2 TP / (2 TP + FP + FN) over classes that occur; `both` is positives of the truth plus of the prediction."""
    occurs = both_K > 0
    return float(np.mean(2 * hits_K[occurs] / both_K[occurs])) if occurs.any() else float("nan")


def _mean_iou(matrix_RKK: np.ndarray) -> np.ndarray:
    """(R,): TP / (TP + FP + FN), mean over the classes that occur."""
    hits_RK = np.diagonal(matrix_RKK, axis1=1, axis2=2)
    union_RK = matrix_RKK.sum(1) + matrix_RKK.sum(2) - hits_RK
    occurs_RK = union_RK > 0
    iou_RK = np.divide(hits_RK, union_RK, out=np.zeros_like(hits_RK), where=occurs_RK)
    return iou_RK.sum(1) / occurs_RK.sum(1)
