"""Segmentation from frozen maps of features: every cell of a map is a sample, and its prediction that of all its pixels.

Shapes: n images, h x w cells of a map, H x W pixels, D features, K classes, M cells that are samples.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.task import Task
from mmearth_ray.evaluate.protocols.frozen import Fit, require_finite
from mmearth_ray.evaluate.protocols.metrics import Outcome, confusion_of
from mmearth_ray.evaluate.protocols.splits import Round

MOST_CELLS = 20_000
"""Training cells, and validation cells, at most: more of them are alike, as neighbours are, and cost time."""
BLOCK = 16  # images read at a time
STREAM = 7201  # tells this use of a seed from others

Grids: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Rows of a data set -> maps of features (n, h, w, D), whose cells start at the top left corner."""


def run_cells(
    fit: Fit, grids: Grids, cell: int, task: Task, rows: Round, *, encoder: str = "", seed: int = 0, most: int = MOST_CELLS
) -> tuple[Outcome, dict[str, Any]]:
    """Fit on cells of the training images, choose on cells of the validation images, predict the pixels of the test images.

    `cell`: pixels along its side.  `fit` is made for the goal SEGMENTATION, as `partial(fit_knn, goal=..., classes=...)`.
    Of training and of validation at most `most` cells are drawn by the seed.
    Raises DataError for features that are not finite, or where no pixel of training or validation is labelled.
    """
    samples = [
        sampled_cells(grids, cell, task, part, split, encoder=encoder, seed=seed, most=most)
        for split, part in (("train", rows.train), ("valid", rows.valid))
    ]
    fitted = fit(*samples[0], *samples[1])
    confusions, classes = [], len(task.info.classes)
    for found, map_nhwD, truth_nHW in _blocks(grids, task, rows.test):
        require_finite(map_nhwD, "test", encoder, task.ids[found])
        cells_nhw = fitted.predict(map_nhwD.reshape(-1, map_nhwD.shape[-1])).reshape(map_nhwD.shape[:3])
        said_nHW = spread(cells_nhw, cell, truth_nHW.shape[1:])
        confusions += [confusion_of(truth, said, classes) for truth, said in zip(truth_nHW, said_nHW, strict=True)]
    chosen = {**fitted.chosen, "train_cells": len(samples[0][0]), "valid_cells": len(samples[1][0])}
    return Outcome(task.info.goal, classes, task.ids[rows.test], confusion=np.stack(confusions)), chosen


def sampled_cells(
    grids: Grids, cell: int, task: Task, rows: np.ndarray, split: str, *, encoder: str, seed: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features (M, D) and classes (M,) of the labelled cells of images; a random part of them where there are more than `most`.

    Every labelled cell is given a random number, and the `most` least ones stay: memory holds no more than those.
    """
    rng = np.random.default_rng([seed, STREAM])
    features, classes, luck = np.zeros((0, 0), np.float32), np.zeros(0, np.int64), np.zeros(0)
    for found, map_nhwD, truth_nHW in _blocks(grids, task, rows):
        require_finite(map_nhwD, split, encoder, task.ids[found])
        label_nhw = majority(truth_nHW, cell, map_nhwD.shape[1:3], len(task.info.classes))
        drawn_nhw, known_nhw = rng.random(label_nhw.shape), label_nhw >= 0
        features = np.concatenate([features.reshape(-1, map_nhwD.shape[-1]), map_nhwD[known_nhw].astype(np.float32)])
        classes, luck = np.concatenate([classes, label_nhw[known_nhw]]), np.concatenate([luck, drawn_nhw[known_nhw]])
        if len(luck) > most:
            kept = np.sort(np.argsort(luck, kind="stable")[:most])
            features, classes, luck = features[kept], classes[kept], luck[kept]
    if not len(luck):
        raise DataError(f"{task.info.name}: no pixel of the {split} images has a label, a segmentation needs some")
    return features, classes


def majority(truth_nHW: np.ndarray, cell: int, grid: tuple[int, ...], classes: int) -> np.ndarray:
    """The most frequent class of the labelled pixels of each cell, of equals the first; -1 without any: int64 (n, h, w).

    Cells at the right and the bottom may reach beyond the image; raises ValueError unless they cover it.
    """
    images, height, width = truth_nHW.shape
    h, w = grid
    _require_cover(grid, cell, (height, width))
    padded = np.full((images, h * cell, w * cell), -1, np.int64)
    padded[:, :height, :width] = truth_nHW
    pixels_MP = padded.reshape(images, h, cell, w, cell).transpose(0, 1, 3, 2, 4).reshape(images * h * w, cell * cell)
    counts_MK = np.stack([(pixels_MP == c).sum(axis=1) for c in range(classes)], axis=1)
    label_M = np.where(counts_MK.any(axis=1), counts_MK.argmax(axis=1), -1)
    return label_M.reshape(images, h, w)


def spread(cells_nhw: np.ndarray, cell: int, size: tuple[int, ...]) -> np.ndarray:
    """What holds for cells, for their pixels: (n, H, W).  Raises ValueError unless the cells cover the image."""
    _require_cover(cells_nhw.shape[1:], cell, size)
    return cells_nhw.repeat(cell, axis=1).repeat(cell, axis=2)[:, : size[0], : size[1]]


def _require_cover(grid: tuple[int, ...], cell: int, size: tuple[int, ...]) -> None:
    if any(cells * cell < side for cells, side in zip(grid, size, strict=True)):
        raise ValueError(f"{grid} cells of {cell} pixels do not cover an image of {size}")


def _blocks(grids: Grids, task: Task, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, maps and masks of some images at a time."""
    for start in range(0, len(rows), BLOCK):
        found = rows[start : start + BLOCK]
        yield found, np.asarray(grids(found)), task.labels(found)
