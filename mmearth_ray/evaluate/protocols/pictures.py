"""Images and labels of some rows of a data set: in memory where they are needed again and fit; turned at random.

Shapes: b images of a batch, C bands, H x W pixels.
"""

import numpy as np
import torch

from mmearth_ray.evaluate.datasets.task import Goal, Task

MOST_BYTES = 2 * 1024**3
"""Images of a split of more bytes are read from disk for every batch."""
BLOCK = 256  # images read at a time


class Pictures:
    """Stored values and labels of rows of a data set, by their places among the rows.

    Without `keep` nothing is held: images and labels are read each time that they are asked for.
    """

    def __init__(self, task: Task, rows: np.ndarray, *, keep: bool = True) -> None:
        self.task, self.rows, info = task, np.asarray(rows), task.info
        size = len(rows) * len(info.bands) * info.height * info.width * np.dtype(info.dtype).itemsize
        self.images: np.ndarray | None = None
        if keep and size <= MOST_BYTES:
            self.images = np.empty((len(rows), len(info.bands), info.height, info.width), info.dtype)
            for start in range(0, len(rows), BLOCK):
                self.images[start : start + BLOCK] = task.images(rows[start : start + BLOCK])
        self._labels = task.labels(rows) if keep else None

    @property
    def labels(self) -> np.ndarray:
        """Of all the rows."""
        return self.task.labels(self.rows) if self._labels is None else self._labels

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (b, C, H, W) and labels (b, ...) at places; copies."""
        images = self.task.images(self.rows[places]) if self.images is None else self.images[places]
        return images, self.task.labels(self.rows[places]) if self._labels is None else self._labels[places]


def turned(
    images_bCHW: np.ndarray, labels: np.ndarray, goal: Goal, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Each image, with its mask where labels are masks, flipped and turned by quarters at random.

    All eight ways are alike likely; images that are not square are only flipped, in four ways.
    """
    height, width = images_bCHW.shape[2:]
    step = 1 if height == width else 2
    draws = torch.randint(8 // step, (len(images_bCHW),), generator=generator).tolist()
    images, masks = np.empty_like(images_bCHW), labels.copy()
    for place, draw in enumerate(draws):
        quarters, flip = step * (draw // 2), draw % 2 == 1
        images[place] = _turn(images_bCHW[place], quarters, flip)
        if goal is Goal.SEGMENTATION:
            masks[place] = _turn(labels[place], quarters, flip)
    return images, masks


def _turn(map_HW: np.ndarray, quarters: int, flip: bool) -> np.ndarray:
    """Of an array (..., H, W)."""
    map_HW = np.rot90(map_HW, quarters, axes=(-2, -1))
    return map_HW[..., ::-1] if flip else map_HW
