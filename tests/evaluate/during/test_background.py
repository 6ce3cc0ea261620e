"""Evaluations beside training: nobody waits, one process at a time, and whatever becomes of it is said."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import stand_in_judge

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.during import background
from mmearth_ray.evaluate.during.background import Background, environment
from mmearth_ray.evaluate.during.requests import RESULT, restored, write_request

STAND_IN = (sys.executable, "-I", "-S", stand_in_judge.__file__)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "COMMAND", STAND_IN)
    monkeypatch.setattr(background, "LOOK_SECONDS", 0.02)


@contextmanager
def started(place: Path, limit: float = 300.0, told: tuple[int, ...] = ()) -> Iterator[tuple[Background, list[str]]]:
    warnings: list[str] = []
    held = Background(place, threads=1, limit=limit, warn=warnings.append, told=told)
    try:
        yield held, warnings
    finally:
        held.close()
        assert not held.thread.is_alive()
        assert held.process is None


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def nothing(folder: Path) -> None:
    pass


def never() -> bool:
    return False


def test_an_outcome_comes_by_itself_and_is_told_once(tmp_path: Path) -> None:
    with started(tmp_path) as (held, warnings):
        assert held.take() is None
        held.put(10, {"task": "t"}, nothing)
        outcome = until(held.take)
        assert (outcome["step"], outcome["knn"], outcome["logistic"]) == (10, 0.5, 0.25)
        assert outcome["pid"] != os.getpid()
        assert held.take() is None
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000010.json"]
        assert not warnings


def test_of_those_that_come_meanwhile_only_the_newest_waits(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with started(tmp_path / "kept") as (held, warnings):
        held.put(1, {"do": "wait", "until": str(go)}, nothing)
        until(lambda: held.process)
        for step in (2, 3, 4, 5):
            held.put(step, {}, nothing)
            if step != 3:
                held.flush()
                assert [r.step for r in restored(tmp_path / "kept", ())[1]] == [1, step]
        go.touch()
        held.finish(300, never)
        first, last = held.take(), held.take()
    assert first is not None
    assert "skipped" not in first
    assert last is not None
    assert (last["step"], last["skipped"]) == (5, [2, 3, 4])
    assert first["pid"] != last["pid"]
    assert not warnings


def test_giving_waits_for_neither_the_disk_nor_the_process(tmp_path: Path) -> None:
    free, begun = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        begun.set()
        assert free.wait(120)

    with started(tmp_path) as (held, _):
        held.put(1, {}, slow)
        assert begun.wait(120)
        held.put(2, {}, nothing)  # these return although the disk is busy
        held.put(3, {}, nothing)
        assert held.take() is None
        free.set()
        held.finish(300, never)
        outcomes = [*iter(held.take, None)]
    assert [(o["step"], o.get("skipped", [])) for o in outcomes] in ([(1, []), (3, [2])], [(3, [1, 2])])


@pytest.mark.parametrize(
    ("do", "why"),
    [
        ("crash", "ValueError: a crash of the test's own"),
        ("kill", "its process was ended by SIGKILL"),
        ("vanish", f"it left no {RESULT}"),
    ],
)
def test_a_process_that_fails_is_said_and_the_next_one_does_not_suffer(do: str, why: str, tmp_path: Path) -> None:
    with started(tmp_path) as (held, warnings):
        held.put(1, {"do": do}, nothing)
        outcome = until(held.take)
        assert outcome["step"] == 1
        assert outcome["failed"].startswith(why)
        assert warnings == [f"the encoder of step 1 was not evaluated: {outcome['failed']}; training goes on"]
        held.put(2, {}, nothing)
        assert until(held.take)["knn"] == 0.5
    assert json.loads((tmp_path / "step-00000001.json").read_text()) == outcome


def test_a_process_that_hangs_is_ended_after_its_time(tmp_path: Path) -> None:
    with started(tmp_path, limit=1.0) as (held, warnings):
        held.put(1, {"do": "hang"}, nothing)
        process = until(lambda: held.process)
        held.put(2, {}, nothing)
        assert until(held.take)["failed"] == "it took more than 1 s (eval.wait)"
        assert process.returncode is not None
        assert until(held.take)["step"] == 2
    assert len(warnings) == 1


def test_the_end_waits_for_what_is_not_done_and_then_gives_up(tmp_path: Path) -> None:
    with started(tmp_path) as (held, warnings):
        held.put(1, {"do": "hang"}, nothing)
        until(lambda: held.process)
        held.put(2, {}, nothing)
        held.finish(0.2, never)
        failed = [held.take(), held.take()]
        assert held.process is None
    assert [(o or {})["step"] for o in failed] == [1, 2]
    assert all("not done 0.2 s after the last step (eval.wait)" in (o or {})["failed"] for o in failed)
    assert len(warnings) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001.json", "step-00000002.json"}


def test_who_is_asked_to_stop_waits_for_nothing_and_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    with started(tmp_path) as (held, warnings):
        held.put(1, {"do": "hang"}, nothing)
        process = until(lambda: held.process)
        held.finish(1e6, lambda: True)
        assert held.take() is None
    assert process.returncode is not None
    assert not warnings
    (request,) = restored(tmp_path, ())[1]
    (request.folder / "request.json").write_text('{"step": 1, "skipped": []}')
    with started(tmp_path) as (held, warnings):
        held.finish(300, never)
        assert (held.take() or {})["knn"] == 0.5


def test_the_next_start_does_what_is_left_and_computes_nothing_again(tmp_path: Path) -> None:
    done = write_request(tmp_path, 10, (), {"do": "crash"}, nothing)
    (done.folder / RESULT).write_text('{"step": 10, "knn": 0.75}')
    write_request(tmp_path, 20, (15,), {}, nothing)
    write_request(tmp_path, 30, (), {}, nothing)
    with started(tmp_path, told=(5,)) as (held, _):
        held.finish(300, never)
        outcomes = [*iter(held.take, None)]
    assert [(o["step"], o["knn"], o.get("skipped")) for o in outcomes] == [
        (10, 0.75, None), (20, 0.5, [15]), (30, 0.5, None),
    ]  # fmt: skip
    with started(tmp_path, told=(10, 20)) as (held, _):
        assert [o["step"] for o in iter(held.take, None)] == [30]


def test_a_disk_that_does_not_take_it_is_said(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with started(tmp_path) as (held, warnings):
        held.put(1, {}, full)
        assert until(held.take)["failed"].startswith("no space left on the disk of")
        assert len(warnings) == 1


def test_an_outcome_that_cannot_be_kept_is_told_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise DataError("no space left")

    monkeypatch.setattr(background, "settle", full)
    with started(tmp_path) as (held, warnings):
        held.put(1, {}, nothing)
        assert until(held.take)["knn"] == 0.5
        assert warnings == ["the evaluation of step 1 is in the metrics alone: no space left"]


def test_a_mistake_in_the_thread_ends_evaluations_and_nothing_else(tmp_path: Path) -> None:
    def wrong(folder: Path) -> None:
        raise KeyError("a mistake")

    with started(tmp_path) as (held, warnings):
        held.put(1, {}, wrong)
        held.finish(300, never)  # these come back
        held.flush()
        held.put(2, {}, nothing)
        assert held.take() is None
        assert warnings == ["there are no more evaluations until the run is resumed ('a mistake'); training goes on"]


def test_a_command_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "COMMAND", (str(tmp_path / "nothing"),))
    with started(tmp_path / "kept") as (held, _):
        held.put(1, {}, nothing)
        assert "its process could not be started" in until(held.take)["failed"]


def test_the_process_has_its_threads_no_gpu_and_this_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/else")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = environment(3)
    assert (found["OMP_NUM_THREADS"], found["CUDA_VISIBLE_DEVICES"]) == ("3", "")
    assert found["PYTHONPATH"].endswith(f"{os.pathsep}/else")
    code = "import mmearth_ray, sys; print(mmearth_ray.__file__)"
    said = subprocess.run([sys.executable, "-c", code], env=found, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(said.stdout.strip()).samefile(str(sys.modules["mmearth_ray"].__file__))
