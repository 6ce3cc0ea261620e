"""The Slurm script, with a Slurm and an interpreter that only play their parts: what it starts, passes on and takes down."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from slurm import SCRIPT, install, notes

ROLES = f"""#!{sys.executable}
import os, signal, socket, sys, time
arguments = sys.argv[1:]
log = os.open(os.environ["ROLES_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(*words):  # a line at once: a signal may come at any time
    os.write(log, (" ".join(map(str, words)) + chr(10)).encode())
if arguments[:2] == ["-m", "ray.scripts.scripts"]:
    head = [a for a in arguments if a.startswith("--port=")]
    listening = socket.create_server(("", int(head[0].partition("=")[2]))) if head else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(note("ray down", bool(head))))
    note("ray", *arguments)
    if not head and os.environ.get("RAY_ENDS"):
        sys.exit(3)
    while True:
        time.sleep(1)
elif arguments[:2] == ["-m", "mmearth_ray.pretrain"]:
    def save(*_):
        note("saved")
        sys.exit(int(os.environ.get("SAVING_CODE", "0")))
    signal.signal(signal.SIGTERM, save)
    note("run", os.environ["RAY_ADDRESS"], os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]), *arguments[2:])
    if code := os.environ.get("RUN_CODE"):
        sys.exit(int(code))
    while True:
        time.sleep(1)
elif arguments[0] == "-" and len(arguments) == 2:  # whether so many nodes have joined
    with open(os.environ["ROLES_LOG"]) as lines:
        there = sum(line.startswith("ray -m") for line in lines)
    sys.exit(there < int(arguments[1]) or int(arguments[1]) > 1 and bool(os.environ.get("NEVER_JOINS")))
else:
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
"""


@contextmanager
def batch(folder: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The script on two nodes, as Slurm starts it."""
    everything = install(folder, nodes=2, cpus=3)
    (folder / "python").write_text(ROLES)
    (folder / "python").chmod(0o755)
    everything |= {"PYTHON": str(folder / "python"), "ROLES_LOG": str(folder / "log"), "SLURM_GPUS_ON_NODE": "4", **environment}
    process = subprocess.Popen(
        [SCRIPT, *arguments],
        env=everything,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def has_run(folder: Path) -> bool:
    return any(line.startswith("run ") for line in log(folder))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_nothing_is_left(folder: Path) -> None:
    assert notes(folder, "srun")
    assert [pid for pid, _ in notes(folder, "srun") if alive(pid)] == []


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_runs_code_is_the_jobs_and_ray_is_taken_down_head_last(code: int, tmp_path: Path) -> None:
    with batch(tmp_path, "a.yaml", "train.steps=3", "data.where=split == 'train'", RUN_CODE=str(code)) as process:
        output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output
    head, worker, run, *down = log(tmp_path)
    assert head.startswith("ray -m ray.scripts.scripts start --block --num-cpus=3 --num-gpus=4")
    assert " --head " in head
    assert f"--address={run.split()[1]}" in worker
    assert run.split(" ", 2)[2] == "token 64 a.yaml train.steps=3 data.where=split == 'train'"
    assert down == ["ray down False", "ray down True"]
    assert_nothing_is_left(tmp_path)
    assert [call for _, call in notes(tmp_path, "scontrol") if call[0] == "requeue"] == []
    (first, second) = [options for _, options in notes(tmp_path, "srun")]
    assert {"--nodes=1", "--ntasks=1", "--cpus-per-task=3"} <= set(first) & set(second)


@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_saves_and_only_the_time_limits_queues_the_job_again(
    number: signal.Signals, queued: bool, tmp_path: Path
) -> None:
    with batch(tmp_path) as process:
        wait_for(lambda: has_run(tmp_path), process)
        process.send_signal(number)  # to the script alone, as --signal=B: and scancel --batch do
        output = process.communicate(timeout=60)[0]
        job = f"{os.getpid()}2"
    assert process.returncode == 0, output
    assert log(tmp_path)[-3:] == ["saved", "ray down False", "ray down True"]
    assert_nothing_is_left(tmp_path)
    requeued = [call for _, call in notes(tmp_path, "scontrol") if call[0] == "requeue"]
    assert requeued == ([["requeue", job]] if queued else [])
    assert ("queued again" in output) == queued


def test_a_run_that_could_not_save_is_not_queued_again(tmp_path: Path) -> None:
    with batch(tmp_path, SAVING_CODE="1") as process:
        wait_for(lambda: has_run(tmp_path), process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 1
    assert [call for _, call in notes(tmp_path, "scontrol") if call[0] == "requeue"] == []


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"RAY_ENDS": "1", "NEVER_JOINS": "1"}, "error: Ray ended on one of "),
        ({"NEVER_JOINS": "1", "JOIN_SECONDS": "2"}, "error: not all of "),
    ],
)  # fmt: skip
def test_nodes_that_do_not_join_end_the_job_with_a_line(trouble: dict[str, str], message: str, tmp_path: Path) -> None:
    with batch(tmp_path, **trouble) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert message in output
    assert not has_run(tmp_path)
    assert_nothing_is_left(tmp_path)


def test_slurm_is_told_to_warn_the_script_before_the_limit_and_to_allow_another_start() -> None:
    options = dict(
        (line.removeprefix("#SBATCH --") + "=").split("=", 1)
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["signal"] == "B:USR1@600="
    assert {"requeue", "exclusive", "open-mode"} <= set(options)
    assert options["ntasks-per-node"] == "1="
