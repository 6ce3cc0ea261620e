"""The newest checkpoint: one worker reads it and hands it on tensor by tensor, so that a store is asked once and all agree."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmearth_ray.errors import DataError
from mmearth_ray.storage import Location
from mmearth_ray.train.checkpoint import State, load_state, newest, opened
from mmearth_ray.train.tensors import Gathered, shape_only

Tensors = Mapping[str, Tensor]


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
    with ExitStack() as stack:
        found, failed = Handed(None, {}, {}), None
        told: list[Any] = ["", None, {}, {}]
        if rank == 0:
            try:
                if path := newest(folder):
                    weights, moments = stack.enter_context(opened(path))
                    found = Handed(load_state(path), weights, moments)
                    told = ["", found.state, weights.shapes(), moments.shapes()]
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


def _received(held: Tensors, shapes: dict[str, list[int]], device: torch.device) -> Tensors:
    """The first worker's tensors, which are float32 as all of a checkpoint's; others hold none before they receive them."""

    def receive(name: str) -> Tensor:
        tensor = held[name].to(device) if held else torch.empty(shapes[name], device=device)
        dist.broadcast(tensor, src=0)
        return tensor.cpu()

    return Gathered({name: shape_only(tuple(shape)) for name, shape in shapes.items()}, receive)
