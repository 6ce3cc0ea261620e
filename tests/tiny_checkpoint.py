"""Small checkpoints, and what tests ask of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmearth_ray.storage import Location
from mmearth_ray.train.checkpoint import State, committed, opened
from mmearth_ray.train.commit import Keeping, begin

FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


def tensors(seed: int, kind: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 4), "a.bias": (3,), "scalar": (), "empty": (0, 2)}
    return {name: (100 * torch.randn(shape, generator=generator)).to(kind) for name, shape in shapes.items()}


def load_tensors(path: Location) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with opened(path) as (weights, moments):
        return dict(weights), dict(moments)


def state(step: int) -> State:
    settings = {"model.size": "atto", "model.targets": ["x", "y"], "optimizer.lr": None, "optimizer.base_lr": 1.5e-4, "seed": 0}
    return State(step, step * 64, settings, {"data": "d1", "table": "t1"}, {"torch": "2", "commit": "å"})


def save(
    folder: Location, given: State, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], **keeping: Any
) -> Location:
    return begin(folder, given, weights, moments, Keeping(**keeping)).commit()


def commit(folder: Location, *steps: int, keep: int = 0) -> None:
    for step in steps:
        save(folder, state(step), tensors(step), tensors(step + 1), keep=keep)


def names(folder: Location) -> list[str]:
    return [path.name for path in committed(folder)]


def same(found: dict[str, Tensor], given: dict[str, Tensor]) -> bool:
    return found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
