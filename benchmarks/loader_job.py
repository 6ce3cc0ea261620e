"""One way of loading, measured in this process and those that it starts.

    python -m benchmarks.loader_job JOB      prints one line of JSON (benchmarks.loader_clock: Job, Stretch)

Each consumer takes batches and does nothing with them.  `raw`, `checked`, `reader` and `hdf5` are consumed where they are
made, in one process for each core; `processes` hand theirs over through shared memory, one reader to one consumer for each
core; `pipeline` has a consumer for each core, as training has workers, with the data tasks and limits that training gives them;
`torch` is one consumer with a worker process for each core, or none where there is one core.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.loader_clock import LINGER, Job, Stretch, Taken, pin, stretch, take
from benchmarks.loader_source import endless, open_shards, ranges
from mmearth_ray.errors import run_command
from mmearth_ray.stream.prepare import bytes_per_tile

SLACK = 4096
"""Bytes of a sample in a slot beside its maps: identifiers, vectors, labels, masks."""


def main(arguments: list[str]) -> int:
    job = Job.from_json(arguments[0])
    pin(job.cores)
    print(json.dumps(asdict(_pipeline(job) if job.way == "pipeline" else together(job))))
    return 0


def together(job: Job) -> Stretch:
    """As many consumers as the way has on so many cores, all at the same time."""
    count = 1 if job.way == "torch" else job.cores
    if count == 1:
        taken = [consume(job, 0, 1)]
        time.sleep(LINGER)
        return stretch(taken, job.warm)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        found = [pool.submit(consume, job, rank, count) for rank in range(count)]
        taken = [future.result() for future in found]
        time.sleep(LINGER)
    return stretch(taken, job.warm)


def consume(job: Job, rank: int, count: int) -> Taken:
    """Take what one of `count` consumers gets."""
    return take(WAYS[job.way](job, rank), job, rank, count)


# ---- the ways: tiles of each batch ----


def _raw(job: Job, rank: int, *, checked: bool = False) -> Iterator[int]:
    """Row groups, as pyarrow reads their used columns; `checked`: and verifies their pages, which our reader does too."""
    import pyarrow.parquet as pq

    from mmearth_ray.stream.reader import used_columns

    source = open_shards(job.data, job.image, job.patch)
    columns = used_columns(source.spec.modalities)
    files = [pq.ParquetFile(str(shard.place), page_checksum_verification=checked) for shard in source.sets[0].shards]
    groups = [(file, group) for file in files for group in range(file.num_row_groups)]
    for file, group in cycle(groups[rank:] + groups[:rank]):
        yield file.read_row_group(group, columns=columns, use_threads=False).num_rows


def _reader(job: Job, rank: int) -> Iterator[int]:
    return map(_tiles, read(job, rank))


def _tiles(batch: Any) -> int:
    return len(batch["id"])


def read(job: Job, rank: int, workers: int = 0) -> Iterator[Any]:
    """Our reader's batches for one of so many workers; without a number, one for each core."""
    source = open_shards(job.data, job.image, job.patch)
    return source.batches(ranges(job.batch, workers or job.cores, rank))


def _processes(job: Job, rank: int) -> Iterator[int]:
    from benchmarks.loader_shared import from_process

    source = open_shards(job.data, job.image, job.patch)
    slot = job.batch * (bytes_per_tile(source.spec) + SLACK)
    return map(_tiles, from_process(read, (job, rank), slot))


def _torch(job: Job, rank: int) -> Iterator[int]:
    """PyTorch's DataLoader over our reader; a worker of it reads its share of the batches."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    torch.set_num_threads(1)

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            worker = get_worker_info()
            return read(job, worker.id if worker else 0, worker.num_workers if worker else 1)

    for batch in DataLoader(Stream(), batch_size=None, num_workers=job.cores if job.cores > 1 else 0):
        yield len(batch["id"])


def _hdf5(job: Job, rank: int) -> Iterator[int]:
    from benchmarks.loader_hdf5 import batches

    return map(_tiles, batches(job.data, job.image, job.batch, rank))


WAYS: dict[str, Callable[[Job, int], Iterator[int]]] = {
    "raw": _raw, "checked": partial(_raw, checked=True), "reader": _reader, "processes": _processes, "torch": _torch,
    "hdf5": _hdf5,
}  # fmt: skip


# ---- the pipeline ----


def _pipeline(job: Job) -> Stretch:
    """A Ray of our own, and a consumer in an actor for each core."""
    import ray

    from mmearth_ray import config as configuration
    from mmearth_ray.train.launch import start_ray
    from mmearth_ray.train.room import wait_for_room

    config = configuration.load([f"train.workers={job.cores}", f"train.global_batch={job.cores * job.batch}"])
    start_ray(config)
    room = wait_for_room(config, gpus=False)
    assert room
    share = room.share
    source = ray.put(open_shards(job.data, job.image, job.patch))
    consumer: Any = ray.remote(num_cpus=1)(_Consumer)
    actors = [consumer.remote() for _ in range(job.cores)]
    ray.get([actor.ready.remote() for actor in actors])
    work = partial(_from_pipeline, job, config.data.tiles_per_task, config.data.read_ahead, share)
    taken = ray.get([actor.run.remote(work, source, job, rank) for rank, actor in enumerate(actors)])
    time.sleep(LINGER)
    return replace(stretch(taken, job.warm), spilled=_spilled())


class _Consumer:
    """A process of Ray's, as a train worker is one."""

    def ready(self) -> None:
        """Import what a train worker has imported when its loop begins."""
        import mmearth_ray.stream.pipeline  # noqa: F401

    def run(self, work: Callable[..., Iterator[int]], source: Any, job: Job, rank: int) -> Taken:
        return take(work(source, rank), job, rank, job.cores)


def _from_pipeline(job: Job, tiles_per_task: int, read_ahead: int, share: Any, source: Any, rank: int) -> Iterator[int]:
    from mmearth_ray.stream.pipeline import stream

    batches = endless(job.batch, job.cores, rank)
    return map(_tiles, stream(source, batches, tiles_per_task=tiles_per_task, read_ahead=read_ahead, share=share))


def _spilled() -> bool:
    """Whether Ray's object store wrote to disk since it was started: the folder is made when it first does."""
    import ray

    context = ray.get_runtime_context()
    return any((Path(context.get_temp_dir()) / context.get_session_name()).glob("ray_spilled_objects*"))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
