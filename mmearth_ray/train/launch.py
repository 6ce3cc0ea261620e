"""Launching a run on Ray Train: group after group of workers, until the last step is done.

Ray holds the workers of a group together; what a run has done is on disk.  When a worker is lost, or the cluster has room for
another number of them, the group ends and another begins, which finds the newest checkpoint itself: neither Ray's checkpoint
registry nor its late reports are relied on.
"""

import errno
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from safetensors import SafetensorError

from mmearth_ray.cluster import cluster_address, join_or_start
from mmearth_ray.config import most_workers
from mmearth_ray.errors import DataError
from mmearth_ray.experiment import Experiment
from mmearth_ray.files import write_failure
from mmearth_ray.keys import Config
from mmearth_ray.progress import counted
from mmearth_ray.stream.pipeline import stream, user_error
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import Batch
from mmearth_ray.stream.source import Source
from mmearth_ray.train import checkpoint
from mmearth_ray.train.allocator import KEEP_FREED_MEMORY
from mmearth_ray.train.board import BoardLine, Silent, Stop, Watch, new_board
from mmearth_ray.train.loop import Worker, run
from mmearth_ray.train.ownership import take_over
from mmearth_ray.train.room import FAULTS, Room, ask_for, cluster_now, draining, fitting, last_line, uses_gpus, wait_for_room

OWN_DATA_CPUS = 2
"""Logical CPUs that a Ray of our own has beside its train workers, at least, so that data tasks always find a place."""

START_SECONDS = 60
"""How long a group of workers may take to start: longer where a machine was lost that Ray has not missed yet."""

CHANGE_SECONDS = 15.0
"""How long the cluster must have had room for another number of workers before the run is interrupted for it."""

LOOK_SECONDS = 2.0
"""Between two looks at what the cluster has."""

NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors of the run directory that starting again would only meet again."""

OUT_OF_MEMORY = re.compile("low on memory|CUDA out of memory|OutOfMemoryError|MemoryError|bad_alloc|allocate memory")
"""How Ray's memory monitor, CUDA, Python and PyTorch say so."""

PERHAPS = "OOM killer"
"""What Ray says of a process that a signal ended: the kernel gives no reason."""


def start_ray(config: Config) -> None:
    """Join the cluster of the settings or the environment, or start a Ray with room for data tasks beside the workers."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers stay in the driver's directory
    # a worker that does not answer the controller for this long is taken for hung and replaced
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(config.train.hang_timeout))
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    workers, cores = most_workers(config), os.cpu_count() or 1
    if workers > cores and not cluster_address(config.run.address):
        shared = f"{counted(workers, 'worker')} share the {counted(cores, 'core')} of this machine, where fewer are as fast"
        print(f"warning: train.workers={config.train.workers}: {shared}", file=sys.stderr, flush=True)
    join_or_start(max(workers + max(OWN_DATA_CPUS, workers), cores), config.run.address)


def launch(experiment: Experiment) -> bool:
    """Run the experiment's workers to the last step; returns whether they were asked to stop before.

    Raises UsageError if the cluster has no room for them, DataError for what a worker could not do; what is known of it is in
    `error.log` in the run directory, if that can be written.
    """
    config = experiment.config
    gpus, failures = uses_gpus(config), Failures(experiment)
    _hold_statistics_here()
    try:
        with Stop() as stop:
            workers, again = 0, True
            while again and (room := wait_for_room(config, gpus, lambda: stop.asked, ask_for, again=bool(workers))):
                if workers:
                    experiment = take_over(experiment)
                if workers and room.workers != workers:
                    print(f"going on with {counted(room.workers, 'worker')} instead of {workers}", file=sys.stderr, flush=True)
                workers = room.workers
                try:
                    again = _run_group(experiment, room, gpus, stop)
                except (*FAULTS, TrainingFailedError) as error:
                    if getattr(error, "errno", None) in NO_WRITING:
                        raise DataError(_not_written(experiment, error)) from error
                    failures.add(error)
            return stop.asked
    except DataError as error:
        _log(experiment.run, error)
        raise
    finally:
        ask_for(0, gpus)


def _hold_statistics_here() -> None:
    """Start Ray Data's statistics actor on this machine, not on that of the worker that reads first.

    It outlives the run, and a machine that has it is never idle: a cluster would not take that one away again.
    """
    with suppress(Exception):  # Ray's own function, but no public one; without it the actor starts where Ray likes
        from ray.data._internal.stats import get_or_create_stats_actor

        get_or_create_stats_actor()


def _reached(experiment: Experiment) -> int:
    """The step of the newest checkpoint; 0 without one."""
    newest = checkpoint.newest(checkpoint.directory_of(experiment.config))
    return checkpoint.step_of(newest) if newest else 0


def _run_group(experiment: Experiment, room: Room, gpus: bool, stop: Stop) -> bool:
    """One group of workers: to the last step, or until it is asked to stop; returns whether another is to go on.

    Raises DataError for what would only be met again; what Ray raises for a group that has lost a worker.
    """
    board = new_board()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"experiment": ray.put(experiment), "board": board, "share": room.share},
        scaling_config=ScalingConfig(
            num_workers=room.workers, use_gpu=gpus, resources_per_worker={"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
        ),
        torch_config=TorchConfig(
            backend="nccl" if gpus else "gloo", timeout_s=max(1, int(experiment.config.train.hang_timeout))
        ),
        run_config=RunConfig(
            name=f"mmearth-ray-{os.getpid()}-{time.time_ns()}",
            storage_path=str((experiment.run / ".ray").resolve()),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},  # beside the variables of a submitted job
        ),
    )
    watch = Watch(board, experiment.last_step, stop, Change(experiment.config, room, gpus))
    try:
        with watch:
            trainer.fit()
    except Exception as error:
        if fatal := watch.fatal or user_error(error):
            raise DataError(str(fatal)) from error
        raise
    if watch.fatal:
        raise DataError(watch.fatal)
    return watch.changing and _reached(experiment) < experiment.last_step


class Change:
    """Whether the cluster has had room for another number of workers for a while, or for fewer as it is losing a machine."""

    def __init__(self, config: Config, room: Room, gpus: bool) -> None:
        self.config, self.room, self.gpus = config, room, gpus
        self.looked = self.since = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return False
        self.looked = now
        ask_for(most_workers(self.config), self.gpus)
        count = fitting(self.config, cluster_now(), self.gpus, self.room.others)
        if count == self.room.workers:
            self.since = now
        return now - self.since >= CHANGE_SECONDS or (count < self.room.workers and bool(draining()))


class Failures:
    """Counts groups that ended without a new checkpoint."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.count, self.reached = experiment, 0, _reached(experiment)

    def add(self, error: Exception) -> None:
        """Raise DataError, once there were more of them than `train.max_failures` in a row."""
        limit, reached = self.experiment.config.train.max_failures, _reached(self.experiment)
        self.count = 1 if reached > self.reached else self.count + 1
        self.reached = reached
        if self.count <= limit:
            print(f"workers were lost ({last_line(error)}); going on after step {reached:,}", file=sys.stderr, flush=True)
            return
        more = _advice(error) + _log(self.experiment.run, error)
        raise DataError(f"training ended after {limit} restarts: {last_line(error)}{more}") from error


def _advice(error: Exception) -> str:
    """What to do where the error tells of too little memory, or may come from it."""
    said = "".join(traceback.format_exception(error))
    reason = "the memory did not suffice" if OUT_OF_MEMORY.search(said) else ""
    if not reason and PERHAPS in said:
        reason = "if the kernel ended a worker for its memory, as dmesg would tell"
    what = "use a smaller train.micro_batch, train.activation_checkpointing=true or more train.workers"
    return f"; {reason}: {what}" if reason else ""


def _log(run: Path, error: Exception) -> str:
    """Write `error.log`; returns what is said of it, nothing where the run directory does not take it."""
    log = run / "error.log"
    with suppress(OSError):
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return f"; {log} tells more"
    return ""


def _not_written(experiment: Experiment, error: Exception) -> str:
    return write_failure(Path(getattr(error, "filename", None) or experiment.run), error)


def _worker(settings: dict[str, Any]) -> None:
    """What each train worker runs."""
    board = settings["board"]
    experiment: Experiment = ray.get(settings["experiment"])
    context = get_context()
    local = context.get_local_world_size()
    worker = Worker(
        rank=context.get_world_rank(),
        workers=context.get_world_size(),
        device=cast(torch.device, get_device()),
        threads=max(1, len(os.sched_getaffinity(0)) // local),
    )

    def open_stream(source: Source, ranges: MicroBatches) -> Iterator[Batch]:
        data = experiment.config.data
        return stream(source, ranges, tiles_per_task=data.tiles_per_task, read_ahead=data.read_ahead, share=settings["share"])

    line = BoardLine(board, experiment.config.train.hang_timeout) if worker.rank == 0 else None
    try:
        run(experiment, worker, open_stream, line or Silent())
    except DataError as error:
        ray.get(board.fail.remote(str(error)))
        raise
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in NO_WRITING or "No space left" in str(error):
            ray.get(board.fail.remote(_not_written(experiment, error)))
        raise
    finally:
        if line:
            line.close()
