"""Tensors in files of bounded size, written by workers side by side and read one tensor at a time.

What fits into one file is one file, `NAME.safetensors`.  More are `NAME-00001-of-00003.safetensors` and so on, with
`NAME.safetensors.index.json` beside them, as Hugging Face's libraries write and read them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.files import write_failure
from mmearth_ray.storage import Location
from mmearth_ray.train.tensors import sizes_of

LIMIT = 1 << 30
"""Bytes of tensors in a file, at most, unless a single one is larger: what a writer holds in memory."""


@dataclass(frozen=True)
class Team:
    """The workers that write together: which of them this is, and how they tell each other what went wrong.

    `share` gives every worker the first text that is not empty, in their order; all of them call it.
    """

    rank: int = 0
    workers: int = 1
    share: Callable[[str], str] = str

    @contextmanager
    def together(self, what: Location) -> Iterator[None]:
        """A step that all workers take: the end waits for all, and where one failed, DataError is raised on every one.

        A UsageError stays one on the worker that it arose on.
        """
        failed, said = None, ""
        try:
            yield
        except (DataError, UsageError) as error:
            failed, said = error, str(error)
        except (OSError, SafetensorError) as error:
            failed, said = error, write_failure(what, error)
        if said := self.share(said):
            raise (UsageError if isinstance(failed, UsageError) else DataError)(said) from failed


def plan(file: str, sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Which file holds which tensors, for sizes in bytes, in the order given."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {file: groups[0]}
    stem, _, ending = file.rpartition(".")
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.{ending}": group for i, group in enumerate(groups, 1)}


def index_of(file: str, tensors: Mapping[str, Tensor], limit: int) -> str:
    """The text of the index of all files, empty where there is only one."""
    sizes = sizes_of(tensors)
    files = plan(file, sizes, limit)
    if len(files) == 1:
        return ""
    where = {name: part for part, names in files.items() for name in names}
    return json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}, indent=1)


def write_parts(
    tensors_of: Mapping[str, Mapping[str, Tensor]],
    team: Team,
    put: Callable[[str, dict[str, Tensor]], None],
    limit: int = LIMIT,
) -> None:
    """Have every file of `tensors_of[file]` put by one of the workers, as many at a time as there are workers.

    A worker that fails keeps taking part, as tensors are gathered from all, and raises in the end.
    """
    files = [(part, tensors, names) for file, tensors in tensors_of.items()
             for part, names in plan(file, sizes_of(tensors), limit).items()]  # fmt: skip
    failed = None
    for start in range(0, len(files), team.workers):
        mine: tuple[str, dict[str, Tensor]] | None = None
        for writer, (part, tensors, names) in enumerate(files[start : start + team.workers]):
            held = {}
            for name in names:
                tensor = tensors[name]
                if writer == team.rank and failed is None:
                    held[name] = tensor.detach().to("cpu").contiguous()
            mine = (part, held) if writer == team.rank and failed is None else mine
        try:
            if mine:
                put(*mine)
        except (OSError, SafetensorError, DataError) as error:
            failed = error
    if failed:
        raise failed


class Stored(Mapping[str, Tensor]):
    """The tensors of files, each read when it is asked for.  Raises OSError and SafetensorError for what cannot be opened."""

    def __init__(self, files: Iterable[Path], stack: ExitStack) -> None:
        opened: list[Any] = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        self.where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  (no mapping)

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)

    def shapes(self) -> dict[str, list[int]]:
        """Of all tensors, by name.  None is read."""
        return {name: file.get_slice(name).get_shape() for name, file in self.where.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def fill(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give every parameter its value, one at a time."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
