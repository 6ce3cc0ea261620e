"""A checkpoint that one worker reads and hands to the others, tensor by tensor: a store is asked once, not by every worker."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmearth_ray.errors import DataError
from mmearth_ray.storage import Location
from mmearth_ray.train.checkpoint import opened
from mmearth_ray.train.tensors import Gathered, shape_only

Tensors = Mapping[str, Tensor]


@contextmanager
def handed_out(path: Location, rank: int, workers: int, device: torch.device) -> Iterator[tuple[Tensors, Tensors]]:
    """The checkpoint's weights and moments, on the CPU, read by the first worker.

    All workers ask for the same tensors in the same order; `device` is where they hand them on.  Raises DataError on all of
    them if the checkpoint cannot be read.
    """
    if workers == 1:
        with opened(path) as found:
            yield found
        return
    with ExitStack() as stack:
        held: tuple[Tensors, Tensors] = ({}, {})
        told: list[Any] = ["", [{}, {}]]
        failed = None
        if rank == 0:
            try:
                held = found = stack.enter_context(opened(path))
                told[1] = [tensors.shapes() for tensors in found]
            except DataError as error:
                failed, told[0] = error, str(error)
        dist.broadcast_object_list(told, src=0, device=device)
        said, shapes = told
        if said:
            raise DataError(said) from failed
        yield _received(held[0], shapes[0], device), _received(held[1], shapes[1], device)


def _received(held: Tensors, shapes: dict[str, list[int]], device: torch.device) -> Tensors:
    """The first worker's tensors, which are float32 as all of a checkpoint's; others hold none before they receive them."""

    def receive(name: str) -> Tensor:
        tensor = held[name].to(device) if held else torch.empty(shapes[name], device=device)
        dist.broadcast(tensor, src=0)
        return tensor.cpu()

    return Gathered({name: shape_only(tuple(shape)) for name, shape in shapes.items()}, receive)
