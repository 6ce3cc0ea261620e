"""Ray tasks come back each with its own result, no more at once than asked for, and none outlives an error."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError, TaskCancelledError, WorkerCrashedError

from mmearth_ray.cluster import join_or_start
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.tasks import in_turn, result_of


@pytest.fixture(scope="module", autouse=True)
def started() -> Any:
    join_or_start(2)
    yield
    ray.shutdown()


def squared(job: Any) -> Any:
    return job * job


def test_every_job_comes_once_with_its_own_result() -> None:
    task: Any = ray.remote(num_cpus=0.1)(squared)
    found = dict(in_turn(range(9), lambda job: task.remote(job), ray.get, lambda: 3))
    assert found == {job: job * job for job in range(9)}
    assert not list(in_turn([], lambda job: task.remote(job), ray.get, lambda: 3))


@pytest.mark.parametrize("room", [[1], [3], [0, 1, 2, 3]])
def test_no_more_are_handed_over_than_there_is_room_for_when_asked(room: list[int]) -> None:
    task, handed, back, most = ray.remote(num_cpus=0.1)(lambda: None), 0, 0, []
    left = room.copy()

    def at_once() -> int:
        return left.pop(0) if len(left) > 1 else left[0]

    def start(job: int) -> Any:
        nonlocal handed
        handed += 1
        most.append(handed - back)
        return task.remote()

    for _ in in_turn(range(8), start, ray.get, at_once):
        back += 1
    assert back == 8
    assert max(most) == max(room)


def slow(folder: Path, job: str) -> None:
    if job == "bad":
        while not (folder / "slow.begun").exists():
            time.sleep(0.01)
        raise DataError("tile 7 is damaged")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # by which Ray cancels; a shell's background jobs ignore it
    try:
        (folder / f"{job}.begun").touch()
        while True:  # Ray interrupts between two steps of Python
            time.sleep(0.02)
    finally:
        (folder / f"{job}.tidied").touch()


@pytest.mark.parametrize("kill", [True, False])
def test_an_error_of_one_comes_through_and_ends_those_that_run(tmp_path: Path, kill: bool) -> None:
    task, started = ray.remote(num_cpus=0.1, max_retries=0)(slow), {}

    def start(job: str) -> Any:
        started[job] = task.remote(tmp_path, job)
        return started[job]

    found = in_turn(["slow", "bad", "late"], start, lambda r: result_of(r, "read", "parts"), lambda: 2, kill=kill)
    with pytest.raises(DataError, match=r"^tile 7 is damaged$"):
        list(found)
    assert list(started) == ["slow", "bad"]
    if not kill:
        assert (tmp_path / "slow.tidied").exists()  # it had time to, and was waited for
    with pytest.raises((RayTaskError, TaskCancelledError, WorkerCrashedError)):
        ray.get(started["slow"], timeout=30)
    assert kill != (tmp_path / "slow.tidied").exists()


def test_errors_of_people_are_told_as_they_are_and_a_dead_process_by_name() -> None:
    def fails(kind: str) -> None:
        if kind == "dies":
            os._exit(1)
        raise UsageError("gpus=true") if kind == "usage" else ZeroDivisionError(kind)

    task = ray.remote(num_cpus=0.1, max_retries=0)(fails)
    with pytest.raises(UsageError, match=r"^gpus=true$"):
        result_of(task.remote("usage"), "read", "parts")
    with pytest.raises(ZeroDivisionError):
        result_of(task.remote("other"), "read", "parts")
    with pytest.raises(DataError, match=r"a worker died while it read \(WorkerCrashedError\).*finished parts are kept"):
        result_of(task.remote("dies"), "read", "parts")
