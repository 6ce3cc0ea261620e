"""A way of loading, measured from outside in a process of its own: its rate, and what it takes of the machine for it."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np

from benchmarks.loader_clock import Job, Stretch
from benchmarks.loader_tiles import PEERS, ROOT
from benchmarks.process_tree import Tree
from mmearth_ray.errors import DataError

OURS = (sys.executable, "-m", "benchmarks.loader_job")
THEIRS = (str(PEERS), "-m", "benchmarks.loader_peers", "measure")

LOOK_SECONDS = 0.25
"""Between two looks at the processes: each costs some milliseconds."""

PATIENCE = 240.0
"""Seconds that a measurement may take in all."""


@dataclass(frozen=True)
class Measured:
    """Tiles per second of all consumers, CPU seconds per tile of all processes, the most bytes they used, seconds to the first
    batch, and whether Ray wrote to disk."""

    tiles_per_second: float
    cpu_per_tile: float
    peak: int
    first: float
    spilled: bool


def watch(job: Job, command: Sequence[str] = OURS) -> Measured:
    """Measure a job in new processes.  Raises DataError, with its last words, if that fails."""
    looks: list[tuple[float, float]] = []
    with TemporaryDirectory() as meeting, TemporaryFile("w+") as errors:
        arguments = [*command, replace(job, meeting=meeting).to_json()]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT) as process:
            tree, deadline = Tree(process.pid), time.monotonic() + PATIENCE
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    looks.append((time.monotonic(), sum(tree.look().values())))
                    time.sleep(LOOK_SECONDS)
            finally:
                process.kill()
            lines = (process.stdout.read() if process.stdout else "").splitlines()
        errors.seek(0)
        if process.returncode or not lines:
            words = (errors.read().strip().splitlines() or [f"nothing within {PATIENCE:g} s"])[-1]
            raise DataError(f"{job.way} on {job.cores} cores was not measured: {words}")
    return measured(Stretch(**json.loads(lines[-1])), looks, tree.peak)


def measured(found: Stretch, looks: Sequence[tuple[float, float]], peak: int) -> Measured:
    """Put together what a job tells and what was seen of it: (time, CPU seconds so far) at each look."""
    times, seconds = zip(*looks, strict=True)
    spent = float(np.diff(np.interp([found.begin, found.end], times, seconds))[0])
    per_tile = spent / (found.end - found.begin) / found.tiles_per_second
    return Measured(found.tiles_per_second, per_tile, peak, found.first, found.spilled)
