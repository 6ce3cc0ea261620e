"""What a training step is measured on: ours on each backend, eager or compiled, and the plain published computation.

All computations of ours share one objective and its optimizer, as a step does not change what the next one costs; the plain
one has its own copies.  None of it needs Ray.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.masked_dense import encode
from benchmarks.plain import Plain
from benchmarks.roofline import PRECISIONS, Precision
from benchmarks.subject import build, make_batch
from benchmarks.timing import Stopwatch
from mmearth_ray.model.encoder import SIZES, Backend, sparse_layout
from mmearth_ray.objective import Objective

Batch = dict[str, Tensor]
Loss = Callable[[], Tensor]
Work = Callable[[Stopwatch], None]

PLAIN = "plain"


@dataclass(frozen=True)
class Subject:
    """An objective, its optimizer and a batch on their device, and what errors are divided by."""

    size: str
    image_size: int
    patch_size: int
    device: torch.device
    objective: Objective
    optimizer: torch.optim.Optimizer
    batch: Batch
    totals: Tensor

    @property
    def tiles(self) -> int:
        return len(self.batch["visible"])


def make_subject(size: str, image_size: int, patch_size: int, tiles: int, device: torch.device) -> Subject:
    """The default objective of a size with random tiles."""
    objective = build(size, image_size, patch_size).to(device)
    batch = {name: t.to(device) for name, t in make_batch(tiles, image_size, patch_size).items()}
    totals = objective.valid_counts(batch).sum(0)
    return Subject(size, image_size, patch_size, device, objective, adamw(objective), batch, totals)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of training, in one group."""
    return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)


@contextmanager
def precision_of(precision: Precision, device: torch.device) -> Iterator[None]:
    """fp32 as it is, bf16 as autocast: weights, norms and losses stay float32."""
    with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        yield


def our_loss(subject: Subject, backend: Backend, precision: Precision, *, compiled: bool = False) -> Loss:
    """The loss of the objective.  Raises UsageError if there is no such backend here."""
    layout, objective = sparse_layout(backend), subject.objective
    run = torch.compile(objective) if compiled else objective

    def loss() -> Tensor:
        objective.model.encoder.sparse_layout = layout
        with precision_of(precision, subject.device):
            return run(subject.batch, subject.totals, 1.0)[0]

    return loss


def our_step(subject: Subject, backend: Backend, precision: Precision, *, compiled: bool = False) -> Work:
    """A training step, in laps of its three parts."""
    return step(our_loss(subject, backend, precision, compiled=compiled), subject.optimizer)


def plain_step(subject: Subject) -> Work:
    """The published computation in float32; what its loader would do is done before."""
    plain = Plain(subject.objective).to(subject.device)
    inputs = plain.prepare(subject.batch)
    return step(lambda: plain(inputs)[0], adamw(plain))


def step(loss: Loss, optimizer: torch.optim.Optimizer) -> Work:
    """Forward, backward and optimizer, each a lap."""

    def work(watch: Stopwatch) -> None:
        value = loss()
        watch.lap("forward")
        value.backward()
        watch.lap("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")

    return work


def our_encoder(subject: Subject, backend: Backend, precision: Precision) -> Work:
    """Forward and backward of the encoder alone."""
    layout, encoder = sparse_layout(backend), subject.objective.model.encoder
    image = subject.objective.image(subject.batch)

    def features() -> Tensor:
        encoder.sparse_layout = layout
        with precision_of(precision, subject.device):
            return encoder(image, subject.batch["visible"])

    return _there_and_back(subject, features)


def dense_encoder(subject: Subject) -> Work:
    """The same by dense convolutions and a mask, in float32."""
    image, patches = subject.objective.image(subject.batch), (subject.image_size // subject.patch_size) ** 2
    seen = torch.zeros(subject.tiles, patches, device=subject.device).scatter(1, subject.batch["visible"], 1.0)
    parameters = dict(subject.objective.model.encoder.named_parameters())
    depths = SIZES[subject.size].depths
    return _there_and_back(subject, lambda: encode(parameters, image, seen, subject.patch_size, depths))


def _there_and_back(subject: Subject, features: Callable[[], Tensor]) -> Work:
    parameters = list(subject.objective.model.encoder.parameters())

    def work(watch: Stopwatch) -> None:
        torch.autograd.grad(features().float().sum(), parameters)
        watch.lap("encoder")

    return work
