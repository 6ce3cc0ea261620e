"""What a forward and a backward pass hold beside the weights, from tensors that have shapes and no values.

Every operation of the real objective runs in PyTorch's FakeTensorMode, and the storages that it makes are counted while they
live: inputs, what is saved for the backward pass, and what comes and goes in between.  Nothing is measured, so the largest
model takes as long as a small one and no memory.  Not counted: what a kernel uses inside itself, such as cuDNN's workspaces.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmearth_ray.config import input_of, normalised_targets, sizes_of, targets_of, visible_patches
from mmearth_ray.experiment import build_model
from mmearth_ray.keys import Config
from mmearth_ray.modalities import PRODUCTS, Kind, Level, Missing, Modality
from mmearth_ray.model.layers import PackedLayout
from mmearth_ray.model.mpmae import MPMAE
from mmearth_ray.objective import Objective, Weighting
from mmearth_ray.train.engine import recompute_blocks

TILES = 1 << 30
"""Tiles of the micro-batch that is followed.  It is so large that the size of a storage, divided by it, tells how it grows with
the micro-batch, and the remainder what of it does not."""


@dataclass(frozen=True)
class Bytes:
    """Bytes that are held at once: so many whatever the micro-batch, and so many for each of its tiles."""

    fixed: int
    per_tile: int

    def of(self, tiles: int) -> int:
        return self.fixed + self.per_tile * tiles


@dataclass(frozen=True)
class Snapshot:
    """What is held in the stretch of the passes between the gradients of two parameters.

    levels: of the activations, those that are the highest for some micro-batch.  done: elements of the parameters whose
    gradients are there when it begins; they are not among the activations.
    """

    levels: tuple[Bytes, ...]
    done: int

    def activations(self, tiles: int) -> int:
        """Bytes, the most at once."""
        return max(level.of(tiles) for level in self.levels)


@dataclass(frozen=True)
class Passes:
    """The passes of a micro-batch, and the model's parameters: elements of each."""

    parameters: tuple[int, ...]
    snapshots: tuple[Snapshot, ...]


def follow(config: Config, *, on_gpu: bool = True) -> list[Passes]:
    """The passes of a run with these settings: of its image size, or of each of those that take turns.

    `on_gpu`: the computation is that of GPUs, by the packed backend.
    """
    return [_follow(config, image_size, patch_size, on_gpu) for image_size, patch_size in sizes_of(config.model)]


def _follow(config: Config, image_size: int, patch_size: int, on_gpu: bool) -> Passes:
    with FakeTensorMode():
        objective = build(config)
        if on_gpu:
            for model in (objective.model, *objective.model.sizes.values()):
                cast(MPMAE, model).encoder.sparse_layout = _OnGPU
        if config.train.activation_checkpointing:
            recompute_blocks(objective, reentrant=False)
        totals = torch.ones(len(objective.targets), dtype=torch.int64)
        with Watch([*objective.parameters(), *objective.buffers()], TILES) as watch, watch.gradients_of(objective):
            batch = make_batch(objective, TILES, image_size, patch_size, config.model.mask_ratio)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
                loss, _ = objective(batch, totals, 1.0)
            loss.backward()
        return Passes(tuple(p.numel() for p in objective.parameters()), tuple(watch.snapshots))


class _OnGPU(PackedLayout):
    """What GPUs do for visible patches, whatever device the tensors say they are on."""

    depthwise = PackedLayout.on_maps


class Watch(TorchDispatchMode):
    """Adds up the storages that operations make while they live, but for those of `held`; `tiles` are in the micro-batch."""

    def __init__(self, held: Iterable[Tensor], tiles: int) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in held}
        self.tiles, self.live, self.done = tiles, Bytes(0, 0), 0
        self.levels = [self.live]
        self.snapshots: list[Snapshot] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        per_tile = round(storage.nbytes() / self.tiles)
        fixed = storage.nbytes() - per_tile * self.tiles
        self.known.add(storage._cdata)
        self._add(fixed, per_tile)
        if not any(level.fixed >= self.live.fixed and level.per_tile >= self.live.per_tile for level in self.levels):
            self.levels.append(self.live)
        weakref.finalize(storage, self._gone, storage._cdata, fixed, per_tile)

    def _add(self, fixed: int, per_tile: int) -> None:
        self.live = Bytes(self.live.fixed + fixed, self.live.per_tile + per_tile)

    def _gone(self, storage: int, fixed: int, per_tile: int) -> None:
        self.known.discard(storage)
        self._add(-fixed, -per_tile)

    @contextmanager
    def gradients_of(self, module: nn.Module) -> Iterator[None]:
        """Let every gradient go as soon as it is there, and write down the stretch that ends with it."""
        hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in module.parameters()]
        yield
        self._note()
        for hook in hooks:
            hook.remove()

    def _arrived(self, parameter: Tensor) -> None:
        self._note()
        parameter.grad = None
        self.done += parameter.numel()
        self.levels = [self.live]

    def _note(self) -> None:
        self.snapshots.append(Snapshot(tuple(a for a in self.levels if not any(_above(b, a) for b in self.levels)), self.done))


def _above(one: Bytes, other: Bytes) -> bool:
    """Whether it is more for every micro-batch."""
    return one != other and one.fixed >= other.fixed and one.per_tile >= other.per_tile


def build(config: Config) -> Objective:
    """The objective that a run with these settings trains, whatever its weights and statistics."""
    model, entry, targets = config.model, input_of(config), targets_of(config)
    none = {m.name: torch.ones(len(PRODUCTS), len(m.bands)) for m in (entry, *targets) if m.kind is Kind.CONTINUOUS}
    return Objective(
        build_model(config, "packed"), input=entry, targets=targets,
        statistics={name: (ones, ones) for name, ones in none.items()},
        normalise_targets=frozenset(normalised_targets(config)), missing=cast(Missing, model.missing),
        weighting=cast(Weighting, model.weighting),
    )  # fmt: skip


def make_batch(objective: Objective, tiles: int, image_size: int, patch_size: int, mask_ratio: float) -> dict[str, Tensor]:
    """What a micro-batch is on the device: every modality in its native type, and which patches are visible."""
    modalities = {m.name: m for m in (objective.input, *objective.targets)}
    batch = {name: _values(m, tiles, image_size) for name, m in modalities.items()}
    batch |= {m.present_column: torch.ones(tiles, dtype=torch.bool) for m in modalities.values()}
    patches = (image_size // patch_size) ** 2
    visible = visible_patches(patches, mask_ratio)
    order = torch.arange(patches).repeat(tiles, 1)
    batch |= {"visible": order[:, :visible].clone(), "hidden": order[:, visible:].clone()}
    return batch | {"product": torch.zeros(tiles, dtype=torch.int8)}


def _values(m: Modality, tiles: int, side: int) -> Tensor:
    shape = (tiles, *([] if m.kind is Kind.CATEGORICAL else [len(m.bands)]), *([side, side] if m.level is Level.PIXEL else []))
    labels = torch.int8 if m.level is Level.PIXEL else torch.int16
    return torch.zeros(shape, dtype=labels if m.kind is Kind.CATEGORICAL else getattr(torch, m.dtype))
