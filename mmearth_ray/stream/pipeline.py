"""The Ray Data pipeline: data tasks prepare batches ahead of a train worker, in the exact order of the plan.

Each worker builds its own dataset here, inside its loop, so that Ray's resource limits are per worker and the order needs
no agreement between workers.  A dataset is a range of task numbers; a task computes its positions from its number, reads
the row groups and yields finished batches.  Long runs are cut into windows of tasks, so that no graph grows with the run.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, cast

import numpy as np
import ray
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import RayError

from mmearth_ray.errors import DataError
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import Batch, bytes_per_tile
from mmearth_ray.stream.source import Source

TASKS_PER_WINDOW = 1024
FIRST_WINDOW = 32
"""Data tasks of one dataset: at most, and of the first one.  Ray Data puts every task's number into the object store before it
begins any task, which takes a second or two for a thousand."""

BLOCK_SHARE = 0.9
"""Target size of a block as a share of a batch: Ray Data closes a block once it exceeds the target and cuts it where it is
half as large again, so that with less than 1 and more than 2/3 every batch is one block, neither copied together with
others nor cut up to be put together again in the train worker."""


@dataclass(frozen=True)
class Share:
    """What one worker's pipeline may use of the cluster: logical CPUs of data tasks, and bytes of the object store."""

    cpus: float
    object_store_bytes: int


def stream(
    source: Source, ranges: MicroBatches, *, tiles_per_task: int, read_ahead: int, share: Share, window: int = TASKS_PER_WINDOW
) -> Iterator[Batch]:
    """The batches of those position ranges, in order, prepared ahead by Ray Data tasks, at most `window` of them in a dataset.

    The next window is begun before the last batches of one are taken, so that reading ahead goes on.  Raises DataError, as the
    task that met it put it, if a shard is missing or damaged.
    """
    per_task = _batches_per_task(source, ranges, max(tiles_per_task, source.tiles_held))
    wanted = wanted_bytes(source, ranges.micro_batch, tiles_per_task=tiles_per_task, read_ahead=read_ahead)
    _configure(share, wanted, ranges.micro_batch * _tile_bytes(source))

    held = ray.put(source)

    def begin(tasks: range) -> Iterator[Batch]:
        count = len(tasks)
        task_numbers = ray.data.range(count, override_num_blocks=count)
        prepare = cast(Any, _Prepare(held, ranges, tasks.start, per_task))
        dataset = task_numbers.map_batches(prepare, batch_size=None, num_cpus=min(1.0, share.cpus))
        found = dataset.iter_batches(batch_size=ranges.micro_batch, prefetch_batches=read_ahead, batch_format="numpy")
        return cast(Iterator[Batch], iter(found))

    every = list(windows(-(-len(ranges) // per_task), window))
    try:
        with ThreadPoolExecutor(1, "next-window") as pool:
            current = begin(every[0]) if every else iter(())
            for tasks, following in zip(every, [*every[1:], None], strict=True):
                coming, left = None, min(tasks.stop * per_task, len(ranges)) - tasks.start * per_task
                for batch in current:
                    left -= 1
                    if coming is None and following and left <= read_ahead:
                        coming = pool.submit(_begun, begin(following))
                    yield batch
                current = coming.result() if coming else iter(())
    except RayError as error:
        raise user_error(error) or error from error


def wanted_bytes(source: Source, micro_batch: int, *, tiles_per_task: int, read_ahead: int) -> int:
    """Bytes of the object store that a worker's pipeline asks for: twice the batches that are ready or under way."""
    tiles_ahead = read_ahead * micro_batch + 2 * max(tiles_per_task, source.tiles_held, micro_batch)
    return 2 * tiles_ahead * _tile_bytes(source)


def _tile_bytes(source: Source) -> int:
    """Of a prepared tile, of the largest of the image sizes."""
    return max(bytes_per_tile(spec) for spec in (source.spec, *source.turns))


def windows(tasks: int, most: int) -> Iterator[range]:
    """The numbers of so many tasks, cut into ranges each twice as long as the one before, of `most` at most."""
    first, count = 0, min(FIRST_WINDOW, most)
    while first < tasks:
        yield range(first, min(first + count, tasks))
        first, count = first + count, min(2 * count, most)


def _begun(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, of which the first has been made: until it is asked for, Ray Data does nothing."""
    return chain([next(batches)], batches)


def _batches_per_task(source: Source, ranges: MicroBatches, tiles_per_task: int) -> int:
    """Where crops of several sizes take turns a task stays within a step, for Ray Data joins its small batches to a block."""
    most = max(1, tiles_per_task // ranges.micro_batch)
    return max(n for n in range(1, min(most, ranges.per_step) + 1) if ranges.per_step % n == 0) if source.turns else most


@dataclass(frozen=True, eq=False)
class _Prepare:
    """The function of a data task: task numbers in, finished batches out, one at a time."""

    source: ray.ObjectRef
    ranges: MicroBatches
    first: int
    per_task: int

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[Batch]:
        for task in batch["id"].tolist():
            begin = (self.first + task) * self.per_task
            numbers = range(begin, min(begin + self.per_task, len(self.ranges)))
            yield from _source_of(self.source).batches(self.ranges[number] for number in numbers)


@lru_cache(maxsize=2)
def _source_of(held: ray.ObjectRef) -> Source:
    """A source of the object store: what it holds of a large data set, and works out of it, serves many tasks of a process."""
    return ray.get(held)


class Breathe(ExecutionCallback):
    """A pause after every step of Ray Data's scheduler, which runs in a thread of the train worker.

    While finished batches wait for the consumer the scheduler does not block: it would turn without a pause, hold the
    interpreter and take two thirds of a core from the training step, which then runs at half its speed.  One turn costs a
    millisecond and more, so the pause grows with the batches that wait: where there are many nothing is urgent.  It ends
    early, within a slice, once a fast consumer has taken them all.
    """

    SECONDS = 0.02
    MOST_SLICES = 12

    def on_execution_step(self, executor: Any) -> None:
        for _ in range(min(self.MOST_SLICES, 1 + 2 * _batches_waiting(executor))):
            time.sleep(self.SECONDS)
            if not _batches_waiting(executor):
                return


def _batches_waiting(executor: Any) -> int:
    """Finished batches that the consumer has not taken; 0 if this Ray keeps them elsewhere, for the place is private."""
    try:
        _, state = executor._output_node
        return len(state.output_queue)
    except (AttributeError, TypeError, ValueError):
        return 0


def _configure(share: Share, wanted_bytes: int, batch_bytes: int) -> None:
    """Set this process's limits for Ray Data.  Order is kept and nothing is printed.

    Without a tight bound on finished batches, data tasks would fill the object store at a run's start, at full speed, and
    take the cores from the train workers of a small machine while they do.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        cpu=share.cpus, object_store_memory=min(share.object_store_bytes, wanted_bytes)
    )
    context.custom_execution_callback_classes = [Breathe]
    context.target_max_block_size = max(1, int(BLOCK_SHARE * batch_bytes))
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def user_error(error: BaseException | None) -> DataError | None:
    """The DataError behind an error that Ray wrapped, if that is what it was.

    A wrapper of Ray's also is an instance of what it wraps, but its text is a traceback: the innermost one counts.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        inner: Any = getattr(error, "cause", None)
        if isinstance(error, DataError) and not isinstance(error, RayError):  # Ray Data appends advice to its text
            return DataError(str(error).splitlines()[0])
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
    return None
