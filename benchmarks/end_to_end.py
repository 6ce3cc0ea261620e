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

START_SECONDS = 300.0
"""How long a run may take to its first step."""


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
    steps after the first `warm`.  The run must be one that would go on.  Raises DataError if it ends by itself."""
    log = run.with_suffix(".log")
    command = [sys.executable, "-m", "mmearth_ray.pretrain", *arguments]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            tree = Tree(process.pid)
            begin, first, before = _reach(process, tree, run / METRICS, warm, log)
            end, last, after = _reach(process, tree, run / METRICS, first + steps, log)
        finally:
            process.terminate()
            process.wait()
    lines = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    trained = (last - first) * tiles
    cpu = {role: seconds / trained for role, seconds in tree.spent(before, after).items()}
    return Passage(trained / (end - begin), data_wait(lines[first:last], tiles), cpu, tree.peak)


def _reach(process: subprocess.Popen, tree: Tree, metrics: Path, step: int, log: Path) -> tuple[float, int, dict[int, float]]:
    """Wait for that many lines of the metrics.  Returns the time in seconds, the lines, and CPU seconds by process."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None:
        seconds, now = tree.look(), time.perf_counter()
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if done >= step:
            return now, done, seconds
        if not done and time.monotonic() > deadline:
            raise DataError(f"the run made no step in {START_SECONDS:g} s; {log} tells more")
        time.sleep(LOOK_SECONDS)
    last = (log.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]
    raise DataError(f"the run ended before step {step}: {last}")


def data_wait(lines: Sequence[dict], tiles: int) -> float:
    """The share of the time of those lines' steps, of `tiles` tiles each, that was spent waiting for data."""
    seconds = [tiles / line["tiles_per_second"] for line in lines]
    return sum(line["data_wait"] * took for line, took in zip(lines, seconds, strict=True)) / sum(seconds)
