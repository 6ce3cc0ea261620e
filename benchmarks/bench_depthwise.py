"""The depthwise convolution alone, forward and backward, for the four stages of an encoder size.

    python -m benchmarks.bench_depthwise [key=value ...]      --help lists the keys

The same features, weights and gradients, 60 % of patches hidden, 7x7:

- packed: `PackedLayout`, on a GPU an ordinary convolution by cuDNN over maps into which the visible cells are spread;
- dense: `DenseLayout`, an ordinary convolution over whole maps, everything visible: so 2.5 times as many cells; on a GPU only;
- triton: `TritonLayout`, which reads neighbours through an index; on a GPU only.

All take turns in one process (benchmarks/timing.py).  On a GPU they are captured as CUDA graphs and replayed, so that what is
measured is the GPU's time and not that of launching.  Times packed: how many times as fast as packed, the median of the rounds'
own ratios.  GB/s counts what forward and backward must read and write at least, five times the features that a computation has:
input and output, then both gradients and the input again.  Differences are the largest |a - b| / max |b|, b being packed in
float32 on the same values.

Runs where there is only PyTorch, NumPy and PyArrow.  Shapes: B images, V visible patches, Q cells along the side of a patch,
D channels.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

import torch
from torch import Tensor

from benchmarks.record import Row, circumstances, table, write
from benchmarks.roofline import BYTES, PRECISIONS, Precision
from benchmarks.timing import Laps, Stopwatch, ratio, seconds, take_turns
from mmearth_ray import settings
from mmearth_ray.errors import UsageError, run_command
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.model.layers import CELLS, DenseLayout, Layout, PackedLayout
from mmearth_ray.model.triton_layout import TritonLayout, require_triton
from mmearth_ray.settings import key

HIDDEN, KERNEL = 0.6, 7
BATCHES = {"cpu": 8, "cuda": 256}
PASSES = 5  # over the features, at least: read x, write y; read x and the gradient of y, write that of x


@dataclass(frozen=True)
class Options:
    sizes: list[str] = key(["atto"], "encoder sizes", among=tuple(SIZES))
    grid: int = key(7, "patches along the side of an image", at_least=2)
    batch: int = key(0, "tiles; 0 takes 256 on a GPU and 8 on a CPU", at_least=0)
    precisions: list[str] = key(["fp32", "bf16"], "precisions of features and weights", among=tuple(PRECISIONS))
    rounds: int = key(10, "rounds that count", at_least=1)
    repeats: int = key(5, "times that every round runs each computation", at_least=1)
    graphs: bool = key(True, "on a GPU: replay CUDA graphs")
    save: bool = key(True, "write the result to benchmarks/results/")


@dataclass(frozen=True)
class Subject:
    """A layout with what it convolves, and the gradient of its output."""

    layout: Layout
    x_BVQQD: Tensor
    weight_D1KK: Tensor
    bias_D: Tensor
    slopes_BVQQD: Tensor

    def forward(self) -> Tensor:
        return self.layout.depthwise(self.x_BVQQD, self.weight_D1KK, self.bias_D)

    def both(self) -> tuple[Tensor, ...]:
        """The output, then the gradients of features, weight and bias."""
        output = self.forward()
        return output, *torch.autograd.grad(output, (self.x_BVQQD, self.weight_D1KK, self.bias_D), self.slopes_BVQQD)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = replace(options, batch=options.batch or BATCHES[device.type])
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    absent = why_absent(device)
    if absent:
        print(f"triton is not measured: {absent}")
    stages = product(options.sizes, range(4), cast(list[Precision], options.precisions))
    rows = [row for size, stage, precision in stages for row in measure(options, size, stage, precision, device, not absent)]
    print("\n".join(table(rows)))
    if options.save:
        about = circumstances("benchmarks.bench_depthwise") | ({"triton": f"not measured: {absent}"} if absent else {})
        print(f"written to {write('depthwise', about, rows)}")
    return 0


def why_absent(device: torch.device) -> str:
    """Why Triton cannot be measured; empty if it can."""
    if device.type != "cuda":
        return "it needs a GPU, and PyTorch finds none here"
    try:
        require_triton()
    except UsageError as error:
        return str(error)
    return ""


def measure(options: Options, size: str, stage: int, precision: Precision, device: torch.device, triton: bool) -> list[Row]:
    """A row for each computation of a stage."""
    cells, channels = CELLS >> stage, SIZES[size].dims[stage]
    subjects = draw(options, cells, channels, PRECISIONS[precision], device, triton)
    expected = in_float32(subjects["packed"]).both()
    works = {
        f"{part} {name}": _repeated(_launched(function, options.graphs and device.type == "cuda"), options.repeats)
        for name, subject in subjects.items()
        for part, function in (("forward", subject.forward), ("both", subject.both))
    }
    laps = take_turns(works, options.rounds, device)
    return [
        {
            "size": size, "cells": f"{cells}x{cells}", "channels": channels, "batch": options.batch,
            "precision": precision, "computation": name,
            **_speeds(laps, name, options.repeats, PASSES * BYTES[precision] * subject.x_BVQQD.numel()),
            **({} if name == "dense" else _differences(subject.both(), expected)),
        }
        for name, subject in subjects.items()
    ]  # fmt: skip


def draw(
    options: Options, cells: int, channels: int, dtype: torch.dtype, device: torch.device, triton: bool
) -> dict[str, Subject]:
    """The computations by name."""
    generator = torch.Generator().manual_seed(0)
    patches, grid = options.grid**2, (options.grid, options.grid)
    order_BL = torch.rand(options.batch, patches, generator=generator).argsort(1)
    visible_BV = order_BL[:, : int(patches * (1 - HIDDEN))].sort().values.to(device)
    weight = torch.randn(channels, 1, KERNEL, KERNEL, generator=generator) / KERNEL
    bias = torch.randn(channels, generator=generator)
    weight, bias = (t.to(device, dtype).requires_grad_() for t in (weight, bias))

    def subject(layout: Layout, *shape: int) -> Subject:
        own = torch.Generator().manual_seed(1)
        x, slopes = (torch.randn(*shape, channels, generator=own).to(device, dtype) for _ in range(2))
        return Subject(layout, x.requires_grad_(), weight, bias, slopes)

    shown, whole = (*visible_BV.shape, cells, cells), (options.batch, 1, options.grid * cells, options.grid * cells)
    found = {"packed": subject(PackedLayout(visible_BV, grid), *shown)}
    if device.type == "cuda":
        found["dense"] = subject(DenseLayout(), *whole)
    if triton:
        found["triton"] = subject(TritonLayout(visible_BV, grid), *shown)
    return found


def in_float32(subject: Subject) -> Subject:
    """The same values with float32 arithmetic."""
    tensors = (subject.x_BVQQD, subject.weight_D1KK, subject.bias_D)
    x_BVQQD, weight_D1KK, bias_D = (t.detach().float().requires_grad_() for t in tensors)
    return Subject(subject.layout, x_BVQQD, weight_D1KK, bias_D, subject.slopes_BVQQD.float())


def _launched(function: Callable[[], object], graph: bool) -> Callable[[], object]:
    """The function; or, if a graph is asked for, the replay of what it does on the GPU."""
    if not graph:
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, chooses algorithms, allocates
            function()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        function()
    return captured.replay


def _repeated(function: Callable[[], object], repeats: int) -> Callable[[Stopwatch], None]:
    def work(watch: Stopwatch) -> None:
        for _ in range(repeats):
            function()
        watch.lap("all")

    return work


def _speeds(laps: Mapping[str, Laps], name: str, repeats: int, size: int) -> Row:
    both = seconds(laps[f"both {name}"]) / repeats
    return {
        "forward ms": 1e3 * seconds(laps[f"forward {name}"]) / repeats, "forward and backward ms": 1e3 * both,
        "times packed": ratio(laps["both packed"], laps[f"both {name}"]), "GB/s": size / both / 1e9,
    }  # fmt: skip


def _differences(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Row:
    pairs = [(a.detach().float(), b.detach()) for a, b in zip(found, expected, strict=True)]
    worst = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    assert all(map(math.isfinite, worst))
    return {"output difference": worst[0], "gradient difference": max(worst[1:])}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
