"""A tiny release in the published form, converted and opened: raw HDF5 values at one end, gradients at the other.

Shapes: B tiles, C bands, N hidden patches, P pixels along the side of a patch, T targets.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from release_fixture import edit_hdf5, write_release
from tensors import randomise
from torch import Tensor

from mmearth_ray import config as configuration
from mmearth_ray.experiment import Experiment, build_objective, open_experiment
from mmearth_ray.model.encoder import Encoder
from mmearth_ray.model.layers import Scope
from mmearth_ray.model.mpmae import with_decoder
from mmearth_ray.objective import Objective
from mmearth_ray.shards.convert import ConvertOptions, convert
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.stream.prepare import Batch, Piece, assemble
from mmearth_ray.stream.reader import RowGroup, read_group
from mmearth_ray.train.loop import to_device

TILES, SIDE, PATCH = 18, 24, 8
WOODED, UNMAPPED, MIXED, PLACELESS = 0, 1, 2, 3  # tiles with a trait of their own, see below


def give_traits(file: Any) -> None:
    """All tree cover, all gaps, all kinds of fillers, and neither biome nor ecoregion."""
    file["esa_worldcover"][WOODED] = 10
    file["esa_worldcover"][UNMAPPED] = 0
    file["esa_worldcover"][MIXED, 0, 2] = 11  # no code of the release
    file["canopy_height_eth"][MIXED, :, 5:9] = -128
    file["aster"][MIXED, :, 4:20:3] = -32768
    file["biome"][PLACELESS] = 0
    file["eco_region"][PLACELESS] = 0


def convert_release(folder: Path, *changes: Callable[[Path], None]) -> Manifest:
    """The release as `release_fixture` writes it, with those traits and changes, converted: one row group."""
    release = write_release(folder / "release", tiles=TILES, size=SIDE)
    for change in (edit_hdf5(give_traits), *changes):
        change(release)
    return convert(release, folder / "shards", ConvertOptions(workers=1))


def open_tiny(manifest: Manifest, *arguments: str) -> tuple[Experiment, Objective]:
    """An experiment on the whole tiles, and its objective around a very small model.

    Weights are of everyday size, so that no part is switched off by zeros.
    """
    small = [f"model.image_size={SIDE}", "train.global_batch=8"]
    config = configuration.load([*small, *arguments])
    experiment = open_experiment(config, manifest.directory)
    objective, spec = build_objective(experiment, initial=False), experiment.spec
    encoder = Encoder(len(spec.input.bands), (1, 1, 1, 1), (4, 8, 8, 16), PATCH, grn=cast(Scope, config.model.grn))
    objective.model = with_decoder(encoder, spec.targets, width=16)
    randomise(objective, torch.Generator().manual_seed(8))
    return experiment, objective


def row_group(experiment: Experiment) -> RowGroup:
    """All tiles, in arrays of their own."""
    (tiles,) = experiment.source.sets
    (shard,) = tiles.shards
    found = read_group(shard, 0, tiles.tile_size, experiment.spec.modalities)
    columns, present = ({name: column.copy() for name, column in part.items()} for part in (found.columns, found.present))
    return replace(found, columns=columns, present=present)


def samples(experiment: Experiment, tiles: list[int], group: RowGroup | None = None) -> Batch:
    """Those tiles, prepared, in that order."""
    group = group or row_group(experiment)
    rows = np.array([group.id.index(str(tile)) for tile in tiles])
    return assemble(experiment.spec, [Piece(group, rows, 0, experiment.source.name)])


@dataclass(frozen=True)
class Step:
    """What one step over a batch that is the whole global batch computed.  Predictions carry their gradients."""

    loss: Tensor
    errors: dict[str, float]
    counts: dict[str, int]
    gradients: dict[str, Tensor]
    predictions: dict[str, Tensor]


def step(objective: Objective, batch: Batch) -> Step:
    seen: dict[str, Tensor] = {}

    def keep(module: object, arguments: object, predictions: dict[str, Tensor]) -> None:
        for prediction in predictions.values():
            prediction.retain_grad()
        seen.update(predictions)

    names = [m.name for m in objective.targets]
    totals_T = torch.from_numpy(batch["count"].sum(0))
    objective.zero_grad()
    hook, threads = objective.model.register_forward_hook(keep), torch.get_num_threads()
    torch.set_num_threads(1)  # too little work for more
    loss, errors_T = objective(to_device(batch, torch.device("cpu")), totals_T, 1.0)
    loss.backward()
    torch.set_num_threads(threads)
    hook.remove()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return Step(
        loss.detach(),
        dict(zip(names, errors_T.tolist(), strict=True)),
        dict(zip(names, totals_T.tolist(), strict=True)),
        gradients,
        seen,
    )


def gradient_of(prediction: Tensor) -> Tensor:
    assert prediction.grad is not None
    return prediction.grad


def at_hidden(maps_BCHW: np.ndarray, hidden_BN: np.ndarray) -> Tensor:
    """The hidden patches in the layout of the heads (B, N, P P, C), cut out one by one."""
    cut = []
    for maps_CHW, row in zip(maps_BCHW, hidden_BN.tolist(), strict=True):
        corners = [(place // (SIDE // PATCH) * PATCH, place % (SIDE // PATCH) * PATCH) for place in row]
        patches = [maps_CHW[:, y : y + PATCH, x : x + PATCH] for y, x in corners]
        cut.append(np.stack([patch.reshape(len(patch), -1).T for patch in patches]))
    return torch.from_numpy(np.stack(cut))
