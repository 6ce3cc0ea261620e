"""Engines that hold the model in parts, through Ray: a worker is killed, the run is resumed under another engine."""

import random
import signal
from pathlib import Path

import pytest
from command import SMALL, kill, ledger, losses, metrics, pretrain, pretraining, wait_for, workers_of
from tiny_earth import make_data_set

pytestmark = [pytest.mark.drill, pytest.mark.long]
STEPS, HALF = 12, 8
RUN = (*(setting for setting in SMALL if not setting.startswith("figure")), f"train.steps={STEPS}", "train.ledger=true",
       "checkpoint.every=3", "validate.every=4", "train.clip=0.5", "train.micro_batch=4")  # fmt: skip


def test_a_model_in_parts_loses_a_worker_goes_on_whole_and_ends_as_under_ddp(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=60, size=40, held_out=6).directory
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = pretrain(*RUN, f"data.shards={data}", f"run.directory={whole}", "train.workers=2")
    assert done.returncode == 0, done.stderr

    arguments = (*RUN, f"data.shards={data}", f"run.directory={run}")
    parted = (*arguments, "train.engine=zero3", "train.workers=2", f"train.stop_at={HALF}")
    with pretraining(*parted) as process:
        wait_for(lambda: len(metrics(run)) >= 4, "step 4", process)
        kill(random.choice(workers_of(process.pid)), signal.SIGKILL)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    assert "workers were lost" in output
    assert len(metrics(run)) == HALF
    again = pretrain(*arguments, "train.engine=zero1", "train.workers=1")
    assert again.returncode == 0, again.stderr
    assert f"resuming {run} after step-{HALF:08d}" in again.stdout

    assert ledger(run) == ledger(whole)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5, abs=1e-5)
    validated = [(entry["step"], entry["validation"]["loss"]) for entry in metrics(run) if "validation" in entry]
    expected = [(entry["step"], entry["validation"]["loss"]) for entry in metrics(whole) if "validation" in entry]
    assert [step for step, _ in validated] == [step for step, _ in expected] == [4, 8, 12]
    assert [loss for _, loss in validated] == pytest.approx([loss for _, loss in expected], rel=1e-5, abs=1e-5)
    for step in (HALF, STEPS):
        assert (run / "figures" / f"reconstruction-{step:08d}.png").stat().st_size > 10_000
