"""The roofline of a training step: what this machine's matrices and memory allow at most, and the share that is reached.

    python -m benchmarks.roofline [key=value ...]      --help lists the keys; prints the peaks of this machine

Model (Williams et al., 2009, doi:10.1145/1498765.1498785), part by part, a part being what `mmearth_ray.model.flops` calls so:
a part takes at least max(FLOPs / peak, bytes / bandwidth), and the step at least the sum over its parts.  The bytes are a
minimum that no implementation can go below unless it keeps features in caches:

- every weight is read in the forward and in the backward pass, and its gradient is written once, in float32;
- what a convolution or matrix puts out is written once, and read once in the backward pass, in the precision of the step;
- AdamW reads weight, gradient and both moments, and writes weight and both moments, in float32.

Peaks are measured in the same run as the step.  Bytes per second are counted as STREAM does (McCalpin, 1995): what a program
reads and writes, without the lines that a cache fetches before it writes to them.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.record import table
from benchmarks.timing import best
from mmearth_ray import settings
from mmearth_ray.errors import run_command
from mmearth_ray.model.flops import PARTS, Layer
from mmearth_ray.settings import key

Precision = Literal["fp32", "bf16"]

PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}

WEIGHT_BYTES = 3 * 4  # read twice, its gradient written once
ADAMW_BYTES = (4 + 3) * 4  # reads and writes of AdamW

HEADS = (30, 512, 11264)  # hidden patches of a tile (49 less 19), decoder's width, all outputs of maps at patches of 16 px
SQUARES = {"cpu": (256, 2048), "cuda": (1024, 8192)}
VECTOR_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Of each array that is copied: 8 times a third-level cache of 32 MiB, 40 times the second-level cache of a large GPU."""
REPEATS = 5
PATIENCE = 10.0  # seconds for one product


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of matrix products by precision, and bytes/s of memory."""

    flops: Mapping[Precision, float]
    bandwidth: float


@dataclass(frozen=True)
class Bound:
    """The least that a part of a step can take: FLOPs, bytes, and seconds on a machine of given peaks."""

    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Options:
    batch: int = key(32, "tiles per step, for the shape of the heads' matrix", at_least=1)
    largest: int = key(0, "rows of the largest square matrix; 0 takes 2048 on a CPU and 8192 on a GPU", at_least=0)
    megabytes: int = key(0, "size of the arrays that are copied; 0 takes 256 MiB on a CPU and 2 GiB on a GPU", at_least=0)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = measure_peaks(device, tuple(PRECISIONS), options.batch, options.largest, options.megabytes << 20)
    print("\n".join(table(rows_of(peaks))))
    return 0


def measure_peaks(
    device: torch.device, precisions: Sequence[Precision], batch: int, largest: int = 0, vector_bytes: int = 0
) -> Peaks:
    """Peaks of this machine now: the best matrix product of each precision, the best of copy and triad."""
    small, large = SQUARES[device.type]
    sides = [min(small, largest), largest] if largest else [small, large]
    shapes = [(side, side, side) for side in sides]
    if not largest:
        shapes.append((batch * HEADS[0], *HEADS[1:]))
    flops: dict[Precision, float] = {p: _matrix_peak(PRECISIONS[p], device, shapes) for p in precisions}
    return Peaks(flops, _bandwidth(device, vector_bytes or VECTOR_BYTES[device.type]))


def _matrix_peak(dtype: torch.dtype, device: torch.device, shapes: Sequence[tuple[int, int, int]]) -> float:
    """The best rate; a shape that would take too long at the rates before it (bf16 where it is emulated) is left out."""
    peak = 0.0
    for shape in shapes:
        if peak == 0 or 2 * math.prod(shape) / peak < PATIENCE:
            peak = max(peak, _matrix_rate(dtype, device, *shape))
    return peak


def _matrix_rate(dtype: torch.dtype, device: torch.device, rows: int, inner: int, columns: int) -> float:
    a, b = torch.randn(rows, inner, device=device).to(dtype), torch.randn(inner, columns, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return 2 * rows * inner * columns / best(lambda: torch.mm(a, b, out=out), REPEATS, device)


def _bandwidth(device: torch.device, size: int) -> float:
    a, b, c = (torch.ones(size // 4, device=device) for _ in range(3))
    copy = best(lambda: a.copy_(b), REPEATS, device)
    triad = best(lambda: torch.add(b, c, alpha=0.5, out=a), REPEATS, device)
    return max(2 * a.nbytes / copy, 3 * a.nbytes / triad)


def bounds(layers: Iterable[Layer], parameters: int, batch: int, precision: Precision, peaks: Peaks) -> dict[str, Bound]:
    """The bound of every part of a step of `batch` tiles, for a model of `parameters` numbers."""
    work = {part: [0, 0] for part in PARTS}
    for layer in layers:
        work[layer.part][0] += batch * layer.training()
        work[layer.part][1] += layer.parameters * WEIGHT_BYTES + 2 * batch * layer.values * BYTES[precision]
    rate = peaks.flops[precision]
    found: dict[str, Bound] = {
        part: Bound(flops, size, max(flops / rate, size / peaks.bandwidth)) for part, (flops, size) in work.items()
    }
    size = parameters * ADAMW_BYTES
    return found | {"optimizer": Bound(0, size, size / peaks.bandwidth)}


def total(parts: Iterable[Bound]) -> Bound:
    """The bound of a step from those of its parts."""
    parts = list(parts)
    return Bound(sum(p.flops for p in parts), sum(p.bytes for p in parts), sum(p.seconds for p in parts))


def rows_of(peaks: Peaks) -> list[dict[str, str | float]]:
    """The peaks as a table."""
    rates: list[dict[str, str | float]] = [
        {"peak": f"matrix product, {precision}", "value": rate / 1e9, "unit": "GFLOP/s"}
        for precision, rate in peaks.flops.items()
    ]
    return [*rates, {"peak": "memory, copy or triad", "value": peaks.bandwidth / 1e9, "unit": "GB/s"}]


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
