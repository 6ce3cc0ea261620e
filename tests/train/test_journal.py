"""Line files of a run: appended, flushed, cut back to a step on every rank."""

import json
from pathlib import Path

import pytest

from mmearth_ray.train.journal import LEDGER, METRICS, Journal, cut_back, ledger_path, lines


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, steps: range, tail: str = "") -> None:
    with Journal(path) as journal:
        for step in steps:
            journal.write({"step": step, "ids": ["a", "ö"]})
        journal.flush()
    with path.open("a", encoding="utf-8") as file:
        file.write(tail)


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "yet.jsonl"
    with Journal(path) as journal:
        for step in (1, 2, 3):
            journal.write({"step": step, "loss": None})
            assert steps_in(path) == list(range(1, step + 1))


def test_an_opened_journal_goes_on_after_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / METRICS, range(1, 4))
    write(tmp_path / METRICS, range(4, 6))
    assert steps_in(tmp_path / METRICS) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("step", [0, 3, 5, 9])
def test_everything_after_the_step_goes_from_metrics_and_the_ledgers_of_all_ranks(step: int, tmp_path: Path) -> None:
    paths = [tmp_path / METRICS, *(ledger_path(tmp_path, rank) for rank in (0, 1, 3, 12))]
    for path in paths:
        write(path, range(1, 6))
    before = [path.read_text(encoding="utf-8").splitlines(keepends=True) for path in paths]
    cut_back(tmp_path, step)
    for path, held in zip(paths, before, strict=True):
        assert path.read_text(encoding="utf-8") == "".join(held[:step])
    assert sorted(p.name for p in (tmp_path / LEDGER).iterdir()) == sorted(path.name for path in paths[1:])
    assert {p.name for p in tmp_path.iterdir()} == {METRICS, LEDGER}


@pytest.mark.parametrize("tail", ['{"step": 4, "ids": ["a"', '{"step": 4}', "{", '{"loss": 1}\n', "\x00\x00\n", "\n"])
def test_a_line_that_a_kill_left_unfinished_goes_even_if_its_step_is_kept(tail: str, tmp_path: Path) -> None:
    write(tmp_path / METRICS, range(1, 4), tail)
    cut_back(tmp_path, 7)
    assert steps_in(tmp_path / METRICS) == [1, 2, 3]
    write(tmp_path / METRICS, range(4, 5))
    assert steps_in(tmp_path / METRICS) == [1, 2, 3, 4]


def test_without_any_file_there_is_nothing_to_cut(tmp_path: Path) -> None:
    cut_back(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_lines_of_some_steps_without_one_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    assert list(lines(path, 1, 9)) == []
    write(path, range(1, 6), '{"step": 6, "lo')
    assert [entry["step"] for entry in lines(path, 2, 4)] == [2, 3, 4]
    assert [entry["step"] for entry in lines(path, 4, 9)] == [4, 5]
    assert list(lines(path, 5, 4)) == []


def test_every_line_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / METRICS, range(1, 6))
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    assert [entry["step"] for entry in lines(tmp_path / METRICS, 2, 4)] == [2, 3, 4]
    assert len(parsed) == 5


@pytest.mark.parametrize("count", [1, 3, 40_000])
def test_more_is_added_to_the_last_line_alone(count: int, tmp_path: Path) -> None:
    path = tmp_path / METRICS
    with Journal(path) as journal:
        for step in range(1, count + 1):
            journal.write({"step": step, "loss": 0.5, "name": "ö"})
        before = path.read_bytes()
        assert journal.amend({"evaluation": {"knn": 0.25}}) == {
            "step": count, "loss": 0.5, "name": "ö", "evaluation": {"knn": 0.25},
        }  # fmt: skip
        assert journal.amend({"evaluation": {"knn": 0.75}}) is None  # it has one
        assert path.read_bytes() == before[:-2] + b', "evaluation": {"knn": 0.25}}\n'
        journal.write({"step": count + 1})
    assert steps_in(path) == list(range(1, count + 2))


@pytest.mark.parametrize("tail", ["", '{"step": 4, "ids": ["a"', "\n"])
def test_nothing_is_added_where_there_is_no_last_line(tail: str, tmp_path: Path) -> None:
    path = tmp_path / METRICS
    with Journal(path) as journal:
        path.write_text(tail)
        assert journal.amend({"evaluation": {}}) is None
    assert path.read_text() == tail
