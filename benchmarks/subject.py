"""What is measured: the default objective of a size, and batches of random values in the native types of the stream."""

import torch
from torch import Tensor

from mmearth_ray.modalities import PRODUCTS, Kind, Level, Modality, tasks
from mmearth_ray.model.mpmae import build_mpmae, initialise
from mmearth_ray.objective import Objective

TARGETS = tasks()
INPUT = TARGETS[0]


def build(size: str, image_size: int, patch_size: int) -> Objective:
    """The default objective of that size, initialised."""
    model = build_mpmae(size=size, in_channels=len(INPUT.bands), image_size=image_size, patch_size=patch_size, targets=TARGETS)
    initialise(model, "uniform", torch.Generator().manual_seed(0))
    numbers = {m.name: torch.ones(len(PRODUCTS), len(m.bands)) for m in TARGETS if m.kind is Kind.CONTINUOUS}
    return Objective(
        model, input=INPUT, targets=TARGETS, statistics={name: (x * 50, x * 30) for name, x in numbers.items()},
        normalise_targets=frozenset({INPUT.name}),
    )  # fmt: skip


def make_batch(batch: int, image_size: int, patch_size: int) -> dict[str, Tensor]:
    """Random raw values in native types, 60 % of patches hidden, nothing missing."""
    generator = torch.Generator().manual_seed(0)
    patches = (image_size // patch_size) ** 2
    order = torch.rand(batch, patches, generator=generator).argsort(1)
    visible = int(patches * 0.4)
    made = {m.name: _values(m, batch, image_size, generator) for m in TARGETS}
    made |= {m.present_column: torch.ones(batch, dtype=torch.bool) for m in TARGETS}
    made["product"] = torch.zeros(batch, dtype=torch.int8)
    return made | {"visible": order[:, :visible].sort().values, "hidden": order[:, visible:].sort().values}


def _values(m: Modality, batch: int, side: int, generator: torch.Generator) -> Tensor:
    shape = (batch, *([] if m.kind is Kind.CATEGORICAL else [len(m.bands)]), *([side, side] if m.level is Level.PIXEL else []))
    if m.kind is Kind.CATEGORICAL:
        labels = torch.randint(0, m.width, shape, generator=generator)
        return labels.to(torch.int8 if m.level is Level.PIXEL else torch.int16)
    return torch.randint(1, 100, shape, generator=generator).to(getattr(torch, m.dtype))
