"""Failures of a running pretraining: workers killed, hung and counted anew; every drill ends with the undisturbed numbers."""

import json
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import (
    SMALL,
    descendants,
    environment,
    free_address,
    kill,
    kill_tree,
    ledger,
    losses,
    metrics,
    pretrain,
    pretraining,
    title_of,
    wait_for,
    workers_of,
)
from tiny_earth import make_data_set

from mmearth_ray.modalities import tasks

ALL_TARGETS = [m.name for m in tasks()]
pytestmark = pytest.mark.drill
STEPS = 24
RUN = (*SMALL, f"train.steps={STEPS}", "train.ledger=true", "checkpoint.every=5", "validate.tiles=0")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=90, size=40)
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = pretrain(*RUN, f"data.shards={shards}", f"run.directory={run}", "train.workers=2")
    assert done.returncode == 0, done.stderr
    assert len(losses(run)) == STEPS
    return run


def assert_as_undisturbed(run: Path, undisturbed: Path, tolerance: float) -> None:
    assert ledger(run) == ledger(undisturbed)
    assert [e["step"] for e in metrics(run)] == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(undisturbed), abs=tolerance)


def test_a_worker_killed_at_a_random_step_is_replaced_and_nothing_is_lost(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    at = random.randrange(1, STEPS - 4)
    with pretraining(*RUN, f"data.shards={shards}", f"run.directory={tmp_path}", "train.workers=2") as process:
        wait_for(lambda: len(metrics(tmp_path)) >= at, f"step {at}", process)
        victims = workers_of(process.pid)
        assert len(victims) == 2
        kill(random.choice(victims), signal.SIGKILL)
        assert process.wait(timeout=300) == 0
    assert_as_undisturbed(tmp_path, undisturbed, 1e-6)


def data_tasks_of(pid: int, *titles: str) -> list[int]:
    """The processes that data tasks run in, by what they are doing."""
    return [child for child in descendants(pid) if title_of(child).startswith(titles)]


@pytest.mark.long
def test_a_worker_that_is_told_to_end_and_killed_data_tasks_change_nothing(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A machine that shuts down sends SIGTERM to every process; the kernel may kill any for its memory."""
    with pretraining(*RUN, f"data.shards={shards}", f"run.directory={tmp_path}", "train.workers=2") as process:
        for pid in wait_for(lambda: data_tasks_of(process.pid, "ray::Read"), "the first data tasks", process):
            kill(pid, signal.SIGKILL)
        wait_for(lambda: len(metrics(tmp_path)) >= 3, "step 3", process)
        tasks = data_tasks_of(process.pid, "ray::Read", "ray::IDLE")
        for pid in tasks:
            kill(pid, signal.SIGKILL)
        wait_for(lambda: len(metrics(tmp_path)) >= 10, "step 10", process)
        kill(workers_of(process.pid)[0], signal.SIGTERM)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    assert tasks
    assert_as_undisturbed(tmp_path, undisturbed, 1e-6)


@pytest.mark.long
def test_a_worker_that_gets_no_more_memory_ends_the_run_with_what_to_do(shards: Path, tmp_path: Path) -> None:
    arguments = (*RUN, f"data.shards={shards}", f"run.directory={tmp_path}", "train.workers=2", "train.max_failures=0")
    with pretraining(*arguments) as process:
        wait_for(lambda: len(metrics(tmp_path)) >= 3, "step 3", process)
        resource.prlimit(workers_of(process.pid)[0], resource.RLIMIT_AS, (0, 0))
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: training ended after 0 restarts: ")
    assert "use a smaller train.micro_batch, train.activation_checkpointing=true or more train.workers" in error
    assert "Traceback" not in output
    assert (tmp_path / "error.log").exists()


@pytest.mark.long
def test_a_worker_that_hangs_is_replaced_after_the_timeout(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    arguments = (*RUN, f"data.shards={shards}", f"run.directory={tmp_path}", "train.workers=2", "train.hang_timeout=15")
    with pretraining(*arguments) as process:
        wait_for(lambda: len(metrics(tmp_path)) >= 7, "step 7", process)
        kill(workers_of(process.pid)[0], signal.SIGSTOP)
        assert process.wait(timeout=400) == 0
    assert_as_undisturbed(tmp_path, undisturbed, 1e-6)


def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    arguments = (*RUN, f"data.shards={shards}", f"run.directory={tmp_path}", "train.workers=2")
    with pretraining(*arguments) as process:
        wait_for(lambda: len(metrics(tmp_path)) >= 3, "step 3", process)
        kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == 0
        output = process.stdout.read() if process.stdout else ""
    reached = metrics(tmp_path)[-1]["step"]
    assert reached < STEPS
    assert (tmp_path / "checkpoints" / f"step-{reached:08d}" / "state.json").exists()
    assert "the same command resumes" in output
    assert pretrain(*arguments).returncode == 0
    assert_as_undisturbed(tmp_path, undisturbed, 1e-6)


def test_one_and_four_workers_train_on_the_same_samples_with_the_same_losses(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    for workers, micro_batch in ((1, 4), (4, 2)):
        run = tmp_path / f"{workers}"
        layout = (f"train.workers={workers}", f"train.micro_batch={micro_batch}")
        done = pretrain(*RUN, f"data.shards={shards}", f"run.directory={run}", *layout)
        assert done.returncode == 0, done.stderr
        assert_as_undisturbed(run, undisturbed, 1e-4)
        assert losses(run)[:20] == pytest.approx(losses(undisturbed)[:20], rel=1e-5)


@pytest.mark.long
def test_a_killed_driver_loses_nothing_before_the_last_checkpoint(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    arguments = (*RUN, f"data.shards={shards}", f"run.directory={tmp_path}", "train.workers=2")
    with pretraining(*arguments) as process:
        wait_for(lambda: len(metrics(tmp_path)) >= 8, "step 8", process)
        kill(process.pid, signal.SIGKILL)
        process.wait()
    again = pretrain(*arguments)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stdout
    assert_as_undisturbed(tmp_path, undisturbed, 1e-6)


@pytest.mark.long
def test_relative_paths_mean_the_same_to_workers_and_an_old_export_is_made_anew(tmp_path: Path) -> None:
    make_data_set(tmp_path / "data", tiles=20, size=40, held_out=4)
    arguments = [*SMALL[:2], "train.global_batch=8", "data.shards=data", "run.directory=runs/a", "train.steps=3"]
    done = pretrain(*arguments, "validate.every=1", "figure.tiles=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "a"
    assert all("validation" in entry for entry in metrics(run))
    assert (run / "figures" / "reconstruction-00000003.png").exists()
    description = run / "exported" / "config.json"
    assert json.loads(description.read_text())["step"] == 3

    description.write_text(json.dumps({"step": 1}))  # as if the run had been killed between its checkpoint and its export
    again = pretrain(*arguments, "figure.tiles=1", "model.targets=" + str(ALL_TARGETS[::-1]).replace("'", ""), folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(description.read_text())["step"] == 3
    assert "nothing left to do" in pretrain(*arguments, folder=tmp_path).stdout


def test_a_shard_that_breaks_while_training_ends_the_run_with_one_line(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=60, size=40)
    victim = data.directory / data.shards[-1].file
    content = bytearray(victim.read_bytes())
    for place in range(20_000, len(content) - 80_000, 5_000):
        content[place] ^= 0xFF  # past the first row group, before the footer: found only when the maps are read
    victim.write_bytes(bytes(content))
    done = pretrain(*RUN, f"data.shards={data.directory}", f"run.directory={tmp_path / 'run'}")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot read row group")
    assert "Traceback" not in done.stderr


def test_a_cluster_without_a_cpu_for_data_tasks_is_refused_instead_of_waited_for(shards: Path, tmp_path: Path) -> None:
    address = free_address()
    start = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--port={address.rpartition(':')[2]}",
    ]
    quiet = ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
    cluster = subprocess.Popen([*start, *quiet], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        assert cluster.stdout
        for line in cluster.stdout:
            if "--block" in line:  # the last lines of a start that has gone well
                break
        arguments = (*RUN, f"data.shards={shards}", f"run.directory={tmp_path}", "train.workers=2")
        done = pretrain(*arguments, f"run.address={address}", "train.wait=5")
    finally:
        kill_tree(cluster)
        if cluster.stdout:
            cluster.stdout.close()
    assert done.returncode == 2, done.stderr
    waiting, error = done.stderr.splitlines()
    assert waiting.startswith("waiting up to 5 s for room: train.workers=2 would leave no CPU for data tasks")
    assert error.startswith("error: train.workers=2 would leave no CPU for data tasks")
