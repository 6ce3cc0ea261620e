"""Requests and outcomes on disk: complete or absent, cut back to a step, found again by the next start."""

import json
from pathlib import Path

import pytest

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.during.requests import REQUEST, RESULT, Request, cut_back, restored, result_of, settle, write_request


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 9)


def ask(place: Path, step: int, skipped: tuple[int, ...] = ()) -> Request:
    return write_request(place, step, skipped, {"task": "t"}, fill)


def test_a_request_is_there_with_all_that_it_needs(tmp_path: Path) -> None:
    request = ask(tmp_path / "evaluation", 30, (20, 10))
    assert json.loads((request.folder / REQUEST).read_text()) == {"task": "t", "step": 30, "skipped": [10, 20]}
    assert (request.folder / "weights").read_bytes() == b"w" * 9
    assert ask(tmp_path / "evaluation", 30).folder != request.folder  # of another start


def test_a_request_that_cannot_be_filled_is_not_there(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="no space left on the disk"):
        write_request(tmp_path, 3, (), {}, full)
    assert list(tmp_path.iterdir()) == []


def test_the_outcome_takes_the_place_of_the_request(tmp_path: Path) -> None:
    request = ask(tmp_path, 30, (10, 20))
    with pytest.raises(DataError, match=f"it left no {RESULT}"):
        result_of(request)
    (request.folder / RESULT).write_text('{"step": 30, "knn": 0.5}')
    told = settle(tmp_path, request, result_of(request))
    assert told == {"step": 30, "knn": 0.5, "skipped": [10, 20]}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030.json"]
    assert json.loads((tmp_path / "step-00000030.json").read_text()) == told


def test_a_start_finds_what_is_to_be_done_and_what_is_not_told(tmp_path: Path) -> None:
    for step in (10, 20):
        settle(tmp_path, ask(tmp_path, step), {"step": step})
    requests = [ask(tmp_path, step, skipped) for step, skipped in ((30, ()), (50, (40,)))]
    assert restored(tmp_path, {10}) == ([{"step": 20}], requests)
    assert restored(tmp_path, ()) == ([{"step": 10}, {"step": 20}], requests)
    assert restored(tmp_path / "nowhere", ()) == ([], [])


def test_a_request_that_was_told_is_not_judged_again(tmp_path: Path) -> None:
    """Where the disk was full, its outcome is in the metrics alone."""
    told, other = ask(tmp_path, 10), ask(tmp_path, 20)
    assert restored(tmp_path, {10}) == ([], [other])
    assert not told.folder.exists()


def test_a_request_with_an_outcome_or_without_its_words_is_no_request(tmp_path: Path) -> None:
    settle(tmp_path, ask(tmp_path, 10), {"step": 10})
    ask(tmp_path, 10)  # of a start that lived on unseen
    (ask(tmp_path, 20).folder / REQUEST).unlink()
    assert restored(tmp_path, ()) == ([{"step": 10}], [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010.json"]


def test_what_came_after_the_restored_step_goes_and_nothing_else(tmp_path: Path) -> None:
    settle(tmp_path, ask(tmp_path, 10), {"step": 10})
    settle(tmp_path, ask(tmp_path, 40), {"step": 40})
    kept = ask(tmp_path, 20)
    ask(tmp_path, 30)
    (tmp_path / ".step-00000020-00000000.7.incoming").mkdir()
    (tmp_path / ".step-00000020.json.7.tmp").write_text("{")
    (tmp_path / "held-out-1").mkdir()
    cut_back(tmp_path, 20)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000010.json", kept.folder.name, "held-out-1"}
    cut_back(tmp_path / "nowhere", 0)
