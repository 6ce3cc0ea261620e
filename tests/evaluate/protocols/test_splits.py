"""Rounds cover the data, and subsets are nested, stratified and of exactly the size that is asked for."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny_task import tiny_task

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal, Task
from mmearth_ray.evaluate.protocols.splits import Round, absent_classes, interleave, rounds, subset

FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.77, 1.0)


def with_labels(task: Task, labels: np.ndarray, **info: object) -> Task:
    """The same images with labels of one's own."""
    found = replace(task, info=replace(task.info, **info), ids=np.arange(len(labels)).astype(str).astype(object))  # type: ignore[arg-type]
    found.__dict__["_labels"] = labels  # what the property has read
    return found


@pytest.mark.parametrize("goal", list(Goal))
def test_subsets_are_nested_exact_and_decided_by_the_seed(tmp_path: Path, goal: Goal) -> None:
    task = tiny_task(tmp_path / "task", goal, images=110)
    rows = task.rows("train")
    for seed in (0, 1):
        found = [subset(task, rows, fraction, seed) for fraction in FRACTIONS]
        assert [len(part) for part in found] == [max(1, round(fraction * len(rows))) for fraction in FRACTIONS]
        for smaller, larger in pairwise(found):
            assert set(smaller) <= set(larger)
        assert np.array_equal(found[-1], rows)
        assert all((np.diff(part) > 0).all() for part in found)
    assert np.array_equal(subset(task, rows, 0.25, 3), subset(task, rows, 0.25, 3))
    assert not np.array_equal(subset(task, rows, 0.25, 0), subset(task, rows, 0.25, 1))


def test_every_prefix_has_every_class_by_its_share_rounded_down_or_up() -> None:
    rng = np.random.default_rng(0)
    for sizes in ((50, 50, 50), (97, 11, 5, 1), (1, 1, 1, 1), (7,), tuple(rng.integers(1, 60, 17).tolist())):
        labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        for seed in range(5):
            order = interleave(labels, np.random.default_rng(seed))
            assert np.array_equal(np.sort(order), np.arange(len(labels)))
            counts = np.cumsum(labels[order][:, None] == np.arange(len(sizes)), axis=0)
            shares = np.arange(1, len(labels) + 1)[:, None] * np.array(sizes) / len(labels)
            assert (counts >= np.floor(shares - 1e-9)).all()
            assert (counts <= np.ceil(shares + 1e-9)).all()


def test_images_of_a_class_are_drawn_at_random(tmp_path: Path) -> None:
    task = with_labels(tiny_task(tmp_path / "task"), np.repeat(np.arange(3), 40))
    rows, hits = np.arange(120), np.zeros(120)
    for seed in range(200):
        hits[subset(task, rows, 0.1, seed)] += 1
    assert hits.min() >= 5
    assert hits.max() <= 40


def test_a_regressions_subset_has_low_and_high_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    task = with_labels(tiny_task(tmp_path / "task", Goal.REGRESSION), rng.exponential(5, 200))
    for seed in range(10):
        ranks = np.argsort(np.argsort(task.labels(np.arange(200))))[subset(task, np.arange(200), 0.05, seed)]
        assert len(set((ranks // 20).tolist())) == 10


def test_classes_that_are_absent_at_one_per_cent_are_named(tmp_path: Path) -> None:
    task = with_labels(tiny_task(tmp_path / "task"), np.repeat([0, 1, 2], [180, 15, 5]))
    few = subset(task, np.arange(200), 0.01, 0)
    assert len(few) == 2
    assert absent_classes(task, few) == ("class 1", "class 2")
    assert absent_classes(task, np.arange(200)) == ()
    several = tiny_task(tmp_path / "several", Goal.MULTI)
    labels = several.labels(np.arange(60))
    assert absent_classes(several, np.flatnonzero(labels[:, 1] == 0)) == ("class 1",)
    masks = tiny_task(tmp_path / "masks", Goal.SEGMENTATION)
    one = [row for row in range(60) if set(np.unique(masks.labels([row]))) == {-1, 0}]
    assert absent_classes(masks, np.array(one)) == ("class 1", "class 2")
    assert absent_classes(tiny_task(tmp_path / "values", Goal.REGRESSION), np.arange(3)) == ()


def disjoint(found: Round) -> bool:
    return not (set(found.train) & set(found.valid) or set(found.train) & set(found.test) or set(found.valid) & set(found.test))


def test_a_round_of_splits_is_the_splits(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task")
    (found,) = rounds(task)
    assert all(np.array_equal(getattr(found, split), task.rows(split)) for split in ("train", "valid", "test"))


def test_without_a_validation_split_a_fifth_of_training_chooses(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task", images=100)
    task = replace(task, split=np.where(task.split == "valid", "train", task.split))
    (found,) = rounds(task, seed=1)
    assert len(found.valid) == 16
    assert disjoint(found)
    assert np.array_equal(np.sort(np.concatenate([found.train, found.valid])), task.rows("train"))
    assert np.bincount(task.labels(found.valid)).max() <= 6
    assert not np.array_equal(found.valid, rounds(task, seed=2)[0].valid)
    few = replace(task, split=np.array(["train", "test", *["none"] * 98], dtype=object))
    with pytest.raises(DataError, match="at least 2"):
        rounds(few)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_every_image_is_tested_once_over_the_folds(tmp_path: Path, folds: int) -> None:
    task = tiny_task(tmp_path / "task", folds=folds)
    found = rounds(task)
    assert len(found) == folds
    assert np.array_equal(np.sort(np.concatenate([r.test for r in found])), np.arange(len(task)))
    for number, part in enumerate(found):
        assert disjoint(part)
        assert len(part.train) + len(part.valid) + len(part.test) == len(task)
        assert set(task.fold[part.test]) == {number}
        if folds > 2:
            assert set(task.fold[part.valid]) == {(number + 1) % folds}


def test_what_is_empty_is_named(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task")
    for split in ("train", "test"):
        with pytest.raises(DataError, match=f"the {split} split is empty"):
            rounds(replace(task, split=np.where(task.split == split, "none", task.split)))
    folded = tiny_task(tmp_path / "folded", folds=4)
    with pytest.raises(DataError, match="fold 2 of 4 is empty"):
        rounds(replace(folded, fold=np.where(folded.fold == 2, 1, folded.fold)))
    with pytest.raises(DataError, match="has fold -1"):
        rounds(replace(folded, fold=np.where(folded.fold == 2, -1, folded.fold)))
    with pytest.raises(DataError, match="at least 2 folds"):
        rounds(replace(folded, info=replace(folded.info, folds=1)))
    with pytest.raises(DataError, match="no training images"):
        subset(task, np.zeros(0, int), 0.5, 0)
    for fraction in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(UsageError, match="fraction"):
            subset(task, np.arange(5), fraction, 0)
