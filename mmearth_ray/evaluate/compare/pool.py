"""Points as Ray tasks: as many at once as there is room for, each result handed over as it comes, failures as one line.

With no workers at all they are computed one after another in this process, without Ray.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mmearth_ray.errors import DataError, UsageError, one_line

Job = TypeVar("Job")

RETRIES = 1
"""Times that Ray starts a task again whose process or machine died: once, as a machine that is taken away is no fault."""


@dataclass(frozen=True)
class Failure:
    """Why there is no result: one line for people, and for what is no error of theirs where in the code it arose."""

    line: str
    trace: str = ""


def run_jobs(
    jobs: Sequence[Job], work: Callable[[Job], Any], *, workers: int | None, cpus: int = 1, gpus: float = 0
) -> Iterator[tuple[Job, Any]]:
    """Yield every job with its result, or a `Failure`, in the order in which they end.

    `workers`: jobs at once, None for as many as there are CPUs (or GPUs) for, 0 for this process.  Raises UsageError where no
    machine has what a job needs.
    """
    if workers == 0:
        yield from ((job, _guarded(work, job)) for job in jobs)
        return
    import os

    import ray

    from mmearth_ray.cluster import join_or_start
    from mmearth_ray.tasks import in_turn

    join_or_start((workers or max(1, (os.cpu_count() or 1) // cpus)) * cpus)
    _require_room(cpus, gpus)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_guarded)
    places = lambda: workers or _places(cpus, gpus)  # noqa: E731
    yield from in_turn(jobs, lambda job: task.remote(work, job), _result, places, kill=True)


def _guarded(work: Callable[[Job], Any], job: Job) -> Any:
    """The result, or what is told of the error that came in its place."""
    try:
        return work(job)
    except Exception as error:  # one job that fails ends no others; the report shows it, its file the whole of it
        return told(error)


def told(error: Exception) -> Failure:
    """An error as people are told of it: what they can mend in one line, anything else with the place where it arose."""
    if isinstance(error, UsageError | DataError):
        return Failure(one_line(error, 400))
    return Failure(f"{type(error).__name__}: {one_line(error)}", "".join(traceback.format_exception(error)))


def _result(reference: Any) -> Any:
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError

    try:
        return ray.get(reference)
    except OutOfMemoryError:
        return Failure("Ray stopped it because the memory of its machine was nearly full; use fewer workers")
    except WorkerCrashedError:
        return Failure("its process died, perhaps killed for want of memory; if it does so again, use fewer workers")
    except RayError as error:
        return Failure(f"Ray lost it ({type(error).__name__}: {one_line(error)})")


def _places(cpus: int, gpus: float) -> int:
    """Jobs that the cluster has room for at once, and a few that wait at hand."""
    import ray

    found = ray.cluster_resources()
    room = min(found.get("CPU", 1) // cpus, found.get("GPU", 0) // gpus if gpus else float("inf"))
    return max(1, int(room)) + 2


def _require_room(cpus: int, gpus: float) -> None:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus and not any(node.get("GPU", 0) >= gpus for node in nodes):
        raise UsageError("gpus=true needs a GPU, and no machine that Ray knows has one; use gpus=false")
    if not any(node.get("CPU", 0) >= cpus for node in nodes):
        most = max((node.get("CPU", 0) for node in nodes), default=0)
        raise UsageError(f"threads={cpus}: no machine that Ray knows has so many CPUs for tasks, the largest has {most:g}")
