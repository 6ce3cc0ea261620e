"""Recognising a published checkpoint: its structure, tasks and bands from names, shapes and the run's arguments."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmearth_ray.checkpoints.assemble import input_of, parameter_shapes
from mmearth_ray.checkpoints.folder import Description, statistics_by_product
from mmearth_ray.checkpoints.pth import OURS, Published
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.modalities import DEFAULT_INPUT, TABLE, Kind, Level, Modality, get
from mmearth_ray.model.published import Structure, from_published, read_structure
from mmearth_ray.objective import ENCODER
from mmearth_ray.shards.manifest import load_manifest
from mmearth_ray.shards.stats import normalisation

GRID = 7  # patches along the side of the published crops: 56 / 8, 112 / 16, 224 / 32


def import_published(published: Published, bands: Mapping[str, list[str]]) -> tuple[Description, dict[str, Tensor]]:
    """What the published model is, and its weights by our names.

    `bands` names the bands of a modality where neither the run's arguments nor their number tell.  A file that we wrote says
    itself what it is.  Raises DataError for a checkpoint that is not MP-MAE's, UsageError for bands that are needed or do not
    fit.

    Of a model that predicts what is no modality of the table (the published ImageNet baseline) only the encoder is imported,
    without targets; its channels are not what the published arguments call them, so `bands` must say.
    """
    try:
        structure, state = read_structure(published.state), published.state
    except IndexError as error:
        raise DataError("the shapes of the checkpoint's tensors are not those of MP-MAE") from error
    if published.description is not None:
        return _as_exported(published, bands)
    known = {m.name for m in TABLE if m.kind is Kind.CONTINUOUS} & {DEFAULT_INPUT, *structure.outputs}
    unknown = [name for name in bands if name not in known]
    if unknown:
        raise UsageError(f"bands.{unknown[0]}: the checkpoint has no {unknown[0]}, or none with bands to choose")
    foreign = [name for name in structure.outputs if name not in {m.name for m in TABLE}]
    if foreign:
        if DEFAULT_INPUT not in bands:
            raise UsageError(
                f"the checkpoint predicts {', '.join(foreign)}, which is no modality, so only its encoder can be imported; say "
                f"what its {structure.in_channels} channels stand for: bands.{DEFAULT_INPUT}=[...]"
            )
        structure = replace(structure, outputs={}, uncertainty=False)
        state = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    description = _describe(structure, published, bands)
    shapes = {k: v for k, v in parameter_shapes(description).items() if k.startswith(ENCODER) or not foreign}
    return description, from_published(state, shapes, description.targets)


def _as_exported(published: Published, bands: Mapping[str, list[str]]) -> tuple[Description, dict[str, Tensor]]:
    """The model as it was when we exported it."""
    description = Description.from_json(published.description, Path(f"the checkpoint's '{OURS}'"))
    own = {description.input: description.bands} | description.target_bands
    for name, given in bands.items():
        if own.get(name) != list(given):
            raise UsageError(f"bands.{name}: the checkpoint was exported with {own.get(name)}; leave the key out")
    return description, from_published(published.state, parameter_shapes(description), description.targets)


def _describe(structure: Structure, published: Published, bands: Mapping[str, list[str]]) -> Description:
    arguments = published.arguments
    entry = _with_bands(DEFAULT_INPUT, structure.in_channels, arguments, bands)
    maps = {name: structure.patch_size**2 if get(name).level is Level.PIXEL else 1 for name in structure.outputs}
    targets = {
        name: _with_bands(name, structure.outputs[name] // maps[name], arguments, bands)
        for name in _in_order(structure.outputs, published)
    }
    size = arguments.get("input_size")
    normalises = bool(arguments.get("norm_pix_loss", True)) and entry.name in targets
    return Description(
        size=structure.size, depths=list(structure.depths), dims=list(structure.dims), patch_size=structure.patch_size,
        image_size=size if isinstance(size, int) and size % structure.patch_size == 0 else GRID * structure.patch_size,
        stem=structure.stem, grn="batch", input=entry.name, bands=list(entry.bands), units=list(entry.units),
        missing=list(entry.missing), statistics=None, targets=list(targets),
        target_bands={name: list(m.bands) for name, m in targets.items() if m.kind is Kind.CONTINUOUS},
        normalise_targets=[entry.name] if normalises else [],
        weighting="uncertainty" if structure.uncertainty else "unweighted",
        decoder_width=structure.decoder_width, decoder_depth=structure.decoder_depth,
        origin={"published": {"epoch": published.epoch, "args": arguments}},
    )  # fmt: skip


def with_statistics(description: Description, shards: Path) -> Description:
    """The description with the band statistics of the release that a data set was converted from: the published runs'.

    Raises DataError for no data set, or one whose release had none of these bands.
    """
    manifest = load_manifest(shards)
    mean, std = normalisation(manifest.release_statistics or {}, input_of(description))
    if not np.isfinite(mean).any():
        raise DataError(
            f"{shards} has no statistics of a release for {description.input} {', '.join(description.bands)}; name shards that "
            "were converted from the release it was trained on"
        )
    return replace(description, statistics=statistics_by_product(mean, std), data_set=manifest.name)


def _in_order(outputs: Mapping[str, int], published: Published) -> list[str]:
    """Tasks in the order of their log-variances: that of the run's arguments, or of the heads.

    Where somebody sorted the tensors by name the heads have lost it; the table's order is that of the published runs.
    """
    given = published.arguments.get("out_modalities")
    if isinstance(given, dict) and set(given) == set(outputs):
        return list(given)
    if list(published.state) == sorted(published.state):
        return [m.name for m in TABLE if m.name in outputs]
    return list(outputs)


def _with_bands(name: str, count: int, arguments: Mapping[str, Any], bands: Mapping[str, list[str]]) -> Modality:
    """The row with the bands that the user, the run's arguments or their number name."""
    row = get(name)
    if row.kind is not Kind.CONTINUOUS:
        if row.width != count:
            raise DataError(f"the head of {name} has {count} classes, the table has {row.width}")
        return row
    if name in bands and len(bands[name]) != count:
        raise UsageError(f"bands.{name} names {len(bands[name])} bands, the checkpoint has {count}")
    colour = [band for band in row.bands if band in row.display]  # HDF5 reads in the file's order: RGB runs are blue first
    guesses = [*_named_bands(name, arguments), row.default_bands().bands, row.bands, colour if name == DEFAULT_INPUT else ()]
    for given in [bands[name]] if name in bands else guesses:
        if len(given) == count:
            return _selected(row, list(given))
    raise UsageError(f"the checkpoint has {count} bands of {name} and does not say which; name them: bands.{name}=[...]")


def _named_bands(name: str, arguments: Mapping[str, Any]) -> list[list[str]]:
    """Bands of a modality in the run's arguments, wherever they name some."""
    tables = [arguments.get(key) for key in ("modalities", "out_modalities", "inp_modalities")]
    found = [table[name] for table in tables if isinstance(table, dict) and isinstance(table.get(name), list)]
    return [given for given in found if all(isinstance(band, str) and band in get(name).bands for band in given)]


def _selected(row: Modality, bands: list[str]) -> Modality:
    try:
        return row.select(bands)
    except ValueError as error:
        raise UsageError(str(error)) from error
