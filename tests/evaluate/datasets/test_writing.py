"""Labelled data sets as they are written: every value comes back, statistics are numpy's, and what cannot be is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import IMAGES, TASK, Goal, TaskInfo, load_task
from mmearth_ray.evaluate.datasets.writing import FOLDED, ROW_GROUP, Block, write_task

IMAGES_N, SIZE = 37, 6
SPLITS = ["train", "train", "valid", "test"]
LABELS: dict[Goal, Any] = {
    Goal.SINGLE: np.arange(IMAGES_N) % 3,
    Goal.MULTI: np.random.default_rng(0).integers(0, 2, (IMAGES_N, 3)),
    Goal.REGRESSION: np.random.default_rng(1).normal(size=IMAGES_N),
    Goal.SEGMENTATION: np.random.default_rng(2).integers(-1, 3, (IMAGES_N, SIZE, SIZE)),
}


def info(goal: Goal = Goal.SINGLE, **changed: Any) -> TaskInfo:
    classes = ("height",) if goal is Goal.REGRESSION else ("a", "b", "c")
    values: dict[str, Any] = {
        "name": "t", "goal": goal, "classes": classes, "bands": ("B4", "B8A", "sentinel1.asc_VV", "other.x"), "product": "l2a",
        "dtype": "int16", "height": SIZE, "width": SIZE, "missing": (0,),
    }  # fmt: skip
    return TaskInfo(**values | changed)


def block(goal: Goal = Goal.SINGLE, rows: slice = slice(None), folds: int = 0, dtype: str = "int16") -> Block:
    """Some of the images; band 3 has no valid value."""
    pixels = np.random.default_rng(3).integers(-3, 90, (IMAGES_N, 4, SIZE, SIZE)).astype(dtype)
    pixels[:, 3] = 0
    fold, ids = np.arange(IMAGES_N) % folds if folds else np.full(IMAGES_N, -1), [f"i{n}" for n in range(IMAGES_N)]
    splits = [""] * IMAGES_N if folds else [SPLITS[n % 4] for n in range(IMAGES_N)]
    return Block(ids[rows], splits[rows], fold[rows], LABELS[goal][rows], pixels[rows])


@pytest.mark.parametrize("goal", list(Goal))
def test_every_value_comes_back_in_any_order_and_from_blocks_of_any_size(goal: Goal, tmp_path: Path) -> None:
    parts = [block(goal, rows) for rows in (slice(0, 5), slice(5, 5), slice(5, 30), slice(30, None))]
    written = write_task(tmp_path / "t", info(goal), iter(parts))
    task, whole = load_task(tmp_path / "t"), block(goal)
    assert task.info == written
    assert (task.ids.tolist(), task.split.tolist()) == (whole.ids, whole.splits)
    assert task.row_groups.tolist() == [ROW_GROUP, ROW_GROUP, IMAGES_N - 2 * ROW_GROUP]
    for order in ([36, 0, 17, 17, 3], [], np.random.default_rng(4).permutation(IMAGES_N)):
        order = np.asarray(order, np.int64)
        images, labels = task.images(order), task.labels(order)
        assert images.dtype == np.int16
        np.testing.assert_array_equal(images, whole.pixels_NCHW[order])
        np.testing.assert_array_equal(labels, np.asarray(whole.labels)[order])
    assert task.labels([0]).dtype == {Goal.SINGLE: "int64", Goal.MULTI: "uint8", Goal.REGRESSION: "float64"}.get(goal, "int16")
    assert written.counts == {"train": 19, "valid": 9, "test": 9}


@pytest.mark.parametrize("folds", [0, 5])
def test_statistics_are_numpys_over_valid_values_of_the_training_split_or_of_all_folds(folds: int, tmp_path: Path) -> None:
    parts = [block(rows=slice(start, start + 7), folds=folds) for start in range(0, IMAGES_N, 7)]
    written = write_task(tmp_path / "t", info(folds=folds), parts)
    rows = [n for n in range(IMAGES_N) if folds or SPLITS[n % 4] == "train"]
    for band in range(3):
        values = block().pixels_NCHW[rows, band].astype(np.float64)
        values = values[values != 0]
        assert written.mean[band] == pytest.approx(values.mean(), rel=1e-12)
        assert written.std[band] == pytest.approx(values.std(), rel=1e-12)
    assert (written.mean[3], written.std[3]) == (None, None)
    assert (FOLDED in written.notes) == bool(folds)
    if folds:
        assert written.counts == {"fold 0": 8, "fold 1": 8, "fold 2": 7, "fold 3": 7, "fold 4": 7}


def test_values_that_are_not_finite_are_missing(tmp_path: Path) -> None:
    whole = block(dtype="float32")
    whole.pixels_NCHW[::2, 0] = np.nan
    whole.pixels_NCHW[1, 0, 0, 0] = np.inf
    written = write_task(tmp_path / "t", info(dtype="float32"), [whole])
    train = whole.pixels_NCHW[[n for n in range(IMAGES_N) if SPLITS[n % 4] == "train"], 0]
    assert written.mean[0] == pytest.approx(train[np.isfinite(train) & (train != 0)].astype(np.float64).mean(), rel=1e-12)
    np.testing.assert_array_equal(load_task(tmp_path / "t").images(range(IMAGES_N)), whole.pixels_NCHW)


def test_the_digest_tells_any_change_and_nothing_else(tmp_path: Path) -> None:
    first, other = (write_task(tmp_path / name, info(), [block()]).digest for name in ("a", "b"))
    assert first == other
    changed = block()
    changed.pixels_NCHW[5, 1, 2, 3] += 1
    assert write_task(tmp_path / "c", info(), [changed]).digest != first
    assert write_task(tmp_path / "d", info(scale=2.0), [block()]).digest != first
    assert write_task(tmp_path / "e", info(), [replace(block(), labels=(LABELS[Goal.SINGLE] + 1) % 3)]).digest != first


def test_images_that_are_the_same_in_two_splits_are_counted(tmp_path: Path) -> None:
    whole = block()
    whole.pixels_NCHW[3] = whole.pixels_NCHW[0]  # test and train
    whole.pixels_NCHW[4] = whole.pixels_NCHW[1]  # both train
    assert "1 image is pixel for pixel the same as one of another split." in write_task(tmp_path / "t", info(), [whole]).notes


def test_columns_are_fixed_bytes_of_a_page_per_row_group(tmp_path: Path) -> None:
    write_task(tmp_path / "t", info(), [block()])
    with pq.ParquetFile(tmp_path / "t" / IMAGES) as file:
        column = file.metadata.row_group(0).column(5)
        assert (column.physical_type, column.compression) == ("FIXED_LEN_BYTE_ARRAY", "LZ4")
        assert file.schema_arrow.names == [
            "id",
            "split",
            "fold",
            "label",
            "band.B4",
            "band.B8A",
            "band.sentinel1.asc_VV",
            "band.other.x",
        ]


def edited(**changed: Any) -> Block:
    return replace(block(), **changed)


def with_label(goal: Goal, place: Any, value: Any) -> Block:
    labels = LABELS[goal].copy()
    labels[place] = value
    return replace(block(goal), labels=labels)


BAD = {
    "twice": (info(), edited(ids=["i0", "i1"] + ["i1"] * (IMAGES_N - 2)), "two images have the id i1"),
    "nameless": (info(), edited(ids=["i0", ""] + ["i1"] * (IMAGES_N - 2)), "image 2 has no id"),
    "split": (info(), edited(splits=["train", "val"] + ["test"] * (IMAGES_N - 2)), "image i1 is in split 'val'"),
    "no test": (info(), edited(splits=["train", "valid"] * 18 + ["train"]), "no image in split 'test'"),
    "no train": (info(), edited(splits=["valid", "test"] * 18 + ["test"]), "no image in split 'train'"),
    "a fold": (info(), block(folds=3), "is in split ''"),
    "fold": (info(folds=3), block(folds=4), "image i3 is in split '' and fold 3"),
    "empty fold": (info(folds=4), block(folds=3), "no image in fold 3"),
    "one fold": (info(folds=1), block(folds=1), "1 folds"),
    "class": (info(), with_label(Goal.SINGLE, 7, 3), "label of image i7 is 3"),
    "negative": (info(), with_label(Goal.SINGLE, 7, -1), "label of image i7 is -1"),
    "fraction": (info(), edited(labels=np.full(IMAGES_N, 0.5)), "not whole numbers"),
    "many": (info(Goal.MULTI), with_label(Goal.MULTI, (9, 1), 2), "label of image i9 is "),
    "wide": (info(Goal.MULTI), edited(labels=np.zeros((IMAGES_N, 4), int)), r"not whole numbers \(37, 3\)"),
    "nan": (info(Goal.REGRESSION), with_label(Goal.REGRESSION, 4, np.nan), "label of image i4 is nan; it must be a finite"),
    "code": (info(Goal.SEGMENTATION), with_label(Goal.SEGMENTATION, (6, 2, 2), 3), "mask of image i6 holds 3"),
    "mask": (info(Goal.SEGMENTATION), edited(labels=np.zeros((IMAGES_N, 5, 6), int)), "not whole numbers"),
    "size": (info(height=7), block(), "not int16"),
    "dtype": (info(dtype="uint16"), block(), "not uint16"),
    "one class": (info(classes=("a",)), block(), "has 1 classes"),
    "same class": (info(classes=("a", "b", "a")), block(), "twice"),
    "no band": (info(bands=()), block(), "has no band"),
    "band": (info(bands=("B4", "B8A", "red", "other.x")), block(), "has a band 'red'"),
    "band of a row": (info(bands=("B4", "B8A", "sentinel1.VV", "other.x")), block(), "has a band 'sentinel1.VV'"),
    "product": (info(product="l3"), block(), "product l3"),
    "bytes": (info(dtype="int64"), block(), "holds int64"),
    "scale": (info(scale=0.0), block(), "has scale 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_labelled_data_set_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    told, given, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        write_task(tmp_path / "t", told, [given])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="t has no image"):
        write_task(tmp_path / "t", info(), [])


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    before = write_task(tmp_path / "t", info(), [block()])
    with pytest.raises(DataError, match="two images"):
        write_task(tmp_path / "t", info(), [block(), block()])
    assert load_task(tmp_path / "t").info == before
    after = write_task(tmp_path / "t", info(name="new"), [block()])
    assert load_task(tmp_path / "t").info == after
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_anything_else_in_the_way_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / TASK).write_text("{}")
    (tmp_path / "full" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "full")
    for out in (tmp_path / "full", tmp_path / "file", Path(), Path("/")):
        with pytest.raises(UsageError, match=r"name another folder|is no folder"):
            write_task(out, info(), [block()])
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years"
    with pytest.raises(DataError, match="cannot write"):
        write_task(tmp_path / "file" / "t", info(), [block()])
    (tmp_path / "empty").mkdir()
    write_task(tmp_path / "empty", info(), [block()])
