"""The newest checkpoint: one worker reads it and hands it on tensor by tensor, so that a store is asked once and all agree.

A store may take longer for it than a collective operation is given: meanwhile the others wait in many short ones.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmearth_ray.errors import DataError
from mmearth_ray.storage import Location, is_remote
from mmearth_ray.train.checkpoint import State, load_state, newest, opened
from mmearth_ray.train.tensors import Gathered, shape_only

Tensors = Mapping[str, Tensor]
Shapes = dict[str, list[int]]

LOOK_SECONDS = 1.0
"""How long one of the many waits is."""


class Handed(NamedTuple):
    """A checkpoint's state, None where there is none yet, and its weights and moments, on the CPU."""

    state: State | None
    weights: Tensors
    moments: Tensors


@contextmanager
def handed_out(folder: Location, rank: int, workers: int, device: torch.device) -> Iterator[Handed]:
    """The newest checkpoint in a folder, read by the first worker.

    All workers ask for the same tensors in the same order; `device` is where they hand them on.  Raises DataError on all of
    them if it cannot be read.
    """
    with ExitStack() as held, ExitStack() as stack:
        reading = stack.enter_context(ThreadPoolExecutor(1)).submit(_read, folder, held) if rank == 0 else None
        if workers > 1 and is_remote(folder):  # a directory that hangs is found by the first operation's limit
            _wait(reading, device)
        found, failed = Handed(None, {}, {}), None
        told: list[Any] = ["", None, {}, {}]
        if reading:
            try:
                found, *shapes = reading.result()
                told = ["", found.state, *shapes]
            except DataError as error:
                failed, told[0] = error, str(error)
        if workers > 1:
            dist.broadcast_object_list(told, src=0, device=device)
        said, state, *shapes = told
        if said:
            raise DataError(said) from failed
        if workers > 1:
            found = Handed(state, *(_received(*each, device) for each in zip(found[1:], shapes, strict=True)))
        yield found


def _read(folder: Location, held: ExitStack) -> tuple[Handed, Shapes, Shapes]:
    """The newest checkpoint, open as long as `held` is, and the shapes of its weights and moments."""
    if path := newest(folder):
        weights, moments = held.enter_context(opened(path))
        return Handed(load_state(path), weights, moments), weights.shapes(), moments.shapes()
    return Handed(None, {}, {}), {}, {}


def _wait(reading: Future[Any] | None, device: torch.device) -> None:
    """Wait on all workers until the first, which alone is reading, is done."""
    done = torch.zeros((), dtype=torch.uint8, device=device)
    while not done.item():
        if reading:
            wait([reading], timeout=LOOK_SECONDS)
            done.fill_(reading.done())
        dist.broadcast(done, src=0)


def _received(held: Tensors, shapes: Shapes, device: torch.device) -> Tensors:
    """The first worker's tensors, which are float32 as all of a checkpoint's; others hold none before they receive them."""

    def receive(name: str) -> Tensor:
        tensor = held[name].to(device) if held else torch.empty(shapes[name], device=device)
        dist.broadcast(tensor, src=0)
        return tensor.cpu()

    return Gathered({name: shape_only(tuple(shape)) for name, shape in shapes.items()}, receive)
