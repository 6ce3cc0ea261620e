"""A pretraining run as its users start it, watched from outside until it has made enough steps, then asked to stop."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process_tree import WORKERS, Tree
from mmearth_ray.errors import DataError
from mmearth_ray.train.journal import METRICS

LOOK_SECONDS = 0.25
"""Between two looks at the run: each costs some milliseconds."""

STEP_SECONDS = 300.0
"""How long a run may take to its first step, and from one to the next line of its metrics."""

STOP_SECONDS = 120.0
"""How long a run may take to save and end once it is asked to."""


@dataclass(frozen=True)
class Passage:
    """A steady stretch of a run: tiles per second, the share of its time that steps waited for data, CPU seconds per tile by
    role (`benchmarks.process_tree`), and the most memory in bytes that all processes used since the start."""

    tiles_per_second: float
    data_wait: float
    cpu_per_tile: dict[str, float]
    peak: int

    @property
    def outside(self) -> float:
        """CPU seconds per tile of everything but the train workers."""
        return sum(seconds for role, seconds in self.cpu_per_tile.items() if role != WORKERS)


def watch(arguments: Sequence[str], run: Path, *, tiles: int, warm: int, steps: int) -> Passage:
    """Pretrain with those arguments, whose run directory is `run` and whose steps are of `tiles` tiles, and measure `steps`
    steps after the first `warm`.  The run must be one that would go on.  Raises DataError if it ends by itself, stands still or
    does not end well when it is asked to."""
    log = run.with_suffix(".log")
    command = [sys.executable, "-m", "mmearth_ray.pretrain", *arguments]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            tree = Tree(process.pid)
            begin, first, before = _reach(process, tree, run / METRICS, warm, log)
            end, last, after = _reach(process, tree, run / METRICS, first + steps, log)
        finally:
            code = stop(process)
    if code:
        raise DataError(f"the run ended with exit code {code} when it was asked to stop: {_last_line(log)}")
    lines = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    trained = (last - first) * tiles
    cpu = {role: seconds / trained for role, seconds in tree.spent(before, after).items()}
    return Passage(trained / (end - begin), data_wait(lines[first:last], tiles), cpu, tree.peak)


def stop(process: subprocess.Popen, patience: float = STOP_SECONDS) -> int:
    """Ask the process to end, and kill it where it has not after so many seconds.  Returns its exit code."""
    process.terminate()
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _reach(
    process: subprocess.Popen, tree: Tree, metrics: Path, step: int, log: Path, patience: float = STEP_SECONDS
) -> tuple[float, int, dict[int, float]]:
    """Wait for that many lines of the metrics, so many seconds for each.  Returns the time in seconds, the lines, and CPU
    seconds by process."""
    seen, deadline = 0, time.monotonic() + patience
    while process.poll() is None:
        seconds, now = tree.look(), time.perf_counter()
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if done >= step:
            return now, done, seconds
        if done > seen:
            seen, deadline = done, time.monotonic() + patience
        if time.monotonic() > deadline:
            raise DataError(f"the run made no step in {patience:g} s after {done} steps; its log ends: {_last_line(log)}")
        time.sleep(LOOK_SECONDS)
    raise DataError(f"the run ended before step {step}: {_last_line(log)}")


def _last_line(log: Path) -> str:
    return (log.read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing"])[-1]


def data_wait(lines: Sequence[dict], tiles: int) -> float:
    """The share of the time of those lines' steps, of `tiles` tiles each, that was spent waiting for data."""
    seconds = [tiles / line["tiles_per_second"] for line in lines]
    return sum(line["data_wait"] * took for line, took in zip(lines, seconds, strict=True)) / sum(seconds)
