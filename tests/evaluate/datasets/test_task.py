"""Labelled data sets as they are read: what is damaged, altered or of another form is told in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_task import tiny_task

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.task import IMAGES, TASK, Goal, is_identity, load_task


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x55
    path.write_bytes(data)


def test_splits_and_outputs(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "t")
    rows = {split: task.rows(split) for split in ("train", "valid", "test")}
    assert {split: len(r) for split, r in rows.items()} == {"train": 36, "valid": 12, "test": 12} == task.info.counts
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(60)) == list(range(len(task)))
    assert task.info.outputs == 3
    assert tiny_task(tmp_path / "r", Goal.REGRESSION).info.outputs == 1
    assert tiny_task(tmp_path / "f", folds=4).fold.tolist() == [n // 5 % 4 for n in range(60)]


def test_a_description_that_was_altered_is_refused(tmp_path: Path) -> None:
    tiny_task(tmp_path / "t")
    path = tmp_path / "t" / TASK
    body = json.loads(path.read_text())
    swapped = body | {"bands": [body["bands"][1], body["bands"][0], *body["bands"][2:]]}
    path.write_text(json.dumps(swapped))
    with pytest.raises(DataError, match="altered after it was written"):
        load_task(tmp_path / "t")
    path.write_text(json.dumps(body, indent=4))
    load_task(tmp_path / "t")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "cannot be read"), ("[]", "has form None"), ('{"form": 2}', "has form 2, this version reads 1"),
     ('{"form": 1}', "lacks name, goal"), ("\xff", "cannot be read")],
)  # fmt: skip
def test_what_is_no_description_is_refused(text: str, message: str, tmp_path: Path) -> None:
    tiny_task(tmp_path / "t")
    (tmp_path / "t" / TASK).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / "t")


def test_another_goal_than_there_is_is_refused(tmp_path: Path) -> None:
    tiny_task(tmp_path / "t")
    path = tmp_path / "t" / TASK
    path.write_text(json.dumps(json.loads(path.read_text()) | {"goal": "detection"}))
    with pytest.raises(DataError, match="'detection' is not a valid Goal; convert the data set again"):
        load_task(tmp_path / "t")


def test_an_absent_data_set_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(DataError, match=r"is no labelled data set .* convert-"):
            load_task(place)


def test_damaged_images_are_told_whether_footer_or_page(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "t")
    path = tmp_path / "t" / IMAGES
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        load_task(tmp_path / "t")
    path.write_bytes(whole)
    damage(path, len(whole) // 3)
    with pytest.raises(DataError, match="is damaged"):
        load_task(tmp_path / "t").images(range(60))
    path.unlink()
    with pytest.raises(DataError, match="is damaged"):
        task.images([0])
    with pytest.raises(DataError, match="cannot be read"):
        load_task(tmp_path / "t")


def test_images_of_another_data_set_are_refused(tmp_path: Path) -> None:
    tiny_task(tmp_path / "t")
    tiny_task(tmp_path / "other", size=8)
    (tmp_path / "t" / IMAGES).write_bytes((tmp_path / "other" / IMAGES).read_bytes())
    with pytest.raises(DataError, match=r"is not the file that task\.json tells of"):
        load_task(tmp_path / "t")


def test_identities_are_of_the_table_or_of_no_row() -> None:
    assert all(map(is_identity, ("B1", "B8A", "B10", "sentinel1.asc_VV", "aster.slope", "other.TCI_R", "other.05 - a.b")))
    assert not any(
        map(is_identity, ("", "B13", "B08", "red", "sentinel1.VV", "sentinel1.", "other.", "x.B1", "sentinel2", "sentinel2.B4"))
    )
