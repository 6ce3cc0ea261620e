"""Points of a sweep as Ray tasks: each in a fresh process, alone on the cores of a node or on a GPU.

On several nodes points run side by side, one per node (or per GPU), so that no measurement disturbs another.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from benchmarks.record import circumstances
from benchmarks.sweep_point import Measurement, Point, measure
from mmearth_ray.cluster import join_or_start
from mmearth_ray.errors import UsageError

Outcome = tuple[Point, dict[str, Any], Measurement | str]
"""A point, where it was measured, and its numbers, or why there are none."""


def run_tasks(points: Sequence[Point]) -> Iterator[Outcome]:
    """Yield the outcome of every point as it comes.  Raises UsageError if the cluster has no place for them."""
    join_or_start(os.cpu_count() or 1)
    task = ray.remote(max_calls=1, max_retries=0)(measure_here)
    running = {task.options(**resources(point.device)).remote(point): point for point in points}
    try:
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            yield _outcome(running.pop(ready), ready)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def resources(device: str) -> dict[str, float]:
    """What one point asks Ray for: every CPU of a node, the largest where they differ, or one GPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
    if device == "cuda" and most["GPU"] < 1:
        raise UsageError("device=cuda needs a GPU, and no node of the cluster has one; use device=cpu")
    if device == "cpu" and most["CPU"] < 1:
        raise UsageError("device=cpu needs a node with CPUs for tasks, and the cluster has none; start one with --num-cpus")
    return {"num_cpus": 1, "num_gpus": 1} if device == "cuda" else {"num_cpus": most["CPU"]}


def measure_here(point: Point) -> tuple[dict[str, Any], Measurement]:
    """What a task runs: the point, measured with all cores that this process may use."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return circumstances("benchmarks.sweep"), measure(point)


def _outcome(point: Point, reference: Any) -> Outcome:
    try:
        about, result = ray.get(reference)
    except RayError as error:
        return point, {}, reason(error)
    return point, about, result


def reason(error: RayError) -> str:
    """One line on why a point has no numbers."""
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return f"{type(cause).__name__}: {lines[0][:300] if lines else 'no message'}"
    if isinstance(error, OutOfMemoryError):
        return "Ray stopped it because the memory of its machine was nearly full; use a smaller batch"
    if isinstance(error, WorkerCrashedError):
        return "its process died, perhaps killed for want of memory; if it does so again, use a smaller batch"
    return f"Ray lost it ({type(error).__name__})"
