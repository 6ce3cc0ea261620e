"""Runs the project's commands as a user does: real processes, whose descendants a test can find, stop and kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SMALL = ("model.image_size=32", "model.decoder_width=64", "figure.tiles=0", "train.global_batch=16", "optimizer.lr=1e-3")
WORKER = "ray::RayTrainWorker"


def environment() -> dict[str, str]:
    """This process's environment as it is now, for a command."""
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}


def pretrain(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m mmearth_ray.pretrain` to its end, in `folder` if it is given."""
    return subprocess.run(
        [sys.executable, "-m", "mmearth_ray.pretrain", *arguments],
        capture_output=True, text=True, timeout=560, env=environment(), cwd=folder, check=False,
    )  # fmt: skip


@contextmanager
def pretraining(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The same command in the background; whatever is left of it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmearth_ray.pretrain", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process)
        if process.stdout:
            process.stdout.close()


def kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill -9 a process and all below it, and wait for its end."""
    for pid in [*descendants(process.pid), process.pid]:
        kill(pid, signal.SIGKILL)
    process.wait()


def free_address() -> str:
    """A loopback address with a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def workers_of(pid: int) -> list[int]:
    """The train workers that a pretraining process has started."""
    titles = {child: title_of(child) for child in descendants(pid)}
    return sorted(child for child, title in titles.items() if title.startswith(WORKER))


def title_of(pid: int) -> str:
    """The process's command line, which Ray sets to what a worker does; "" for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def wait_for(condition: Callable[[], Any], what: str, process: subprocess.Popen[str], seconds: float = 240) -> Any:
    """The condition's first true value.  Fails if the process ends or the time passes before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        if process.poll() is not None:
            output = process.stdout.read() if process.stdout else ""
            raise AssertionError(f"the run ended with code {process.returncode} before {what}:\n{output}")
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {seconds:g} s")


def metrics(run_directory: Path) -> list[dict[str, Any]]:
    """The run's lines of metrics; a line still being written is left out."""
    path = run_directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run_directory: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(run_directory)]


def ledger(run_directory: Path) -> dict[int, list[str]]:
    """{step: ids of the global batch, in order of ranks}"""
    steps: dict[int, list[str]] = {}
    for path in sorted((run_directory / "ledger").glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], []).extend(entry["ids"])
    return dict(sorted(steps.items()))
