"""Ray tasks, so many at once: shards that are written, features that are computed, encoders that are scored."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from mmearth_ray.errors import DataError, UsageError

Job = TypeVar("Job")

END_SECONDS = 60.0
"""That tasks have to remove what they have begun, once they are cancelled."""


def in_turn(
    jobs: Iterable[Job],
    start: Callable[[Job], Any],
    result: Callable[[Any], Any],
    at_once: Callable[[], int],
    *,
    kill: bool = False,
) -> Iterator[tuple[Job, Any]]:
    """Yield every job with what `result` makes of the reference of its finished task, in the order in which they end.

    `start` hands a job to Ray.  `at_once` says how many may be there, and is asked again before each, as clusters grow.  What
    still runs when an error or the caller ends this is cancelled and has time to end, or with `kill` its process ends at once.
    Ray cancels by SIGINT, which a background job of a shell ignores: its tasks end by themselves, or with Ray.
    """
    waiting, running = deque(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < max(1, at_once()):
                job = waiting.popleft()
                running[start(job)] = job
            (reference,), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(reference), result(reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=kill)
        if running and not kill:
            ray.wait(list(running), num_returns=len(running), timeout=END_SECONDS)


def result_of(reference: Any, doing: str, kept: str) -> Any:
    """What a finished task returned.

    Raises the task's DataError or UsageError as if it were raised here, DataError where its process died while it was `doing`
    what it does, with `kept` for what is not lost.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DataError | UsageError):
            raise type(error.cause)(str(error.cause)) from error
        raise
    except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
        raise DataError(
            f"a worker died while it {doing} ({type(error).__name__}); run the command again, perhaps with fewer workers: "
            f"finished {kept} are kept"
        ) from error
