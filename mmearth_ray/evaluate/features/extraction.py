"""What an encoder says of images: a vector of each, or, where every pixel has a class, a map of vectors.

Shapes: n images, C bands, H x W pixels, h x w cells of the last map, D features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.task import Goal, Task
from mmearth_ray.evaluate.features.encoders import CELL, ImageEncoder, Subject, build
from mmearth_ray.evaluate.features.feeding import Feed, Preparation

Extract = Callable[[np.ndarray], np.ndarray]
"""Stored values (n, C, H, W) -> float32 (n, D), or (n, h, w, D) where maps are asked for."""


def extractor(subject: Subject, feed: Feed, goal: Goal, device: torch.device) -> Extract:
    """The function that turns images into features of a goal."""
    maps = goal is Goal.SEGMENTATION
    if subject.kind != "statistics":
        return _encoder(subject, feed, device, maps)
    return _cell_means(feed) if maps else lambda pixels_NCHW: band_statistics(pixels_NCHW, feed)


def band_statistics(pixels_NCHW: np.ndarray, feed: Feed) -> np.ndarray:
    """float32 (n, 2 C): means of the bands, then their standard deviations, in pretraining's units, over valid pixels.

    Bands are in the order of the feed; one without any valid pixel has a mean and a deviation of 0.
    """
    pixels_NCHW = pixels_NCHW[:, [place for place in feed.places if place is not None]]
    valid_NCHW = np.isfinite(pixels_NCHW)
    for value in feed.missing:
        valid_NCHW &= pixels_NCHW != value
    values_NCHW = np.where(valid_NCHW, pixels_NCHW, 0).astype(np.float64) * feed.scale
    count_NC = np.maximum(valid_NCHW.sum((2, 3)), 1)
    mean_NC = values_NCHW.sum((2, 3)) / count_NC
    squares_NCHW = np.where(valid_NCHW, values_NCHW - mean_NC[:, :, None, None], 0) ** 2
    return np.concatenate([mean_NC, np.sqrt(squares_NCHW.sum((2, 3)) / count_NC)], axis=1).astype(np.float32)


def _cell_means(feed: Feed) -> Extract:
    """Normalised bands, averaged over cells of `CELL` pixels."""
    prepare = Preparation(feed, CELL)

    def extract(pixels_NCHW: np.ndarray) -> np.ndarray:
        return _channels_last(functional.avg_pool2d(prepare(torch.from_numpy(pixels_NCHW)), CELL))

    return extract


def _encoder(subject: Subject, feed: Feed, device: torch.device, maps: bool) -> Extract:
    module, prepare = build(subject).to(device), Preparation(feed, subject.patch).to(device)
    encoder = cast(ImageEncoder, module)

    def extract(pixels_NCHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            image_NCHW = prepare(torch.from_numpy(pixels_NCHW).to(device))
            return _channels_last(encoder.forward_features(image_NCHW)) if maps else encoder(image_NCHW).float().cpu().numpy()

    return extract


def _channels_last(maps_NDHW: Tensor) -> np.ndarray:
    return maps_NDHW.permute(0, 2, 3, 1).float().cpu().numpy()


def features_of(
    task: Task, rows: range, extract: Extract, name: str, *, batch: int, dtype: str, clock: Callable[[], float]
) -> tuple[np.ndarray, float]:
    """Features of images, (n, ...) of that dtype, and the seconds on that clock that they took, reading not counted.

    Raises DataError, naming encoder, image and split, for features that are not finite, or not in that dtype.
    """
    found, seconds = [], 0.0
    for start in range(rows.start, rows.stop, batch):
        some = range(start, min(start + batch, rows.stop))
        pixels_NCHW = task.images(some)
        began = clock()
        values = extract(pixels_NCHW)
        seconds += clock() - began
        with np.errstate(over="ignore"):
            stored = values.astype(dtype)
        good_N = np.isfinite(stored).reshape(len(stored), -1).all(1)
        if not good_N.all():
            place = int(np.flatnonzero(~good_N)[0])
            _refuse(task, some[place], name, bool(np.isfinite(values[place]).all()), dtype)
        found.append(stored)
    return np.concatenate(found), seconds


def _refuse(task: Task, row: int, name: str, finite: bool, dtype: str) -> None:
    where = f"fold {task.fold[row]}" if task.info.folds else f"split '{task.split[row]}'"
    wrong = f"too large for {dtype}" if finite else "not finite"
    raise DataError(
        f"encoder '{name}' gives features of image {task.ids[row]} ({task.info.name}, {where}) that are {wrong}; look at the "
        "encoder's weights and at the image"
    )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """So many threads for PyTorch's operations in this process, and what there was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
