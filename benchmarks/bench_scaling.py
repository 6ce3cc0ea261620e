"""How training scales: 1, 2, 4 workers on this machine, and what a model of communication says of 8 to 512 GPUs.

    python -m benchmarks.bench_scaling [key=value ...]      --help lists the keys

Measured, on plain DistributedDataParallel over gloo with the same threads for every worker: tiles per second, efficiency
against one worker, bytes that a worker sends in a step, and all-reduces alone, to which latency and bandwidth are fitted.
More workers than cores share them, so their efficiency cannot exceed cores / workers.

Every engine of `train.engine` in the same way, beside ddp: rate, memory of the fullest worker, bytes over the loopback device.

Modelled (benchmarks/communication.py), not measured: GPUs.  Their step is FLOPs / (peak x utilisation), both assumed; links are
what their makers state.
"""

import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from benchmarks.communication import SENT, Link, Machine, Step, assumed_step, efficiency, exposed, fit_link, ring_round, volume
from benchmarks.record import circumstances, table, write
from benchmarks.side_by_side import Pace, time_all_reduces, train
from benchmarks.subject import INPUT, TARGETS
from mmearth_ray import config as configuration
from mmearth_ray import settings
from mmearth_ray.config import visible_patches
from mmearth_ray.errors import run_command
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.model.flops import count, shape_of
from mmearth_ray.model.mpmae import build_mpmae
from mmearth_ray.settings import key
from mmearth_ray.shards.synthesise import SynthesiseOptions, synthesise
from mmearth_ray.train.engines import ENGINES

MESSAGES = [1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26]
"""Bytes of the all-reduces that are timed: from a vector to the gradient of a small model."""

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Options:
    size: str = key("atto", "encoder size that is measured", among=tuple(SIZES))
    image_size: int = key(112, "side of the crop, px", at_least=8)
    patch_size: int = key(16, "side of a patch, px", among=(8, 16, 32))
    batch: int = key(32, "tiles per step and worker", at_least=1)
    workers: list[int] = key([1, 2, 4], "numbers of workers; the first is what others are compared with", at_least=1)
    threads: int = key(1, "threads of each worker", at_least=1)
    warm: int = key(3, "steps at the start that do not count", at_least=1)
    steps: int = key(15, "steps that count", at_least=1)
    rounds: int = key(3, "rounds", at_least=1)
    data: str = key("", "directory of shards, in place of synthetic ones")
    gpus: list[int] = key([8, 64, 512], "numbers of GPUs that are modelled", at_least=1)
    per_node: int = key(8, "GPUs in a node", at_least=1)
    nvlink: float = key(450e9, "bytes/s and direction within a node (H100 SXM data sheet: NVLink, 900 GB/s both ways)", above=0)
    nvlink_latency: float = key(3e-6, "seconds a turn within a node; assumed", above=0)
    network: float = key(
        50e9, "bytes/s and direction of each GPU between nodes (400 Gb/s InfiniBand NDR; 12.5e9: 100 Gb/s)", above=0
    )
    network_latency: float = key(10e-6, "seconds a turn between nodes; assumed", above=0)
    peak: float = key(67e12, "FLOP/s of a GPU (H100 SXM data sheet, float32)", above=0)
    utilisation: float = key(0.3, "share of the peak that a step reaches; assumed", above=0, at_most=1)
    gpu_batch: int = key(256, "tiles per step and GPU; assumed", at_least=1)
    engines: list[str] = key(
        list(ENGINES), "engines that are measured; the first is what others are compared with", among=tuple(ENGINES)
    )
    extra: list[str] = key([], "further settings of the measured run, such as model.decoder_width=64")
    save: bool = key(True, "write the result to benchmarks/results/")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    about = circumstances("benchmarks.bench_scaling")
    rounds = measure(options)
    seconds = {n: time_all_reduces(n, options.threads, MESSAGES, 15) for n in options.workers if n > 1}
    links = {n: fit_link(MESSAGES, times, n) for n, times in seconds.items()}
    rows = [scaling_row(options, n, rounds, links.get(n)) for n in options.workers]
    tables = {
        "Engines": [engine_row(options, n, engine, rounds) for n in options.workers for engine in options.engines],
        "All-reduce over gloo, milliseconds": message_rows(seconds, links),
        "Modelled, not measured: what communication adds to a step on GPUs": model_rows(options),
    }
    for title, lines in {"": rows, **tables}.items():
        print("\n".join([title, *table(lines)]) if lines else "")
    if options.save:
        print(f"written to {write('scaling', about, rows, tables)}")
    return 0


Paces = dict[tuple[int, str], Pace]
"""By workers and what they ran: `bare`, `plain` (see `benchmarks.side_by_side`), or an engine's name."""


def measure(options: Options) -> list[Paces]:
    """The rounds, each with every number of workers and everything that they run."""
    with TemporaryDirectory() as directory:
        data = Path(options.data)
        if not options.data:
            tile = next(tile for tile in (64, 128, 256) if tile >= options.image_size)
            data = Path(directory) / "shards"
            synthesise(data, SynthesiseOptions(tiles=256, size=tile))
        rounds = []
        for _ in range(options.rounds):
            paces = {}
            for workers in options.workers:
                pace = {"threads": options.threads, "warm": options.warm, "steps": options.steps}
                given = run_arguments(options, data, workers)
                paces[workers, "bare"] = train(configuration.load(given), **pace, way="bare")
                paces[workers, "plain"] = train(configuration.load(given), **pace, way="plain")
                for engine in options.engines:
                    config = configuration.load([*given, f"train.engine={engine}"])
                    paces[workers, engine] = train(config, **pace, way="engine")
            rounds.append(paces)
    return rounds


def run_arguments(options: Options, data: Path, workers: int) -> list[str]:
    return [
        f"data.shards={data}", f"model.size={options.size}", f"model.image_size={options.image_size}",
        f"model.patch_size={options.patch_size}", f"train.workers={workers}",
        f"train.global_batch={workers * options.batch}", f"train.micro_batch={options.batch}", *options.extra,
    ]  # fmt: skip


def scaling_row(options: Options, workers: int, rounds: list[Paces], link: Link | None) -> dict[str, float | str]:
    """One number of workers: medians of the rounds' rates and of their own ratios, beside what the model makes of them."""
    first = options.workers[0]
    ddp = [paces[workers, "plain"] for paces in rounds]
    alone = [paces[first, "plain"].tiles_per_second / first for paces in rounds]
    bare = [paces[workers, "bare"].tiles_per_second for paces in rounds]
    rates = [pace.tiles_per_second for pace in ddp]
    size = ddp[0].gradient_bytes
    step = workers * options.batch / statistics.median(bare)
    machine = Machine(workers, workers, link, link) if link else None
    oversubscribed = " (oversubscribed)" if workers * options.threads > len(os.sched_getaffinity(0)) else ""
    return {
        "workers x threads": f"{workers} x {options.threads}{oversubscribed}",
        "tiles/s": statistics.median(rates),
        f"efficiency against {first}": statistics.median(r / (workers * a) for r, a in zip(rates, alone, strict=True)),
        "of bare processes": statistics.median(r / b for r, b in zip(rates, bare, strict=True)),
        "the same, modelled": efficiency("ddp", size, Step(0.0, step), machine, hidden=False) if machine else 1.0,
        "gradient MB": size / 1e6,
        "MB sent by a ring": 2 * (workers - 1) / workers * size / 1e6,
        "MB over loopback": statistics.median(pace.loopback_bytes for pace in ddp) / 1e6,
    }  # fmt: skip


def engine_row(options: Options, workers: int, engine: str, rounds: list[Paces]) -> dict[str, float | str]:
    """An engine beside the first one: medians of the rounds' rates and of their own ratios."""
    own, first = ([paces[workers, name] for paces in rounds] for name in (engine, options.engines[0]))
    return {
        "workers x threads": f"{workers} x {options.threads}", "engine": engine,
        "tiles/s": statistics.median(pace.tiles_per_second for pace in own),
        f"tiles/s of {options.engines[0]}'s": statistics.median(
            a.tiles_per_second / b.tiles_per_second for a, b in zip(own, first, strict=True)
        ),
        "peak MB of a worker": statistics.median(pace.peak for pace in own) / 1e6,
        "MB over loopback": statistics.median(pace.loopback_bytes for pace in own) / 1e6,
    }  # fmt: skip


def message_rows(seconds: dict[int, list[float]], links: dict[int, Link]) -> list[dict[str, Any]]:
    """Each size of message, measured beside the fit."""
    rows = [
        {
            "workers": workers, "bytes": size, "measured": 1e3 * took,
            "fitted": 2e3 * ring_round(size, workers, links[workers]),
            "GB/s": links[workers].bandwidth / 1e9, "latency ms": 1e3 * links[workers].latency,
        }
        for workers, times in seconds.items() for size, took in zip(MESSAGES, times, strict=True)
    ]  # fmt: skip
    return cast(list[dict[str, Any]], rows)


def model_rows(options: Options) -> list[dict[str, Any]]:
    """Every encoder size, engine and number of GPUs: assumed step, bytes sent, what is not hidden, efficiency."""
    within, between = Link(options.nvlink, options.nvlink_latency), Link(options.network, options.network_latency)
    rows = []
    for size in SIZES:
        parameters, flops = work(size, options.image_size, options.patch_size)
        step = assumed_step(flops * options.gpu_batch, options.peak, options.utilisation)
        for engine in SENT:
            row: dict[str, Any] = {
                "size": size, "engine": engine,
                "parameters M": parameters / 1e6, "step ms (assumed)": 1e3 * step.seconds,
                "MB sent": volume(engine, FLOAT_BYTES * parameters) / 1e6,
            }  # fmt: skip
            for gpus in options.gpus:
                machine = Machine(gpus, options.per_node, within, between)
                row[f"ms added on {gpus}"] = 1e3 * exposed(engine, FLOAT_BYTES * parameters, step, machine)
                row[f"efficiency on {gpus}"] = efficiency(engine, FLOAT_BYTES * parameters, step, machine)
            rows.append(row)
    return rows


def work(size: str, image_size: int, patch_size: int) -> tuple[int, int]:
    """Parameters of the whole model, and FLOPs of a step for each tile, at the default 60 % hidden."""
    with torch.device("meta"):
        model = build_mpmae(
            size=size, in_channels=len(INPUT.bands), image_size=image_size, patch_size=patch_size, targets=TARGETS
        )
    visible = visible_patches((image_size // patch_size) ** 2, 0.6)
    return sum(p.numel() for p in model.parameters()), count(shape_of(model, image_size, visible)).step


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
