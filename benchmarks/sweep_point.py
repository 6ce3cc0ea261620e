"""One point of a sweep: what a training step of one model costs, measured in the process that calls."""

from dataclasses import dataclass

import torch

from benchmarks.computations import Subject, Work, make_subject, our_step
from benchmarks.memory import peak_of_steps
from benchmarks.plain import Plain
from benchmarks.roofline import Precision
from benchmarks.timing import Laps, Stopwatch, ratio, seconds, take_turns
from mmearth_ray.model.encoder import Backend
from mmearth_ray.model.flops import count, shape_of
from mmearth_ray.objective import VISIBLE

PEAK_STEPS = 2
"""Steps after which memory has peaked: the first one allocates AdamW's moments, the second has them from its start."""


@dataclass(frozen=True)
class Point:
    """What is measured: image and patch in px, batch in tiles, steps that count, beside the plain computation or alone."""

    size: str
    image: int
    patch: int
    batch: int
    backend: Backend
    precision: Precision
    device: str
    steps: int
    plain: bool

    def __str__(self) -> str:
        return f"{self.size} {self.image}/{self.patch} batch {self.batch} {self.backend} {self.precision} {self.device}"


@dataclass(frozen=True)
class Measurement:
    """Medians over the steps; GFLOP of forward and backward; `plain_ratio`: the plain computation's time over ours."""

    encoder_parameters: int
    parameters: int
    tiles_per_second: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    memory_bytes: int
    gflop_per_tile: float
    gflop_per_second: float
    plain_ratio: float | None


def measure(point: Point) -> Measurement:
    """Measure a point.  In a process that has done nothing else, its memory is that of its first steps
    (`benchmarks.memory`)."""
    device = torch.device(point.device)
    subject = make_subject(point.size, point.image, point.patch, point.batch, device)
    step = our_step(subject, point.backend, point.precision)
    memory = peak_of_steps(step, device, PEAK_STEPS)
    laps = take_turns({"ours": step} | ({"plain": plain_computation(subject)} if point.plain else {}), point.steps, device)
    ours, rate, gflop = laps["ours"], point.batch / seconds(laps["ours"]), gflop_per_tile(subject)
    return Measurement(
        encoder_parameters=sum(p.numel() for p in subject.objective.model.encoder.parameters()),
        parameters=sum(p.numel() for p in subject.objective.parameters()),
        tiles_per_second=rate,
        forward_ms=1e3 * seconds(ours, "forward"),
        backward_ms=1e3 * seconds(ours, "backward"),
        optimizer_ms=1e3 * seconds(ours, "optimizer"),
        memory_bytes=memory,
        gflop_per_tile=gflop,
        gflop_per_second=gflop * rate,
        plain_ratio=ratio(laps["plain"], without_optimizer(ours)) if point.plain else None,
    )


def plain_computation(subject: Subject) -> Work:
    """Forward and backward of the published computation in float32; what its loader would do is done before.

    Without its AdamW, which would do what ours does, and on our weights: for the largest models there may be no room twice.
    """
    plain, ours = Plain(subject.objective), dict(subject.objective.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.data = ours[name].data
    inputs = plain.prepare(subject.batch)

    def work(watch: Stopwatch) -> None:
        loss = plain(inputs)[0]
        watch.lap("forward")
        loss.backward()
        watch.lap("backward")
        plain.zero_grad(set_to_none=True)

    return work


def without_optimizer(laps: Laps) -> Laps:
    """Forward and backward alone."""
    return [{name: time for name, time in lap.items() if name != "optimizer"} for lap in laps]


def gflop_per_tile(subject: Subject) -> float:
    """10^9 operations that a tile's forward and backward need (`mmearth_ray.model.flops`)."""
    visible = subject.batch[VISIBLE].shape[1]
    return count(shape_of(subject.objective.model, subject.image_size, visible)).step / 1e9
