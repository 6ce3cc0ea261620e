"""The Slurm script with a real Ray and a real run, on two nodes that are both this machine."""

import signal
import subprocess
from pathlib import Path

import pytest
from command import SMALL, kill, kill_tree, metrics, wait_for
from slurm import SCRIPT, install, notes
from tiny_earth import make_data_set

pytestmark = [pytest.mark.drill, pytest.mark.long]
STEPS = 400


def submit(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = install(folder, nodes=2, cpus=2)
    return subprocess.Popen(
        [SCRIPT, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_slurm_job_trains_saves_before_its_limit_and_the_next_one_resumes(tmp_path: Path) -> None:
    make_data_set(tmp_path / "data", tiles=48, size=40)
    run = tmp_path / "run"
    arguments = (*SMALL, f"train.steps={STEPS}", "validate.tiles=0", "train.workers=2", f"data.shards={tmp_path / 'data'}",
                 f"run.directory={run}", "checkpoint.every=1000", "model.targets=[aster]")  # fmt: skip
    for stop_at in (None, "3"):
        last = f"train.stop_at={len(metrics(run)) + int(stop_at)}" if stop_at else f"train.stop_at={STEPS}"
        process = submit(tmp_path, *arguments, last)
        try:
            if not stop_at:
                wait_for(lambda: len(metrics(run)) >= 3, "step 3", process, seconds=400)
                kill(process.pid, signal.SIGUSR1)
            output = process.communicate(timeout=500)[0]
        finally:
            kill_tree(process)
        assert process.returncode == 0, output
        assert "Ray runs on 2 nodes" in output
        assert ("queued again" in output) == (not stop_at)
        assert ("resuming" in output) == bool(stop_at)
        reached = metrics(run)[-1]["step"]
        assert (run / "checkpoints" / f"step-{reached:08d}" / "state.json").exists()
    assert [entry["step"] for entry in metrics(run)] == list(range(1, reached + 1))
    assert len([call for _, call in notes(tmp_path, "scontrol") if call[0] == "requeue"]) == 1
    assert [pid for pid, _ in notes(tmp_path, "srun") if Path(f"/proc/{pid}").exists()] == []
