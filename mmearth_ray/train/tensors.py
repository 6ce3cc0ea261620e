"""Tensors that workers hold in parts and put together one at a time."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class Gathered(Mapping[str, Tensor]):
    """Tensors by name, each put together from all workers' parts when it is asked for, and kept by nobody.

    `like` gives their shapes and types, on any device.  Every worker must ask for the same tensors in the same order.
    """

    def __init__(self, like: Mapping[str, Tensor], gather: Callable[[str], Tensor]) -> None:
        self.like = like
        self.gather = gather

    def __getitem__(self, name: str) -> Tensor:
        return self.gather(name)

    def __contains__(self, name: object) -> bool:
        return name in self.like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of every tensor.  Nothing is gathered."""
    return {name: t.nbytes for name, t in (tensors.like if isinstance(tensors, Gathered) else tensors).items()}


def shape_only(shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without values: what `Gathered.like` holds."""
    return torch.empty(shape, dtype=dtype, device="meta")
