"""Pretraining end to end through Ray, against bare training steps side by side on the same cores.

    python -m benchmarks.bench_pretrain [key=value ...]      --help lists the keys

Each round measures three things in turn, with as many processes as train workers and the cores shared out among them:
bare steps (torch alone, batches in memory, nothing shared), plain DistributedDataParallel over gloo, and the command
`mmearth_ray.pretrain` with all that belongs to it: data tasks, Ray's daemons, the driver; for each of the engines anew.  Ratios
are medians of the rounds' own ratios, so that a machine whose speed drifts does not move them.
"""

import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.end_to_end import Passage, watch
from benchmarks.process_tree import DAEMONS, IDLE, TASKS, WORKERS
from benchmarks.record import circumstances, table, write
from benchmarks.side_by_side import Pace, train
from mmearth_ray import config as configuration
from mmearth_ray import settings
from mmearth_ray.errors import UsageError, run_command
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.settings import key
from mmearth_ray.shards.build import compression_for
from mmearth_ray.shards.synthesise import SynthesiseOptions, synthesise
from mmearth_ray.shards.write import COMPRESSIONS
from mmearth_ray.train.engines import ENGINES

ENDLESS = 1_000_000
"""Steps of a run that is stopped from outside."""


@dataclass(frozen=True)
class Options:
    size: str = key("atto", "encoder size", among=tuple(SIZES))
    shapes: list[str] = key(["112/16/128", "56/8/64"], "image, patch and tile size of each measurement, as IMAGE/PATCH/TILE")
    engines: list[str] = key(["ddp"], "engines of the runs", among=tuple(ENGINES))
    workers: int = key(2, "train workers", at_least=1)
    batch: int = key(32, "tiles per step and worker", at_least=1)
    warm: int = key(6, "steps at the start of each part that do not count", at_least=1)
    steps: int = key(40, "steps of each part that count", at_least=1)
    rounds: int = key(3, "rounds", at_least=1)
    data: str = key("", "directory of shards, in place of synthetic ones")
    tiles: int = key(512, "synthetic tiles", at_least=1)
    compression: str = key(compression_for(Path()), "of the synthetic shards", among=COMPRESSIONS)
    extra: list[str] = key([], "further settings of the run, such as model.decoder_width=64")
    save: bool = key(True, "write the result to benchmarks/results/")


@dataclass(frozen=True)
class Round:
    bare: Pace
    ddp: Pace
    run: Passage
    precision: str = "fp32"


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    about = circumstances("benchmarks.bench_pretrain")
    shapes = [shape_of(text) for text in options.shapes]
    results = {(shape, engine): measure(options, *shape, engine) for shape in shapes for engine in options.engines}
    rows = [summary(options, shape, rounds) | _named(engine) for (shape, engine), rounds in results.items()]
    costs = [spending(shape, rounds) | _named(engine) for (shape, engine), rounds in results.items()]
    print("\n".join([*table(rows), "", *table(costs)]))
    if options.save:
        print(f"written to {write('pretrain', about, rows, {'CPU milliseconds per tile': costs})}")
    return 0


def _named(engine: str) -> dict[str, str]:
    """The column of an engine that is not the default."""
    return {} if engine == "ddp" else {"engine": engine}


def shape_of(text: str) -> tuple[int, int, int]:
    """Image, patch and tile size.  Raises UsageError for anything but three numbers."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise UsageError(f"shapes: '{text}' is not of the form IMAGE/PATCH/TILE, such as 112/16/128")
    image, patch, tile = map(int, parts)
    return image, patch, tile


def threads_of(workers: int) -> int:
    """Threads of each process: the cores shared out, as train workers do."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def measure(options: Options, image: int, patch: int, tile: int, engine: str) -> list[Round]:
    with TemporaryDirectory() as directory, shards(options, tile) as data:
        rounds = []
        for number in range(options.rounds):
            run = Path(directory) / f"run-{number}"
            arguments = [*run_arguments(options, data, run, image, patch), f"train.engine={engine}"]
            config = configuration.load(arguments)
            pace = {"threads": threads_of(options.workers), "warm": options.warm, "steps": options.steps}
            bare, ddp = (train(config, **pace, way=way) for way in ("bare", "plain"))
            tiles = options.workers * options.batch
            passage = watch(arguments, run, tiles=tiles, warm=options.warm, steps=options.steps)
            rounds.append(Round(bare, ddp, passage, config.train.precision))
            print(f"{image}/{patch}, {engine}, round {number + 1}: {bare.tiles_per_second:.1f} tiles/s bare, "
                  f"{ddp.tiles_per_second:.1f} DDP, {rounds[-1].run.tiles_per_second:.1f} end to end", flush=True)  # fmt: skip
    return rounds


@contextmanager
def shards(options: Options, tile: int) -> Iterator[Path]:
    """The shards that are given, or synthetic ones for as long as they are needed."""
    if options.data:
        yield Path(options.data)
        return
    with TemporaryDirectory() as directory:
        made = SynthesiseOptions(tiles=options.tiles, size=tile, compression=options.compression, workers=os.cpu_count() or 1)
        folder = Path(directory) / "shards"
        synthesise(folder, made)
        yield folder


def run_arguments(options: Options, data: Path, run: Path, image: int, patch: int) -> list[str]:
    """The arguments of the run: of the defaults, only what would write or validate in the middle of it is off."""
    return [
        f"data.shards={data}", f"run.directory={run}", f"model.size={options.size}",
        f"model.image_size={image}", f"model.patch_size={patch}",
        f"train.workers={options.workers}", f"train.global_batch={options.workers * options.batch}",
        f"train.micro_batch={options.batch}", f"train.steps={ENDLESS}",
        f"checkpoint.every={ENDLESS}", "validate.tiles=0", "figure.tiles=0", *options.extra,
    ]  # fmt: skip


def summary(options: Options, shape: tuple[int, int, int], rounds: list[Round]) -> dict[str, float | str | int]:
    """Medians of the rounds' rates, and of the rounds' own ratios."""

    def middle(part: str) -> float:
        return statistics.median(getattr(r, part).tiles_per_second for r in rounds)

    def ratio(part: str, other: str) -> float:
        return statistics.median(getattr(r, part).tiles_per_second / getattr(r, other).tiles_per_second for r in rounds)

    return {
        "size": options.size, "image/patch/tile": "/".join(map(str, shape)),
        "workers x threads": f"{options.workers} x {threads_of(options.workers)}", "batch per worker": options.batch,
        "precision": rounds[0].precision,
        "compression": options.compression if not options.data else "as given",
        "bare tiles/s": middle("bare"), "DDP tiles/s": middle("ddp"), "end to end tiles/s": middle("run"),
        "end to end / bare": ratio("run", "bare"), "end to end / DDP": ratio("run", "ddp"), "DDP / bare": ratio("ddp", "bare"),
        "data wait": statistics.median(r.run.data_wait for r in rounds),
        "peak GB": max(r.run.peak for r in rounds) / 1e9,
    }  # fmt: skip


def spending(shape: tuple[int, int, int], rounds: list[Round]) -> dict[str, float | str]:
    """CPU milliseconds per tile: of the steps, of the run's train workers, and of all that runs beside them."""

    def role(name: str) -> float:
        return 1e3 * statistics.median(r.run.cpu_per_tile.get(name, 0.0) for r in rounds)

    return {
        "image/patch/tile": "/".join(map(str, shape)),
        "bare": 1e3 * statistics.median(r.bare.cpu_per_tile for r in rounds),
        "DDP": 1e3 * statistics.median(r.ddp.cpu_per_tile for r in rounds),
        **{name: role(name) for name in (WORKERS, TASKS, IDLE, "actors", "raylet", "gcs", DAEMONS, "driver")},
        "all but train workers": 1e3 * statistics.median(r.run.outside for r in rounds),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
