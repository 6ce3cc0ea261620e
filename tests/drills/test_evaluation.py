"""Evaluations of real runs: beside training on Ray, with the process that judges stopped, killed, or left without its run."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import (
    SMALL,
    descendants,
    kill,
    kill_tree,
    losses,
    metrics,
    pretrain,
    pretraining,
    title_of,
    wait_for,
    workers_of,
)
from tiny_earth import make_data_set

from mmearth_ray.evaluate.during.judge import NICE

pytestmark = pytest.mark.drill
STEPS, EVERY = 40, 10
RUN = (*SMALL, f"train.steps={STEPS}", "train.workers=2", "checkpoint.every=8", "validate.tiles=0",
       "model.targets=[sentinel2,biome]")  # fmt: skip
EVALUATED = (f"eval.every={EVERY}", "eval.tiles=64")
JUDGE = "mmearth_ray.evaluate.during.judge"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=110, size=40, held_out=40)
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run that nothing is known of beside training."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = pretrain(*RUN, f"data.shards={shards}", f"run.directory={run}")
    assert done.returncode == 0, done.stderr
    return losses(run)


@pytest.fixture
def arguments(shards: Path, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """A run with evaluations, which leaves no process that judges behind."""
    yield (*RUN, *EVALUATED, f"data.shards={shards}", f"run.directory={tmp_path}")
    deadline = time.monotonic() + 60
    while left := [pid for pid in judges(1) if str(tmp_path) in title_of(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def judges(pid: int) -> list[int]:
    """Processes that judge, below another one."""
    return [child for child in descendants(pid) if JUDGE in title_of(child)]


def outcomes(run: Path) -> dict[int, dict[str, Any]]:
    """All that the metrics tell of evaluations by step; what was skipped has no score.  Fails where a step is told twice."""
    told = [line["evaluation"] for line in metrics(run) if "evaluation" in line]
    found = [outcome for last in told for outcome in (last, *last.get("earlier", ()))]
    found += [{"step": step} for outcome in found for step in outcome.get("skipped", ())]
    assert len({outcome["step"] for outcome in found}) == len(found), found
    return {outcome["step"]: outcome for outcome in found}


def assert_well(run: Path, undisturbed: list[float]) -> dict[int, dict[str, Any]]:
    """The losses bit for bit, a line for every step, every evaluation told once.  Returns outcomes by step."""
    assert losses(run) == undisturbed
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    found = outcomes(run)
    assert sorted(found) == list(range(EVERY, STEPS + 1, EVERY))
    return found


def test_a_run_is_evaluated_beside_its_training_and_trains_as_without(
    arguments: tuple[str, ...], undisturbed: list[float], tmp_path: Path
) -> None:
    with pretraining(*arguments) as process:
        (judge,) = wait_for(lambda: judges(process.pid), "an evaluation", process)
        worker = psutil.Process(judge).ppid()  # which Ray starts with a niceness of its own
        stands_back = min(19, os.getpriority(os.PRIO_PROCESS, worker) + NICE)
        wait_for(lambda: os.getpriority(os.PRIO_PROCESS, judge) == stands_back, "its standing back", process)
        output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    assert f"evaluated every {EVERY} steps on tiny, held out, by biome" in output
    found = assert_well(tmp_path, undisturbed)
    assert 0 <= found[STEPS]["knn"] <= 1
    assert 0 <= found[STEPS]["logistic"] <= 1
    assert found[STEPS]["effective_rank"] > 1
    assert "kNN" in output


@pytest.mark.long
def test_a_judge_that_is_killed_and_one_that_hangs_do_not_hold_up_the_run(
    arguments: tuple[str, ...], undisturbed: list[float], tmp_path: Path
) -> None:
    with pretraining(*arguments, "eval.wait=60") as process:
        (first,) = wait_for(lambda: judges(process.pid), "an evaluation", process)
        kill(first, signal.SIGKILL)
        second = wait_for(lambda: [pid for pid in judges(process.pid) if pid != first], "another evaluation", process)
        kill(second[0], signal.SIGSTOP)
        output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    found = assert_well(tmp_path, undisturbed)
    failed = [outcome["failed"] for outcome in found.values() if "failed" in outcome]
    assert "its process was ended by SIGKILL" in failed
    assert any("eval.wait" in why for why in failed)
    assert output.count("was not evaluated: ") == len(failed)
    assert (tmp_path / "exported" / "encoder.safetensors").exists()


def test_a_killed_worker_takes_its_judge_along_and_no_evaluation_is_lost_or_doubled(
    arguments: tuple[str, ...], undisturbed: list[float], tmp_path: Path
) -> None:
    with pretraining(*arguments) as process:
        wait_for(lambda: judges(process.pid), "an evaluation", process)
        wait_for(lambda: len(metrics(tmp_path)) >= EVERY + 2, "some steps more", process)
        for worker in workers_of(process.pid):
            kill(worker, signal.SIGKILL)
        output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    assert_well(tmp_path, undisturbed)


@pytest.mark.long
def test_a_run_of_which_everything_is_killed_goes_on_without_a_doubled_evaluation(
    arguments: tuple[str, ...], undisturbed: list[float], tmp_path: Path
) -> None:
    for step in (EVERY + 1, 2 * EVERY + 3):
        with pretraining(*arguments) as process:
            wait_for(lambda step=step: len(metrics(tmp_path)) >= step, f"step {step}", process)
            kill_tree(process)
    done = pretrain(*arguments)
    assert done.returncode == 0, done.stderr
    assert_well(tmp_path, undisturbed)
