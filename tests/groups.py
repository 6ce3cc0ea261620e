"""Groups of worker processes, joined by gloo, that run many cases one after the other: starting them is what takes time."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

SECONDS = 560.0


def in_a_group(
    workers: int,
    folder: Path,
    job: Callable[..., None],
    *arguments: Any,
    seconds: float = SECONDS,
    patience: float | None = None,
) -> None:
    """Run `job(rank, workers, *arguments)` in so many processes.  Fails if one of them does.

    `patience`: the seconds that a collective operation is given, if not gloo's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"rendezvous-{uuid4().hex}"  # one that has been used never lets the next group meet
    context = multiprocessing.get_context("spawn")
    given = (workers, str(store), patience, job, *arguments)
    processes = [context.Process(target=_member, args=(rank, *given)) for rank in range(workers)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(seconds)
        assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def _member(rank: int, workers: int, store: str, patience: float | None, job: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    join = partial(dist.init_process_group, "gloo", rank=rank, world_size=workers)
    join(init_method=f"file://{store}")
    dist.barrier()
    if patience:  # now that all are there
        dist.destroy_process_group()
        join(init_method=f"file://{store}-again", timeout=timedelta(seconds=patience))
    job(rank, workers, *arguments)
    if not patience:
        dist.barrier()
    dist.destroy_process_group()
