"""Points on disk: named by what decides their score, complete or absent, failures apart from scores."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_points import FIXED, contender, kept, outcome, planned, subject

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.compare.points import Point, Store

POINT = planned(contender("ours")).point


def test_the_key_knows_what_decides_a_score_and_nothing_else() -> None:
    same = Point("another name", replace(POINT.subject, name="x", spec="y"), "knn", 1.0, 0, dict(reversed(FIXED.items())))
    assert same.key == POINT.key
    others = [
        Point("ours", subject(digest="other"), "knn", 1.0, 0, FIXED), Point("ours", POINT.subject, "probe", 1.0, 0, FIXED),
        Point("ours", POINT.subject, "knn", 0.1, 0, FIXED), Point("ours", POINT.subject, "knn", 1.0, 1, FIXED),
        Point("ours", POINT.subject, "knn", 1.0, 0, FIXED | {"k": 6}),
    ]  # fmt: skip
    assert len({point.key for point in [POINT, *others]}) == 6


def test_a_score_comes_back_as_it_was(tmp_path: Path) -> None:
    store, found = Store(tmp_path), outcome(30)
    assert not store.is_done(POINT)
    store.write(POINT, *kept(found))
    assert store.is_done(POINT)
    assert store.read(POINT) == kept(found)[0]
    arrays = store.arrays(POINT)
    assert arrays["ids"].tolist() == found.ids.tolist()
    assert np.array_equal(arrays["prediction"], np.asarray(found.prediction))
    assert store.failure(POINT) == ""


@pytest.mark.parametrize("name", ["json", "npz"])
def test_half_of_it_is_nothing(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    store.write(POINT, *kept(outcome(30)))
    path = next(tmp_path.glob(f"points/*.{name}"))
    content = path.read_bytes()
    path.unlink()
    assert not store.is_done(POINT)
    if name == "json":
        path.write_bytes(content[: len(content) // 2])
        assert not store.is_done(POINT)
        path.write_text(json.dumps(json.loads(content) | {"form": 99}))
        assert not store.is_done(POINT)
    else:
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match="damaged; remove it"):
            store.arrays(POINT)


def test_a_failure_is_kept_and_is_no_score(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_failure(POINT, "features are not finite", "Traceback ...")
    assert not store.is_done(POINT)
    assert store.failure(POINT) == "features are not finite"
    store.write(POINT, *kept(outcome(30)))
    assert store.is_done(POINT)
    assert store.failure(POINT) == ""


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(POINT, *kept(outcome(30)))
    dead, living = (tmp_path / "points" / f".a.json.{pid}.tmp" for pid in (2**22 + 1, os.getpid()))
    for path in (dead, living):
        path.write_text("half")
    store.clean()
    assert not dead.exists()
    assert living.exists()
    assert store.is_done(POINT)


def test_a_disk_that_takes_nothing_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "points").write_text("a file in the way")
    with pytest.raises(DataError, match="cannot write"):
        Store(tmp_path).write(POINT, *kept(outcome(30)))
