"""Which images train, choose and test: rounds from splits or folds, and nested, stratified subsets of the training images.

Shapes: N images of a data set, n rows chosen of them, K classes.
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import SPLITS, Goal, Task

VALID_SHARE = 0.2
"""Share of the training images that choose (regularisation, learning rate) where a data set has no validation split."""
BINS = 10  # strata of a regression: tenths of the values
BLOCK = 64  # masks read at a time
SUBSET_STREAM, VALID_STREAM = 7101, 7102  # tell the uses of a seed apart


@dataclass(frozen=True, eq=False)
class Round:
    """Rows of a data set that train, that choose among settings, and that are tested: int64, without a row in common."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def rounds(task: Task, seed: int = 0) -> list[Round]:
    """One round of a data set with splits; of one with F folds a round per fold f: test f, validation f + 1, training the rest.

    Where there is no validation split, or only two folds, `VALID_SHARE` of the training images choose: stratified, by the seed.
    Raises DataError for an empty split or fold, and for one training image alone.
    """
    if task.info.folds:
        return _fold_rounds(task, seed)
    train, valid, test = (task.rows(split) for split in SPLITS)
    for split, rows in (("train", train), ("test", test)):
        if not len(rows):
            raise DataError(f"{task.info.name}: the {split} split is empty, an evaluation needs at least one image in it; "
                            "convert the data set with other shares")  # fmt: skip
    return [_with_valid(task, train, valid, test, seed)]


def _fold_rounds(task: Task, seed: int) -> list[Round]:
    folds, name = task.info.folds, task.info.name
    if folds < 2:
        raise DataError(f"{name}: cross-validation needs at least 2 folds; the data set has {folds}")
    outside = (task.fold < 0) | (task.fold >= folds)
    if outside.any():
        place = outside.argmax()
        raise DataError(f"{name}: image '{task.ids[place]}' has fold {task.fold[place]}, folds are 0 to {folds - 1}; "
                        "convert the data set again")  # fmt: skip
    rows = [np.flatnonzero(task.fold == f) for f in range(folds)]
    for number, found in enumerate(rows):
        if not len(found):
            raise DataError(f"{name}: fold {number} of {folds} is empty; convert the data set with fewer folds")
    found = []
    for f in range(folds):
        held = {f, (f + 1) % folds} if folds > 2 else {f}
        train = np.sort(np.concatenate([rows[g] for g in range(folds) if g not in held]))
        valid = rows[(f + 1) % folds] if folds > 2 else np.zeros(0, np.int64)
        found.append(_with_valid(task, train, valid, rows[f], seed))
    return found


def _with_valid(task: Task, train: np.ndarray, valid: np.ndarray, test: np.ndarray, seed: int) -> Round:
    """A round whose validation rows are taken from the training rows where there are none."""
    if len(valid):
        return Round(train, valid, test)
    if len(train) < 2:
        raise DataError(f"{task.info.name}: 1 training image and no validation split; an evaluation needs at least 2")
    order = _order(task, train, np.random.default_rng([seed, VALID_STREAM]))
    count = min(len(train) - 1, max(1, round(VALID_SHARE * len(train))))
    return Round(np.sort(train[order[count:]]), np.sort(train[order[:count]]), test)


def subset(task: Task, rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """max(1, round(fraction n)) of the rows, ascending: of one seed every smaller fraction is part of every larger one.

    Of SINGLE every class has its share of the images, rounded down or up (see `interleave`); of REGRESSION every tenth of the
    values; otherwise rows are drawn plainly.  A class of few images can be absent: see `absent_classes`.
    Raises UsageError unless 0 < fraction <= 1, DataError without rows.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"a fraction of labels must be above 0 and at most 1; got {fraction}")
    rows = np.asarray(rows, np.int64)
    if not len(rows):
        raise DataError(f"{task.info.name}: there are no training images to take a fraction of")
    count = max(1, round(fraction * len(rows)))
    order = _order(task, rows, np.random.default_rng([seed, SUBSET_STREAM]))
    return np.sort(rows[order[:count]])


def _order(task: Task, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order of rows of which every prefix is stratified, where the goal has strata: places (n,)."""
    if task.info.goal is Goal.SINGLE:
        return interleave(task.labels(rows), rng)
    if task.info.goal is Goal.REGRESSION:
        ranks = np.argsort(np.argsort(task.labels(rows), kind="stable"))
        return interleave(ranks * min(BINS, len(rows)) // len(rows), rng)
    return rng.permutation(len(rows))


def interleave(strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order, places (n,), of which every prefix is stratified: of its h rows every stratum of share s has s h of
    them, rounded down or up.

    The k-th row of a stratum may stand between the first prefix that rounds up to it and the first one that must hold it;
    taking the most urgent row first meets all of these bounds (Steiner and Yeomans 1993, Management Science 39(6)).
    Rows of a stratum, and strata equally urgent, come in a random order.
    """
    total = len(strata)
    queues = [rng.permutation(np.flatnonzero(strata == value)).tolist() for value in np.unique(strata)]
    luck = rng.random(len(queues))
    taken, ready = [0] * len(queues), []
    waiting = [(1, number) for number in range(len(queues))]  # (first prefix that may hold the stratum's next row, stratum)
    heapify(waiting)
    order = []
    for length in range(1, total + 1):
        while waiting and waiting[0][0] <= length:
            number = heappop(waiting)[1]
            due = -(-(taken[number] + 1) * total // len(queues[number]))
            heappush(ready, (due, luck[number], number))
        number = heappop(ready)[2]
        order.append(queues[number][taken[number]])
        taken[number] += 1
        if taken[number] < len(queues[number]):
            heappush(waiting, (taken[number] * total // len(queues[number]) + 1, number))
    return np.array(order, np.int64)


def absent_classes(task: Task, rows: np.ndarray) -> tuple[str, ...]:
    """Names of classes that no image of the rows has, hence that nothing trained on them can predict; none of a regression."""
    info, rows = task.info, np.asarray(rows, np.int64)
    if info.goal is Goal.REGRESSION:
        return ()
    seen = np.zeros(len(info.classes), bool)
    for start in range(0, len(rows), BLOCK):
        labels = task.labels(rows[start : start + BLOCK])
        found = np.nonzero(labels)[1] if info.goal is Goal.MULTI else labels[labels >= 0]
        seen[found] = True
    return tuple(name for name, present in zip(info.classes, seen, strict=True) if not present)
