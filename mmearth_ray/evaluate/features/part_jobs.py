"""Computing the parts of features that are missing, in this process or as Ray tasks.

Ray is only loaded where it is used.
"""

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mmearth_ray import __version__
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import load_task
from mmearth_ray.evaluate.features.encoders import Subject
from mmearth_ray.evaluate.features.extraction import extractor, features_of, torch_threads
from mmearth_ray.evaluate.features.feeding import Feed
from mmearth_ray.evaluate.features.parts import Computed, PartKey, write_part


@dataclass(frozen=True)
class PartJob:
    """What a task needs to compute one part."""

    subject: Subject
    feed: Feed
    folder: Path
    key: PartKey
    path: Path
    batch: int
    threads: int
    gpu: bool


def run_jobs(jobs: dict[int, PartJob], workers: int | None) -> Iterator[int]:
    """Compute parts; give the number of each as it is finished.

    With `workers=0`, or for a single part on a CPU, in this process; otherwise as Ray tasks, so many at once, or all for None.
    """
    one = next(iter(jobs.values()), None)
    if one and workers != 0 and (len(jobs) > 1 or one.gpu):
        yield from _run_tasks(jobs, one.threads, one.gpu, workers)
        return
    for index, job in jobs.items():
        compute_part(job)
        yield index


def _run_tasks(jobs: dict[int, PartJob], threads: int, gpu: bool, workers: int | None) -> Iterator[int]:
    import ray

    from mmearth_ray.cluster import join_or_start
    from mmearth_ray.tasks import in_turn, result_of

    join_or_start((workers or max(1, (os.cpu_count() or 1) // threads)) * threads)
    if gpu and not ray.cluster_resources().get("GPU"):
        raise UsageError("gpus=true, and Ray knows of no GPU; leave the key out, or start Ray where there is one")
    task = ray.remote(num_cpus=threads, num_gpus=int(gpu), max_retries=3)(compute_part)
    start, result = lambda job: task.remote(job[1]), partial(result_of, doing="computed features", kept="parts")
    for (index, _), _ in in_turn(jobs.items(), start, result, lambda: workers or len(jobs)):
        yield index


def compute_part(job: PartJob) -> None:
    """Compute and write one part.  Raises DataError as `compute` does."""
    task = load_task(job.folder)
    if task.info.digest != job.key.task:
        raise DataError(f"{job.folder} is no longer the data set that it was; run the command again")
    if job.gpu and not torch.cuda.is_available():
        raise UsageError("gpus=true, and PyTorch finds no GPU; leave the key out")
    device = torch.device("cuda" if job.gpu else "cpu")
    rows = range(job.key.start, job.key.stop)
    with torch_threads(job.threads):
        extract = extractor(job.subject, job.feed, task.info.goal, device)
        values, seconds = features_of(task, rows, extract, job.subject.name, batch=job.batch, dtype=job.key.dtype,
                                      clock=time.perf_counter if job.gpu else time.process_time)  # fmt: skip
    computed = Computed(
        shape=values.shape[1:], images=len(rows), seconds=seconds, clock="gpu" if job.gpu else "cpu", threads=job.threads,
        device=torch.cuda.get_device_name() if job.gpu else platform.processor() or platform.machine(),
        versions=f"mmearth_ray {__version__}, torch {torch.__version__}, python {platform.python_version()}",
    )  # fmt: skip
    write_part(job.path, job.key, computed, task.ids[rows.start : rows.stop], values)
