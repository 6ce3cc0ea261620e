"""Launching a run on Ray Train: a Ray of our own or a cluster's, workers that are replaced when lost, a line of progress.

Ray holds the workers together; what a run has done is on disk.  A worker group that starts again finds the newest
checkpoint itself, so neither Ray's checkpoint registry nor its late reports are relied on.
"""

import errno
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, cast

import ray
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from safetensors import SafetensorError

from mmearth_ray.cluster import join_or_start
from mmearth_ray.config import Config
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.experiment import Experiment
from mmearth_ray.progress import ProgressLine, duration
from mmearth_ray.stream.pipeline import Share, stream, user_error
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import Batch
from mmearth_ray.stream.source import Source
from mmearth_ray.train.allocator import KEEP_FREED_MEMORY
from mmearth_ray.train.loop import Worker, run

DATA_CPUS = 2
"""Logical CPUs that a Ray of our own has beside its train workers, at least, so that data tasks always find a place."""

NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors of the run directory that starting again would only meet again."""

BUSY_SECONDS = 60.0
"""How long to wait for CPUs that other jobs of a cluster hold."""


def launch(experiment: Experiment, share: Share) -> bool:
    """Run the experiment's workers to the end; returns whether they were asked to stop before.

    Raises DataError for what a worker could not do; what it knew is in `error.log` in the run directory.
    """
    gpus, train = uses_gpus(experiment.config), experiment.config.train
    board = ray.remote(num_cpus=0)(Board).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"experiment": ray.put(experiment), "board": board, "share": share},
        scaling_config=ScalingConfig(
            num_workers=train.workers, use_gpu=gpus, resources_per_worker={"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=max(1, int(train.hang_timeout))),
        run_config=RunConfig(
            name=f"mmearth-ray-{os.getpid()}-{int(time.time())}",
            storage_path=str((experiment.run / ".ray").resolve()),
            failure_config=FailureConfig(max_failures=train.max_failures),
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},  # beside the variables of a submitted job
        ),
    )
    watch = Watch(board, experiment)
    try:
        with watch:
            trainer.fit()
    except Exception as error:
        fatal = watch.fatal or user_error(error)
        if fatal:
            raise DataError(str(fatal)) from error
        log = experiment.run / "error.log"
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        raise DataError(
            f"training ended after {experiment.config.train.max_failures} restarts: {_last_line(error)}; {log} tells more"
        ) from error
    if watch.fatal:
        raise DataError(watch.fatal)
    return watch.stopping


def start_ray(config: Config) -> Share:
    """Join the cluster of the settings or the environment, or start a Ray with room for data tasks beside the workers.

    Returns what each worker's data tasks may use.  Raises UsageError if the run does not fit into the cluster.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers stay in the driver's directory
    # a worker that does not answer the controller for this long is taken for hung and replaced
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(config.train.hang_timeout))
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    cpus = config.train.workers + max(DATA_CPUS, config.train.workers)
    join_or_start(max(cpus, os.cpu_count() or 1), config.run.address)
    return check_cluster(config)


def uses_gpus(config: Config) -> bool:
    """Whether each worker gets a GPU: as set, or if the cluster has enough of them."""
    found = int(ray.cluster_resources().get("GPU", 0))
    if config.train.gpus and found < config.train.workers:
        raise UsageError(f"train.gpus=true needs {config.train.workers} GPUs, the cluster has {found}; use fewer train.workers")
    if config.model.backend == "triton" and found < config.train.workers:
        raise UsageError(
            f"model.backend=triton needs a GPU for each of train.workers={config.train.workers}, the cluster has {found}; use"
            " fewer train.workers, or model.backend=packed"
        )
    if config.train.gpus is None:
        return found >= config.train.workers and config.model.backend != "minkowski"
    return config.train.gpus


def check_cluster(config: Config) -> Share:
    """What each worker's data tasks may use.  Raises UsageError if train workers would take every CPU."""
    resources, workers = ray.cluster_resources(), config.train.workers
    cpus = resources.get("CPU", 0)
    if cpus < workers + 1:
        raise UsageError(
            f"train.workers={workers} would leave no CPU for data tasks: the cluster has {cpus:g}, training needs at least "
            f"{workers + 1}; use fewer train.workers, or a cluster with more CPUs"
        )
    wait_until_free(workers + 1)
    store = int(resources.get("object_store_memory", 2e9))
    return Share(cpus=(cpus - workers) / workers, object_store_bytes=int(store * 0.5 / workers))


def wait_until_free(cpus: int) -> None:
    """Give other jobs of the cluster a while to free that many CPUs.  Raises UsageError if they do not."""
    deadline = time.monotonic() + BUSY_SECONDS
    while (free := ray.available_resources().get("CPU", 0)) < cpus:
        if time.monotonic() > deadline:
            raise UsageError(
                f"only {free:g} CPUs of the cluster are free, this run needs at least {cpus}; wait for other jobs to end, "
                "or use fewer train.workers"
            )
        time.sleep(1)


class Board:
    """An actor between rank 0 and the driver: progress one way, the wish to stop the other, and an error that is final."""

    def __init__(self) -> None:
        self.progress: dict[str, Any] = {}
        self.stop = False
        self.fatal = ""

    def exchange(self, progress: dict[str, Any] | None) -> bool:
        """Rank 0's side: leave the latest progress, learn whether to stop."""
        self.progress = progress or self.progress
        return self.stop

    def look(self, stop: bool) -> tuple[dict[str, Any], str]:
        """The driver's side: leave the wish to stop, learn the progress and the final error, if there is one."""
        self.stop = self.stop or stop
        return self.progress, self.fatal

    def fail(self, message: str) -> None:
        self.fatal = self.fatal or message

    def failure(self) -> str:
        return self.fatal


def _worker(settings: dict[str, Any]) -> None:
    """What each train worker runs."""
    board = settings["board"]
    if ray.get(board.failure.remote()):
        return  # an error in the data or the settings stays; starting again would only repeat it
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

    line = BoardLine(board) if worker.rank == 0 else None
    try:
        run(experiment, worker, open_stream, line or Silent())
    except DataError as error:
        ray.get(board.fail.remote(str(error)))
        raise
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in NO_WRITING or "No space left" in str(error):
            ray.get(board.fail.remote(f"cannot write to {experiment.run}: {error}; free space and run the command again"))
        raise
    finally:
        if line:
            line.close()


class Silent:
    """The control of workers other than rank 0."""

    def tell(self, progress: dict[str, Any]) -> None:
        pass

    def should_stop(self) -> bool:
        return False


class BoardLine:
    """Rank 0's line to the board, kept up by a thread so that a step never waits for it."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.progress: dict[str, Any] | None = None
        self.stop: bool = False
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._keep_up, daemon=True)
        self.thread.start()

    def tell(self, progress: dict[str, Any]) -> None:
        self.progress = progress

    def should_stop(self) -> bool:
        return self.stop

    def close(self) -> None:
        """Leave the last progress behind and end the thread."""
        self.closing.set()
        self.thread.join(timeout=10)

    def _keep_up(self) -> None:
        while True:
            last = self.closing.wait(0.5)
            self.stop = bool(ray.get(self.board.exchange.remote(self.progress)))
            if last:
                return


class Watch:
    """The driver's side while training runs: shows progress, passes SIGTERM on as the wish to save and stop."""

    def __init__(self, board: Any, experiment: Experiment) -> None:
        self.board, self.experiment = board, experiment
        self.line = ProgressLine()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._keep_up, daemon=True)
        self.stopping, self.step, self.fatal = False, 0, ""
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            self.previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask_to_stop)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.thread.join(timeout=10)
        self.line.close()
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask_to_stop(self, *_: object) -> None:
        self.stopping = True

    def _keep_up(self) -> None:
        started: tuple[float, int] | None = None
        while True:
            last = self.closing.wait(0.5)
            try:
                progress, self.fatal = ray.get(self.board.look.remote(self.stopping))
            except RayError:
                return
            if progress and (last or progress["step"] != self.step):
                if started is None or progress["step"] < self.step:  # the first, or after a recovery
                    started = (time.monotonic(), progress["step"])
                self.step = progress["step"]
                self.line.show(progress_text(progress, self.experiment.last_step, started), force=last)
            if last:
                return


def progress_text(progress: dict[str, Any], steps: int, started: tuple[float, int]) -> str:
    """The live line: step, loss, tiles per second, share of the time spent waiting for data, time left."""
    since, first = started
    trained = progress["step"] - first
    left = duration((time.monotonic() - since) / trained * (steps - progress["step"])) if trained else "..."
    return (
        f"step {progress['step']:,}/{steps:,}  loss {progress['loss']:.4f}  {progress['tiles_per_second']:,.0f} tiles/s  "
        f"data wait {progress['data_wait']:.0%}  {left} left"
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
