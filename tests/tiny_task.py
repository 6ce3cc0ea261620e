"""A small labelled data set that can be learnt: the class shifts the means of the bands.

Shapes: N images, C bands, H x W pixels, K classes.
"""

from pathlib import Path

import numpy as np

from mmearth_ray.evaluate.datasets.task import SPLITS, Goal, Task, TaskInfo, load_task
from mmearth_ray.evaluate.datasets.writing import Block, write_task
from mmearth_ray.modalities import DEFAULT_INPUT, get

BANDS = get(DEFAULT_INPUT).default_bands().bands


def tiny_task(
    folder: Path, goal: Goal = Goal.SINGLE, images: int = 60, size: int = 16, classes: int = 3, folds: int = 0, seed: int = 0
) -> Task:
    """Images of Sentinel-2's 12 default bands (l2a): of five in turn, three are train, one is valid, one is test.

    SINGLE: image i // 5 % K is its class, which raises its own bands.  MULTI: each class raises its own bands by itself.
    REGRESSION: the value raises all bands.  SEGMENTATION: the left part of an image is of one class, the right of another; the
    corner pixel counts for nothing.
    """
    rng, shape = np.random.default_rng([seed, 7]), (images, len(BANDS), size, size)
    own_KC = np.stack([np.arange(len(BANDS)) % classes == k for k in range(classes)]).astype(np.float64)
    labels, raised = _DRAWN[goal](rng, images, size, own_KC)
    pixels_NCHW = 1500 + 800 * np.broadcast_to(raised, shape) + rng.normal(0, 150, shape)
    splits = [(SPLITS[0], SPLITS[0], SPLITS[0], SPLITS[1], SPLITS[2])[i % 5] for i in range(images)]
    names = ("height",) if goal is Goal.REGRESSION else tuple(f"class {k}" for k in range(classes))
    info = TaskInfo(
        name=f"tiny-{goal}", goal=goal, classes=names,
        bands=BANDS, product="l2a", dtype="uint16", height=size, width=size, missing=(0,), folds=folds, origin={"kind": "tiny"},
    )  # fmt: skip
    block = Block(
        ids=[f"image-{i:03d}" for i in range(images)], splits=[""] * images if folds else splits,
        folds=np.arange(images) // 5 % folds if folds else np.full(images, -1), labels=labels,
        pixels_NCHW=pixels_NCHW.clip(1, 65535).astype(np.uint16),
    )  # fmt: skip
    write_task(folder, info, [block])
    return load_task(folder)


def _single(rng: np.random.Generator, images: int, size: int, own_KC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(images) // 5 % len(own_KC)
    return labels, own_KC[labels][:, :, None, None]


def _multi(rng: np.random.Generator, images: int, size: int, own_KC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, 2, (images, len(own_KC)))
    return labels, (labels @ own_KC)[:, :, None, None]


def _value(rng: np.random.Generator, images: int, size: int, own_KC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.uniform(0, 2, images)
    return labels * 10, labels[:, None, None, None]


def _mask(rng: np.random.Generator, images: int, size: int, own_KC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.arange(images) % len(own_KC), (np.arange(images) // 5 + 1) % len(own_KC)
    border = rng.integers(size // 4, size - size // 4, images)
    is_left = np.arange(size)[None, :] < border[:, None]
    labels = np.repeat(np.where(is_left, left[:, None], right[:, None])[:, None, :], size, axis=1)
    raised = own_KC[labels].transpose(0, 3, 1, 2)
    labels[:, 0, 0] = -1
    return labels, raised


_DRAWN = {Goal.SINGLE: _single, Goal.MULTI: _multi, Goal.REGRESSION: _value, Goal.SEGMENTATION: _mask}
