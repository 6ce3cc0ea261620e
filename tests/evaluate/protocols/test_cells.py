"""Segmentation from maps of features: a cell has the most frequent class of its pixels, and every pixel is tested."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_task import tiny_task

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.task import Goal, Task
from mmearth_ray.evaluate.protocols.cells import Grids, majority, run_cells, sampled_cells, spread
from mmearth_ray.evaluate.protocols.frozen import fit_knn
from mmearth_ray.evaluate.protocols.logistic import fit_logistic
from mmearth_ray.evaluate.protocols.metrics import confusion_of
from mmearth_ray.evaluate.protocols.probe import fit_probe
from mmearth_ray.evaluate.protocols.splits import rounds

CELL, K = 4, 3
FITS = {
    "knn": partial(fit_knn, goal=Goal.SEGMENTATION, classes=K),
    "logistic": partial(fit_logistic, goal=Goal.SEGMENTATION, classes=K),
    "probe": partial(fit_probe, goal=Goal.SEGMENTATION, classes=K, steps=60),
}


def means(task: Task) -> Grids:
    """Means of the bands over cells, of images whose sides need not be multiples of them."""

    def grids(rows: np.ndarray) -> np.ndarray:
        images = task.images(rows).astype(np.float32)
        reflected = np.pad(np.arange(images.shape[-1]), (0, -images.shape[-1] % CELL), mode="reflect")
        images = images[:, :, reflected][..., reflected]
        n, c, h, w = images.shape
        return images.reshape(n, c, h // CELL, CELL, w // CELL, CELL).mean(axis=(3, 5)).transpose(0, 2, 3, 1).astype(np.float16)

    return grids


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [16, 18])
def test_every_protocol_segments_images_of_any_side(tmp_path: Path, fit: str, size: int) -> None:
    task = tiny_task(tmp_path / "task", Goal.SEGMENTATION, images=40, size=size)
    (found,) = rounds(task)
    outcome, chosen = run_cells(FITS[fit], means(task), CELL, task, found)
    assert outcome.primary() > 0.6
    assert outcome.confusion is not None
    truth = task.labels(found.test)
    assert outcome.confusion.sum(axis=(1, 2)).tolist() == (truth >= 0).sum(axis=(1, 2)).tolist()
    assert np.array_equal(outcome.confusion.sum(axis=2), [np.bincount(t[t >= 0], minlength=K) for t in truth])
    side = -(-size // CELL)
    assert chosen["train_cells"] == len(found.train) * side**2


def test_a_cells_class_is_that_of_most_of_its_labelled_pixels() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(-1, K, (3, 10, 7))
    truth[0, :4, :4] = -1
    cells = majority(truth, CELL, (3, 2), K)
    for n in range(3):
        for i in range(3):
            for j in range(2):
                part = truth[n, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                known = part[part >= 0]
                assert cells[n, i, j] == (np.bincount(known, minlength=K).argmax() if len(known) else -1)
    assert cells[0, 0, 0] == -1
    pixels = spread(cells, CELL, (10, 7))
    assert pixels.shape == (3, 10, 7)
    assert all(pixels[1, i, j] == cells[1, i // 4, j // 4] for i in range(10) for j in range(7))
    with pytest.raises(ValueError, match="do not cover"):
        spread(cells, CELL, (13, 7))
    with pytest.raises(ValueError, match="do not cover"):
        majority(truth, CELL, (2, 2), K)


def test_many_cells_are_thinned_by_the_seed_and_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task(tmp_path / "task", Goal.SEGMENTATION, images=20)
    draw = partial(sampled_cells, means(task), CELL, task, np.arange(20), "train", encoder="", most=50)
    features, classes = draw(seed=0)
    assert features.shape == (50, 12)
    assert set(classes) == set(range(K))
    again, other = draw(seed=0), draw(seed=1)
    assert np.array_equal(features, again[0])
    assert not np.array_equal(features, other[0])
    monkeypatch.setattr("mmearth_ray.evaluate.protocols.cells.BLOCK", 3)
    assert np.array_equal(features, draw(seed=0)[0])


def test_maps_that_are_not_finite_are_refused_and_so_are_masks_without_labels(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task", Goal.SEGMENTATION, images=10)
    (found,) = rounds(task)

    def broken(rows: np.ndarray) -> np.ndarray:
        maps = means(task)(rows)
        maps[rows == found.test[0], 1, 2, 3] = np.nan
        return maps

    with pytest.raises(DataError, match=f"'E' for image '{task.ids[found.test[0]]}' of the test split"):
        run_cells(FITS["knn"], broken, CELL, task, found, encoder="E")
    object.__setattr__(task, "labels", lambda rows: np.full((len(rows), 16, 16), -1))
    with pytest.raises(DataError, match="no pixel of the train images"):
        run_cells(FITS["knn"], means(task), CELL, task, found)


def test_confusion_is_exact_where_cells_hold_one_class(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task", Goal.SEGMENTATION, images=10)
    truth = np.repeat(np.repeat(np.random.default_rng(0).integers(0, K, (10, 4, 4)), CELL, 1), CELL, 2)
    object.__setattr__(task, "labels", lambda rows: truth[np.asarray(rows)])
    grids = lambda rows: np.eye(K)[truth[rows][:, ::CELL, ::CELL]]  # noqa: E731
    outcome, _ = run_cells(FITS["logistic"], grids, CELL, task, rounds(task)[0])
    assert outcome.metrics() == {"accuracy": 1.0, "macro_f1": 1.0, "micro_f1": 1.0, "miou": 1.0}
    assert outcome.confusion is not None
    assert np.array_equal(outcome.confusion[0], confusion_of(truth[rounds(task)[0].test[0]], truth[rounds(task)[0].test[0]], K))
