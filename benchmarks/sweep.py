"""A sweep over encoder sizes, shapes, batches, backends and precisions: what a training step of each costs, as one report.

    python -m benchmarks.sweep [key=value ...]      --help lists the keys

Every point is a Ray task in a process of its own, alone on its machine's cores (or on a GPU); RAY_ADDRESS joins a cluster, on
whose nodes points run side by side.  Finished points are kept in `directory`, one file each, and are not measured again: a
sweep that was stopped or killed goes on where it was.  A point that fails does not stop the others; it is tried again at the
next start.  The directory's table, figures and report.html show all its points, those of earlier sweeps too.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.record import circumstances
from benchmarks.roofline import PRECISIONS, Precision
from benchmarks.shapes import parse_shape
from benchmarks.sweep_point import Measurement, Point
from benchmarks.sweep_store import Record, Store, read_all
from mmearth_ray import settings
from mmearth_ray.errors import DataError, UsageError, run_command
from mmearth_ray.model.encoder import BACKENDS, SIZES, Backend, sparse_layout
from mmearth_ray.progress import counted
from mmearth_ray.settings import key

BATCHES = {"atto": 32, "femto": 32, "pico": 16, "nano": 16, "tiny": 8, "base": 4, "large": 2, "huge": 1}
"""Tiles per step where none are asked for: the eight sizes then take minutes, and 24 GiB, on a CPU with two cores."""

ONLY_ON: dict[Backend, str] = {"minkowski": "cpu", "triton": "cuda"}
"""Backends that run on one kind of device only."""

Run = Callable[[Sequence[Point]], Iterator[tuple[Point, dict[str, Any], Measurement | str]]]
"""Measures points, in any order: yields each with its circumstances and its numbers, or the reason why it has none."""


@dataclass(frozen=True)
class Options:
    sizes: list[str] = key(list(SIZES), "encoder sizes", among=tuple(SIZES))
    shapes: list[str] = key(["112/16"], "image and patch sizes, as IMAGE/PATCH in px")
    batches: list[int] = key([], "tiles per step; empty: by size, 32 for atto to 1 for huge", at_least=1)
    backends: list[str] = key(["packed"], "what convolves visible patches", among=BACKENDS)
    precisions: list[str] = key(["fp32"], "precisions; bf16 is autocast, with weights in float32", among=tuple(PRECISIONS))
    device: str = key("auto", "what to measure on; auto: a GPU where this machine has one", among=("auto", "cpu", "cuda"))
    steps: int = key(5, "steps that count", at_least=1)
    plain: bool = key(True, "measure the plain computation of the published code beside ours, for the ratio")
    directory: str = key("benchmarks/results/sweep", "where points, table, figures and report are kept")
    report_only: bool = key(False, "measure nothing; make table, figures and report anew from the points")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    points, directory = plan(options), Path(options.directory).expanduser()
    failed: list[Record] = []
    if not options.report_only:
        from benchmarks.sweep_tasks import run_tasks  # Ray is slow to load, and a report needs none

        about = circumstances("benchmarks.sweep")
        failed = complete(points, Store(directory, about), about, run_tasks)
    from benchmarks.sweep_report import write_report  # so is matplotlib, and a wrong command needs none

    print(f"report written to {write_report(directory, read_all(directory))}")
    if failed:
        names = "; ".join(f"{record.point}: {record.failure}" for record in failed)
        raise DataError(f"{len(failed)} of {counted(len(points), 'point')} failed ({names}); the same command tries again")
    return 0


def plan(options: Options) -> list[Point]:
    """Every point that the options ask for, once.  Raises UsageError for what cannot be measured."""
    axes = {name: getattr(options, name) for name in ("sizes", "shapes", "backends", "precisions")}
    for name, values in axes.items():
        if not values:
            raise UsageError(f"{name}=[]: name at least one, or leave {name} out for the default")
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    for backend in cast(list[Backend], options.backends):
        sparse_layout(backend)
        if (only := ONLY_ON.get(backend, device)) != device:
            raise UsageError(f"backends=[{backend}] runs on {only} only, not on {device}; set device={only}, or leave it out")
    shapes = [parse_shape(shape) for shape in options.shapes]
    points = [
        Point(size, *shape, batch, cast(Backend, backend), cast(Precision, precision), device, options.steps, options.plain)
        for shape, backend, precision, size in product(shapes, options.backends, options.precisions, options.sizes)
        for batch in options.batches or [BATCHES[size]]
    ]
    return list(dict.fromkeys(points))


def complete(points: Sequence[Point], store: Store, about: dict[str, Any], run: Run) -> list[Record]:
    """Measure the points that are not finished yet, keep each as it comes, and return those that failed."""
    waiting = [point for point in points if not store.is_finished(point)]
    if len(waiting) < len(points):
        print(f"{len(points) - len(waiting)} of {counted(len(points), 'point')} finished before")
    own = {name: about[name] for name in ("command", "commit")}
    failed: list[Record] = []
    outcomes = run(waiting) if waiting else iter(())
    for number, (point, where, outcome) in enumerate(outcomes, len(points) - len(waiting) + 1):
        result, failure = (None, outcome) if isinstance(outcome, str) else (outcome, "")
        time = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(point, {**about, **where, **own, "time": time}, result, failure)
        store.write(record)
        if result is None:
            failed.append(record)
        said = f"{result.tiles_per_second:.4g} tiles/s" if result else f"failed: {failure}"
        print(f"{number}/{len(points)} {point}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
