"""Processes that train side by side, without Ray: what an end-to-end run is compared with, and engines with each other.

Each has its own threads, a few batches of the run's own stream in memory, the run's objective, precision and fused AdamW, and
the allocator's settings of train workers.  `bare` processes share nothing; those of `plain` average gradients with
DistributedDataParallel over gloo, without an engine; `engine` takes the one that `train.engine` names.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks.memory import forget_peak, status
from mmearth_ray.config import micro_batch_of, most_workers
from mmearth_ray.experiment import Experiment, build_objective, open_experiment
from mmearth_ray.keys import Config
from mmearth_ray.pretrain import shards_of
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.train.allocator import KEEP_FREED_MEMORY
from mmearth_ray.train.engine import ddp as share_gradients
from mmearth_ray.train.engine import parameter_groups
from mmearth_ray.train.engines import build_engine
from mmearth_ray.train.loop import to_device

Way = Literal["bare", "plain", "engine"]

HELD = 4
"""Batches that each process keeps in memory and goes through in turn."""

LOST = timedelta(minutes=10)
"""How long a process waits for the others."""


@dataclass(frozen=True)
class Pace:
    """How fast processes trained: tiles per second of all together, CPU seconds per tile; bytes of gradients that each gave to
    the all-reduce in a step (`plain` alone), and bytes that crossed the loopback device meanwhile, for each process and step;
    the most bytes that were resident in one of them during those steps."""

    tiles_per_second: float
    cpu_per_tile: float
    gradient_bytes: float
    loopback_bytes: float
    peak: float = 0.0


def train(config: Config, *, threads: int, warm: int, steps: int, way: Way) -> Pace:
    """Train the most of `train.workers` processes at the same time for `steps` steps each, after `warm` that do not count."""
    workers = most_workers(config)
    with _processes(workers) as (pool, store):
        runs = [pool.submit(_process, config, rank, store, threads, warm, steps, way) for rank in range(workers)]
        paces = [run.result() for run in runs]
    return Pace(
        tiles_per_second=sum(pace.tiles_per_second for pace in paces),
        cpu_per_tile=sum(pace.cpu_per_tile for pace in paces) / workers,
        gradient_bytes=paces[0].gradient_bytes,
        loopback_bytes=paces[0].loopback_bytes,
        peak=max(pace.peak for pace in paces),
    )


@contextmanager
def _processes(workers: int) -> Iterator[tuple[ProcessPoolExecutor, str]]:
    """New processes, one for each task, with the allocator's settings of train workers; and a file where they meet."""
    context = multiprocessing.get_context("spawn")
    with (
        TemporaryDirectory() as meeting,
        _environment(KEEP_FREED_MEMORY),
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        yield pool, str(Path(meeting) / "store")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment of processes that start meanwhile; this one's is as before in the end."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _process(config: Config, rank: int, store: str, threads: int, warm: int, steps: int, way: Way) -> Pace:
    torch.set_num_threads(threads)
    workers = most_workers(config)
    size = micro_batch_of(config, workers)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers, timeout=LOST)
    sent: list[int] = []
    hook = _counting(sent) if way == "plain" else None
    step = _engine_step(config, rank) if way == "engine" else _step(config, rank, hook)
    for _ in range(warm):
        step()
    dist.barrier()
    sent.clear()
    forget_peak()
    loopback = loopback_bytes()
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    dist.barrier()
    loopback = loopback_bytes() - loopback
    dist.destroy_process_group()
    peak = status("VmHWM")
    return Pace(steps * size / took, cpu / (steps * size), sum(sent) / steps, loopback / workers / steps, peak)


def loopback_bytes() -> int:
    """Bytes that processes of this machine have sent each other so far over IP (/proc/net/dev, Linux)."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def time_all_reduces(workers: int, threads: int, sizes: list[int], repeats: int) -> list[float]:
    """Seconds of an all-reduce of that many bytes of float32 over gloo, nothing else running: medians of the repeats."""
    with _processes(workers) as (pool, store):
        runs = [pool.submit(_all_reduces, rank, workers, store, threads, sizes, repeats) for rank in range(workers)]
        medians = [run.result() for run in runs]
    return medians[0]


def _all_reduces(rank: int, workers: int, store: str, threads: int, sizes: list[int], repeats: int) -> list[float]:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers, timeout=LOST)
    medians = []
    for size in sizes:
        values, took = torch.zeros(max(1, size // 4)), []
        for _ in range(repeats + 1):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(values)
            took.append(time.perf_counter() - begin)
        medians.append(statistics.median(took[1:]))
    dist.destroy_process_group()
    return medians


def _step(config: Config, rank: int, hook: Callable | None) -> Callable[[], None]:
    """A function that makes one step: on gradients averaged with that hook, or without one on this process's own."""
    experiment = open_experiment(config, *shards_of(config))
    module: nn.Module = build_objective(experiment)
    settings = config.optimizer
    groups = parameter_groups(module, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)
    if hook:
        module = share_gradients(module)
        module.register_comm_hook(dist.group.WORLD, hook)
    batches = _held_batches(experiment, rank)

    def step() -> None:
        batch, totals = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            loss = module(batch, totals, 1.0)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _engine_step(config: Config, rank: int) -> Callable[[], None]:
    """A function that makes one step with the engine of the configuration, of one micro-batch."""
    experiment = open_experiment(config, *shards_of(config))
    engine = build_engine(build_objective(experiment), config, torch.device("cpu"), most_workers(config))
    batches = _held_batches(experiment, rank)

    def step() -> None:
        engine.backward(*next(batches), 1.0, last=True)
        engine.step(1e-4)

    return step


def _held_batches(experiment: Experiment, rank: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The worker's first batches, in turn for ever, each with its valid elements of every target."""
    config = experiment.config
    workers = most_workers(config)
    ranges = MicroBatches(1, HELD, config.train.global_batch, workers, rank, micro_batch_of(config, workers))
    prepared = experiment.source.batches(ranges[number] for number in range(HELD))
    return cycle([(to_device(b, torch.device("cpu")), torch.from_numpy(b["count"].sum(0))) for b in islice(prepared, HELD)])


def _counting(sent: list[int]) -> Callable:
    """DistributedDataParallel's own all-reduce, with the bytes of every bucket written down."""

    def hook(
        group: dist.ProcessGroup,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    return hook
