"""A tiny objective over all modalities, and random raw batches for it as the data pipeline would deliver them."""

import torch
from tensors import draw_patches, randomise
from torch import Tensor

from mmearth_ray.modalities import PRODUCTS, Kind, Level, Modality, tasks
from mmearth_ray.model.decoder import Decoder
from mmearth_ray.model.encoder import Encoder, Stem
from mmearth_ray.model.mpmae import MPMAE
from mmearth_ray.objective import Objective, Weighting

TARGETS = tasks()
INPUT = TARGETS[0]
SIDE, PATCH, GRID = 24, 8, 3
DTYPES = {"uint16": torch.uint16, "int16": torch.int16, "int8": torch.int8, "float32": torch.float32}


def make_objective(
    targets: tuple[Modality, ...] = TARGETS,
    weighting: Weighting = "uncertainty",
    patch_size: int = PATCH,
    others: tuple[int, ...] = (),
    stem: Stem = "modified",
) -> Objective:
    encoder = Encoder(len(INPUT.bands), (1, 1, 1, 1), (4, 8, 8, 16), patch_size, stem)
    model = MPMAE(encoder, Decoder(16, patch_size, targets, width=16), others)
    randomise(model, torch.Generator().manual_seed(4))
    objective = Objective(
        model,
        input=INPUT,
        targets=targets,
        statistics=make_statistics((INPUT, *targets)),
        normalise_targets=frozenset({INPUT.name}) & {m.name for m in targets},
        weighting=weighting,
    )
    if objective.log_variances is not None:
        torch.nn.init.normal_(objective.log_variances, generator=torch.Generator().manual_seed(5))
    return objective


def make_statistics(modalities: tuple[Modality, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    out = {}
    for m in modalities:
        if m.kind is Kind.CONTINUOUS:
            mean = torch.rand(1, len(m.bands), generator=generator).repeat(len(PRODUCTS), 1) * 10
            out[m.name] = mean, mean + 20
    return out


def make_values(m: Modality, batch: int, generator: torch.Generator, side: int = SIDE) -> Tensor:
    shape = (batch, side, side) if m.level is Level.PIXEL else (batch,)
    if m.kind is Kind.CATEGORICAL:
        dtype = torch.int8 if m.level is Level.PIXEL else torch.int16
        return torch.randint(-1, m.width, shape, generator=generator).to(dtype)
    values = torch.randint(0, 60, (batch, len(m.bands), *shape[1:]), generator=generator).to(DTYPES[m.dtype])
    if m.dtype == "float32":
        values[torch.rand(values.shape, generator=generator) < 0.1] = torch.nan
    return values


def make_batch(batch: int = 4, targets: tuple[Modality, ...] = TARGETS, seed: int = 7, side: int = SIDE) -> dict[str, Tensor]:
    """Images of `side` px, of 3 x 3 patches."""
    generator = torch.Generator().manual_seed(seed)
    out = {m.name: make_values(m, batch, generator, side) for m in {m.name: m for m in (INPUT, *targets)}.values()}
    out |= {m.present_column: torch.ones(batch, dtype=torch.bool) for m in (INPUT, *targets) if m.kind is Kind.CONTINUOUS}
    visible, hidden = draw_patches(batch, GRID**2, 4, generator)
    product = torch.randint(0, len(PRODUCTS), (batch,), generator=generator).to(torch.int8)
    return out | {"visible": visible, "hidden": hidden, "product": product}
