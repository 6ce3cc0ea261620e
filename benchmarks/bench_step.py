"""A training step without Ray, against the plain published computation and against what the machine can do at most.

    python -m benchmarks.bench_step [key=value ...]      --help lists the keys

For every size and shape all computations take turns in one process (benchmarks/timing.py).  A row is one of them:

- times plain: how many times as fast a step is as the published computation in plain PyTorch, float32 (benchmarks/plain.py);
- times masked-dense: the same for forward and backward of the encoder alone, against dense convolutions and a mask, float32;
- times eager: the same for a compiled step, against the same one not compiled;
- memory of plain: peak memory of steps, each in a process of its own, as a share of that of the plain computation;
- GFLOP per tile counts what the mathematics needs (mmearth_ray/model/flops.py), the same for every computation of a size and
  shape; MFU is GFLOP/s over the measured peak of matrix products, and the share of the roofline is the least time that this
  machine's matrices and memory allow (benchmarks/roofline.py) over the time taken.

Runs where there is only PyTorch, NumPy and PyArrow; on a GPU where there is one.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch

from benchmarks.computations import (
    PLAIN,
    Subject,
    Work,
    dense_encoder,
    make_subject,
    our_encoder,
    our_loss,
    our_step,
    plain_step,
)
from benchmarks.largest import largest_batch
from benchmarks.memory import Options as MemoryOptions
from benchmarks.memory import allow_tf32, in_fresh_process
from benchmarks.parts import operators, time_parts
from benchmarks.record import Row, circumstances, table, write
from benchmarks.roofline import PRECISIONS, Peaks, Precision, bounds, measure_peaks, rows_of, total
from benchmarks.shapes import parse_shape
from benchmarks.timing import Laps, Stopwatch, ratio, seconds, take_turns
from mmearth_ray import settings
from mmearth_ray.errors import DataError, UsageError, run_command
from mmearth_ray.model.encoder import BACKENDS, SIZES, Backend
from mmearth_ray.model.flops import count, layers, shape_of
from mmearth_ray.settings import key

DENSE = "masked-dense"


@dataclass(frozen=True)
class Options:
    sizes: list[str] = key(["atto"], "encoder sizes", among=tuple(SIZES))
    shapes: list[str] = key(["56/8", "112/16"], "image and patch size of each measurement, as IMAGE/PATCH")
    backends: list[str] = key(
        ["packed"], "backends of ours; one that cannot run here is left out, with the reason", among=BACKENDS
    )
    precisions: list[str] = key(["fp32"], "of ours; bf16 is autocast", among=tuple(PRECISIONS))
    batch: list[int] = key([32], "tiles per step: one number, or one per size", at_least=1)
    rounds: int = key(5, "rounds that count", at_least=1)
    against: list[str] = key([PLAIN, DENSE], "what ours is measured against", among=(PLAIN, DENSE))
    compile: bool = key(False, "measure torch.compile of the objective as well")
    memory: bool = key(True, "measure peak memory, each in a process of its own")
    parts: bool = key(True, "measure the parts and operators of each step of ours")
    largest: bool = key(False, "find the largest batch that fits (on a GPU)")
    tf32: bool = key(False, "let float32 products on a GPU be rounded to TF32")
    peak_rows: int = key(0, "rows of the largest matrix for the peaks; 0 takes 2048 on a CPU and 8192 on a GPU", at_least=0)
    peak_megabytes: int = key(0, "arrays for the peak of memory; 0 takes 256 MiB on a CPU and 2 GiB on a GPU", at_least=0)
    theme: str = key("step", "first part of the result's name")
    save: bool = key(True, "write the result to benchmarks/results/")

    def batch_of(self, size: str) -> int:
        return self.batch[self.sizes.index(size)] if len(self.batch) > 1 else self.batch[0]


@dataclass(frozen=True)
class Computation:
    """What takes turns: a backend of ours or what it is compared with; a whole step, or its encoder alone."""

    name: str
    precision: Precision = "fp32"
    compiled: bool = False
    part: str = "step"

    @property
    def named(self) -> Row:
        return {"computation": f"{self.name}, compiled" if self.compiled else self.name, "precision": self.precision}


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    _check(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allow_tf32(options.tf32)
    precisions = cast(list[Precision], list(dict.fromkeys(["fp32", *options.precisions])))
    peaks = measure_peaks(device, precisions, max(options.batch), options.peak_rows, options.peak_megabytes << 20)
    tables: dict[str, list[Row]] = {"steps": [], "peaks": list(rows_of(peaks))}
    for size, shape in itertools.product(options.sizes, options.shapes):
        for heading, rows in measure(options, size, shape, device, peaks).items():
            tables.setdefault(heading, []).extend(rows)
    about = circumstances("benchmarks.bench_step") | ({"tf32": options.tf32} if device.type == "cuda" else {})
    for heading, rows in tables.items():
        print("\n".join([f"{heading}:", *table(rows), ""]) if rows else f"{heading}: nothing\n")
    if options.save:
        print(f"written to {write(options.theme, about, tables.pop('steps'), tables)}")
    return 0


def _check(options: Options) -> None:
    if len(options.batch) not in (1, len(options.sizes)):
        raise UsageError(f"batch={options.batch}: give one number, or one for each of {len(options.sizes)} sizes")
    if options.largest and not torch.cuda.is_available():
        raise UsageError("largest=true needs a GPU, and PyTorch sees none")
    for shape in options.shapes:
        parse_shape(shape)


def measure(options: Options, size: str, shape: str, device: torch.device, peaks: Peaks) -> dict[str, list[Row]]:
    """The tables of one size and shape: steps, and what else was asked for."""
    subject = make_subject(size, *parse_shape(shape), options.batch_of(size), device)
    named = {"size": size, "image/patch": shape, "batch": subject.tiles}
    works, reasons = _runnable(_works(options, subject))
    laps = take_turns(works, options.rounds, device)
    steps = [c for c in works if c.part == "step"]
    peak_memory = {c: _memory(options, subject, c, reasons) for c in steps if options.memory and not c.compiled}
    rows: list[Row] = [{**named, **_row(subject, c, laps, peak_memory, peaks)} for c in steps]
    tables: dict[str, list[Row]] = {
        "steps": rows,
        "not measured": [{**named, **c.named, "part": c.part, "reason": reason} for c, reason in reasons.items()],
    }
    ours = [c for c in steps if c.name != PLAIN and not c.compiled]
    for c in ours if options.parts else []:
        loss = our_loss(subject, cast(Backend, c.name), c.precision)
        parts = time_parts(subject, loss, min(options.rounds, 3))
        tables.setdefault("parts, ms", []).append({**named, **c.named, **parts})
        tables.setdefault("operators", []).extend({**named, **c.named, **row} for row in operators(subject, loss))
    if options.largest:
        found = {
            c: largest_batch(subject, partial(our_step, backend=cast(Backend, c.name), precision=c.precision)) for c in ours
        }
        tables["largest batch"] = [{**named, **c.named, "tiles": float(tiles)} for c, tiles in found.items()]
    return tables


def _works(options: Options, subject: Subject) -> dict[Computation, Callable[[], Work]]:
    """Everything that is to be measured, in the order of its turns, not built yet."""
    wanted: dict[Computation, Callable[[], Work]] = {}
    for name, p in itertools.product(options.backends, options.precisions):
        backend, precision = cast(Backend, name), cast(Precision, p)
        wanted[Computation(backend, precision)] = partial(our_step, subject, backend, precision)
        if options.compile:
            wanted[Computation(backend, precision, compiled=True)] = partial(
                our_step, subject, backend, precision, compiled=True
            )
        if DENSE in options.against:
            wanted[Computation(backend, precision, part="encoder")] = partial(our_encoder, subject, backend, precision)
    if PLAIN in options.against:
        wanted[Computation(PLAIN)] = partial(plain_step, subject)
    if DENSE in options.against:
        wanted[Computation(DENSE, part="encoder")] = partial(dense_encoder, subject)
    return wanted


def _runnable(wanted: dict[Computation, Callable[[], Work]]) -> tuple[dict[Computation, Work], dict[Computation, str]]:
    """What can run here, after one try, and why the rest cannot."""
    works, reasons = {}, {}
    for computation, make in wanted.items():
        cannot = (UsageError, RuntimeError if computation.compiled else torch.OutOfMemoryError)
        try:
            work = make()
            work(Stopwatch(torch.device("cpu")))
            works[computation] = work
        except cannot as error:
            reasons[computation] = next(iter(str(error).splitlines()), type(error).__name__)
    return works, reasons


def _memory(options: Options, subject: Subject, computation: Computation, reasons: dict[Computation, str]) -> int | None:
    """Peak bytes of steps in a process of their own; None, with a reason, where that fails."""
    words = MemoryOptions(
        size=subject.size, image_size=subject.image_size, patch_size=subject.patch_size, batch=subject.tiles,
        computation=computation.name, precision=computation.precision, tf32=options.tf32, threads=torch.get_num_threads(),
    )  # fmt: skip
    torch.cuda.empty_cache()  # for the other process
    try:
        return in_fresh_process(words)
    except DataError as error:
        reasons[replace(computation, part="memory")] = str(error)
        return None


def _row(
    subject: Subject,
    c: Computation,
    laps: dict[Computation, Laps],
    peak_memory: dict[Computation, int | None],
    peaks: Peaks,
) -> Row:
    """The row of a step."""
    took = seconds(laps[c])
    shape = shape_of(subject.objective.model, subject.image_size, subject.batch["visible"].shape[1])
    flops = count(shape).step
    parameters = sum(p.numel() for p in subject.objective.parameters())
    bound = total(bounds(layers(shape), parameters, subject.tiles, c.precision, peaks).values())
    encoder, eager = replace(c, part="encoder"), replace(c, compiled=False)
    plain, dense = Computation(PLAIN), Computation(DENSE, part="encoder")
    memory, of_plain = peak_memory.get(c), peak_memory.get(plain)
    return {
        **c.named, "tiles/s": subject.tiles / took,
        **{f"{part} ms": 1e3 * seconds(laps[c], part) for part in ("forward", "backward", "optimizer")},
        "times plain": ratio(laps[plain], laps[c]) if plain in laps else None,
        "times masked-dense": ratio(laps[dense], laps[encoder]) if {dense, encoder} <= laps.keys() else None,
        "times eager": ratio(laps[eager], laps[c]) if c.compiled and eager in laps else None,
        "peak MiB": memory / 2**20 if memory else None,
        "memory of plain": memory / of_plain if memory and of_plain else None,
        "GFLOP per tile": flops / 1e9, "GFLOP/s": flops * subject.tiles / took / 1e9,
        "MFU": flops * subject.tiles / took / peaks.flops[c.precision], "share of the roofline": bound.seconds / took,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
