"""Jobs as Ray tasks or in this process: every job ends in a result or in one line that says why not."""

import os
from pathlib import Path

import pytest

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.compare.pool import Failure, run_jobs, told


def work(job: str) -> str:
    if job == "die":
        os._exit(9)
    if job == "data":
        raise DataError("image 7 has no label\nanywhere")
    if job == "bug":
        raise KeyError("weights")
    return job.upper()


def test_failures_in_this_process_stop_nothing() -> None:
    found = dict(run_jobs(["a", "data", "b", "bug"], work, workers=0))
    assert (found["a"], found["b"]) == ("A", "B")
    assert found["data"] == Failure("image 7 has no label anywhere")
    assert found["bug"].line == "KeyError: 'weights'"
    assert "in work" in found["bug"].trace


def test_people_are_told_of_settings_without_a_trace() -> None:
    assert told(UsageError("k=0: must be at least 1")) == Failure("k=0: must be at least 1")


def test_failures_of_tasks_stop_nothing_and_a_process_that_dies_is_told() -> None:
    found = dict(run_jobs(["a", "data", "die", "b"], work, workers=2))
    assert (found["a"], found["b"]) == ("A", "B")
    assert found["data"] == Failure("image 7 has no label anywhere")
    assert "process died" in found["die"].line
    with pytest.raises(UsageError, match=r"threads=1000: no machine that Ray knows has so many CPUs"):
        list(run_jobs(["a"], work, workers=1, cpus=1000))
    with pytest.raises(UsageError, match="gpus=true needs a GPU"):
        list(run_jobs(["a"], work, workers=1, gpus=1))


def test_what_nobody_waits_for_is_not_begun(tmp_path: Path) -> None:
    begun: list[int] = []

    def note(job: int) -> int:
        begun.append(job)
        return job

    results = run_jobs(range(5), note, workers=0)
    assert next(iter(results)) == (0, 0)
    assert begun == [0]
