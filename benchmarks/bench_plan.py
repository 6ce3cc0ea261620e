"""What `mmearth_ray.plan` says a worker holds, against what training steps really hold on this machine's CPUs.

    python -m benchmarks.bench_plan [key=value ...]      --help lists the keys

A row is an engine with so many workers, each a process of its own, started afresh:

- measured MB: the most that was resident during a step, the second one, less what the process held before it had a model; of
  the fullest worker.  Freed memory goes back to the system at once, and fresh memory is written to: a GPU has no lazy pages.
- planned MB: what the plan says for the computation as it is on a CPU; the ratio is measured over planned.

The plan of all sizes on GPUs, as the command prints it, is written beside it.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.memory import forget_peak, status
from benchmarks.record import RESULTS, Row, circumstances, hardware, table, write
from benchmarks.shapes import parse_shape
from benchmarks.subject import build, make_batch
from mmearth_ray import config as configuration
from mmearth_ray import settings
from mmearth_ray.errors import DataError, UsageError, run_command
from mmearth_ray.files import atomic_text
from mmearth_ray.keys import Config
from mmearth_ray.plan.fit import of
from mmearth_ray.plan.memory import ENGINES
from mmearth_ray.plan.passes import follow
from mmearth_ray.plan.planned import Options as PlanOptions
from mmearth_ray.plan.planned import plan
from mmearth_ray.plan.report import report
from mmearth_ray.settings import key
from mmearth_ray.train.engines import build_engine
from mmearth_ray.train.zero import load_deepspeed

CPU = torch.device("cpu")
SECONDS = 300.0
RATE = 1e-4

RESIDENT_IS_LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_PERTURB_": "165"}
"""Environment with which a process holds what its tensors hold (mallopt(3)): whatever is larger than 64 KB is mapped by itself
and written to when it is taken."""

CASES = (
    "atto/ddp/1/8", "atto/ddp/1/32", "tiny/ddp/1/8", "base/ddp/1/4", "large/ddp/1/2",
    "atto/ddp/2/16", "tiny/ddp/2/4", "tiny/zero1/2/4", "tiny/zero2/2/4", "tiny/zero3/2/4",
    "base/zero1/2/2", "base/zero2/2/2", "base/zero3/2/2", "large/zero2/2/2",
)  # fmt: skip

PUBLISHED = ["model.image_size=112", "model.patch_size=16", "train.global_batch=4096", "train.epochs=200",
             "train.workers=8", "train.precision=bf16", "plan.sizes=all"]  # fmt: skip
"""What is planned for GPUs: the published recipe, of every size."""


@dataclass(frozen=True)
class Options:
    cases: list[str] = key(list(CASES), "measurements, as SIZE/ENGINE/WORKERS/MICRO-BATCH")
    shape: str = key("56/8", "image and patch size, as IMAGE/PATCH")
    micro_batches: int = key(1, "micro-batches of a worker in a step", at_least=1)
    precision: str = key("fp32", "of matrices and convolutions", among=("fp32", "bf16"))
    activation_checkpointing: bool = key(False, "compute the activations of blocks twice")
    theme: str = key("plan", "first part of the result's name")
    save: bool = key(True, "write the results to benchmarks/results/")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    configs = [config_of(options, case) for case in options.cases]
    rows = []
    for config in configs:
        rows.append(measured_row(config))
        print(table(rows)[-1], flush=True)
    if options.save:
        about = circumstances("benchmarks.bench_plan")
        print(f"written to {write(options.theme, about, rows)} and {write_plan(about)}")
    return 0


def config_of(options: Options, case: str) -> Config:
    """The run of a case.  Raises UsageError for what is no case."""
    size, engine, workers, micro_batch, *more = [*case.split("/"), "", "", ""]
    if any(more) or engine not in ENGINES or not (workers.isdecimal() and micro_batch.isdecimal()):
        raise UsageError(f"cases={case}: must be SIZE/ENGINE/WORKERS/MICRO-BATCH, such as tiny/zero1/2/4")
    image_size, patch_size = parse_shape(options.shape, "shape")
    return configuration.load([
        f"model.size={size}", f"model.image_size={image_size}", f"model.patch_size={patch_size}", f"train.engine={engine}",
        f"train.workers={workers}", f"train.micro_batch={micro_batch}", f"train.precision={options.precision}",
        f"train.global_batch={int(workers) * int(micro_batch) * options.micro_batches}", "train.gpus=false",
        f"train.activation_checkpointing={str(options.activation_checkpointing).lower()}",
    ])  # fmt: skip


def measured_row(config: Config) -> Row:
    """A run's peak, as planned and as measured."""
    model, train = config.model, config.train
    planned, measured = planned_bytes(config), measured_bytes(config)
    micro_batch = train.micro_batch or 1
    return {
        "size": model.size, "image/patch": f"{model.image_size}/{model.patch_size}", "precision": train.precision,
        "engine": train.engine, "workers": train.workers[0],
        "micro-batch": f"{micro_batch} x {train.global_batch // train.workers[0] // micro_batch}",
        "planned MB": planned / 1e6, "measured MB": measured / 1e6, "ratio": measured / planned,
    }  # fmt: skip


def planned_bytes(config: Config) -> float:
    """What the plan says that a worker holds at most, on a CPU."""
    train, (workers,) = config.train, config.train.workers
    fit = of(train.engine, follow(config, on_gpu=False), train.micro_batch or 1, train.global_batch // workers, workers)
    return fit.memory.total


def measured_bytes(config: Config) -> int:
    """What the fullest worker held at most during a step, in processes of their own.  Raises DataError if one of them fails."""
    (workers,) = config.train.workers
    before = {name: os.environ.get(name) for name in RESIDENT_IS_LIVE}
    os.environ.update(RESIDENT_IS_LIVE)  # read when a process starts
    try:
        with tempfile.TemporaryDirectory() as folder:
            context = multiprocessing.get_context("spawn")
            processes = [context.Process(target=_worker, args=(rank, config, folder)) for rank in range(workers)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(SECONDS)
            codes = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
            if any(code != 0 for code in codes):
                raise DataError(f"{config.model.size} with {config.train.engine} was not measured: workers ended with {codes}")
            return max(json.loads(path.read_text()) for path in Path(folder).glob("peak-*"))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _worker(rank: int, config: Config, folder: str) -> None:
    """One worker: a step to make all that stays, and one that is measured."""
    torch.set_num_threads(1)
    (workers,) = config.train.workers
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=workers)
    if config.train.engine != "ddp":
        load_deepspeed(CPU)
    _warm_up(config)
    before = status("VmRSS")
    micro_batch, model = config.train.micro_batch or 1, config.model
    engine = build_engine(build(model.size, model.image_size, model.patch_size), config, CPU, workers)
    batch = make_batch(micro_batch, model.image_size, model.patch_size)
    totals = engine.all_sum(torch.full((len(engine.module.targets),), 1000 * micro_batch))
    micro_batches = config.train.global_batch // workers // micro_batch
    for _ in range(2):
        forget_peak()
        for number in range(micro_batches):
            engine.backward(batch, totals, 1 / workers / micro_batches, last=number == micro_batches - 1)
        engine.step(RATE)
    Path(folder, f"peak-{rank}").write_text(json.dumps(status("VmHWM") - before))
    dist.barrier()


def _warm_up(config: Config) -> None:
    """A tiny step, so that what libraries keep for themselves is there before anything is measured."""
    objective, batch = build("atto", 16, 8), make_batch(1, 16, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
        loss, _ = objective(batch, torch.ones(len(objective.targets)), 1.0)
    loss.backward()
    torch.optim.AdamW(objective.parameters(), fused=True).step()
    del objective, batch, loss
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def write_plan(about: Row) -> Path:
    """Write what the plan's command prints."""
    options = configuration.load_as(PlanOptions, PUBLISHED)
    lines = report(options, [plan(options, size) for size in options.sizes], PUBLISHED)
    path = RESULTS / f"plan_sizes_{hardware()}_{about['date']}.md"
    head = [f"# plan_sizes, commit {about['commit']}", "", "```", f"$ python -m mmearth_ray.plan {' '.join(PUBLISHED)}"]
    atomic_text(path, "\n".join([*head, *lines, "```"]) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
