"""Published checkpoints: `.pth` files of MMEarth-train, to an exported model and back.

A `.pth` is a pickle, and a pickle can run code.  It is read by PyTorch's restricted unpickler, which is told of just what
these files hold beside tensors: the run's arguments, an argparse.Namespace in which paths may lie; those become strings.
"""

import argparse
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from mmearth_ray.checkpoints.assemble import input_of, parameter_shapes
from mmearth_ray.checkpoints.folder import Description, Exported, statistics_by_product
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.files import complete_or_absent
from mmearth_ray.modalities import DEFAULT_INPUT, TABLE, Kind, Level, Modality, get
from mmearth_ray.model.published import Structure, from_published, read_structure, to_published
from mmearth_ray.objective import ENCODER
from mmearth_ray.shards.manifest import load_manifest
from mmearth_ray.shards.stats import normalisation

GRID = 7  # patches along the side of the published crops: 56 / 8, 112 / 16, 224 / 32
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")


@dataclass(frozen=True)
class Published:
    """A published checkpoint as read: tensors by published names, and the run's arguments in JSON's types."""

    state: dict[str, Tensor]
    arguments: dict[str, Any]
    epoch: int | None


def read_pth(path: Path) -> Published:
    """Raises DataError for a file that cannot be read, that is no such checkpoint, or that holds any other pickled class."""
    try:
        with safe_globals([argparse.Namespace, *_paths()]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is refused: {_refusal(path, error)}") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a PyTorch checkpoint ({_first_line(error)})") from error
    state = found.get("model") if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no state dict under 'model', as published checkpoints do")
    arguments = found.get("args")
    plain = _plain(vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments or {})
    epoch = found.get("epoch")
    return Published({str(k): v for k, v in state.items()}, plain, epoch if isinstance(epoch, int) else None)


def _paths() -> list[Any]:
    """Classes of paths under all names that pickles give them, each standing for a function that makes a string."""
    names = [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in PATHS]
    return [(_path, name) for name in names]


def _path(*parts: str) -> str:
    return str(Path(*parts))


def _refusal(path: Path, error: Exception) -> str:
    """Which classes the pickle wants beside those that are allowed."""
    try:
        with safe_globals([argparse.Namespace, *_paths()]):
            wanted = [name for name in get_unsafe_globals_in_checkpoint(path) if not name.startswith("pathlib.")]
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError):
        wanted = []
    if not wanted:
        return _first_line(error)
    return (
        f"it pickles {', '.join(sorted(wanted))}, and unpickling may run code; only tensors, plain values, argparse.Namespace "
        "and paths are read"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _plain(value: Any) -> Any:
    """The value in JSON's types; what has none (a tensor, a number that is not finite) as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def import_published(published: Published, bands: Mapping[str, list[str]]) -> tuple[Description, dict[str, Tensor]]:
    """What the published model is, and its weights by our names.

    `bands` names the bands of a modality where neither the run's arguments nor their number tell.  Raises DataError for a
    checkpoint that is not MP-MAE's, UsageError for bands that are needed or do not fit.

    Of a model that predicts what is no modality of the table (the published ImageNet baseline) only the encoder is imported,
    without targets; its channels are not what the published arguments call them, so `bands` must say.
    """
    structure, state = read_structure(published.state), published.state
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


def _describe(structure: Structure, published: Published, bands: Mapping[str, list[str]]) -> Description:
    arguments = published.arguments
    entry = _with_bands(DEFAULT_INPUT, structure.in_channels, arguments, bands)
    maps = {name: structure.patch_size**2 if get(name).level is Level.PIXEL else 1 for name in structure.outputs}
    targets = {
        name: _with_bands(name, structure.outputs[name] // maps[name], arguments, bands)
        for name in _in_order(structure.outputs, arguments)
    }
    size = arguments.get("input_size")
    normalises = arguments.get("norm_pix_loss", True) is not False and entry.name in targets
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
    """The description with the band statistics of a data set: the release's where it keeps them.

    Raises DataError for no data set, or one that has none of the bands.
    """
    manifest = load_manifest(shards)
    statistics = manifest.release_statistics or manifest.statistics
    mean, std = normalisation(statistics, input_of(description))
    if not np.isfinite(mean).any():
        raise DataError(f"{shards} has no statistics of {description.input} {', '.join(description.bands)}")
    return replace(description, statistics=statistics_by_product(mean, std), data_set=manifest.name)


def _in_order(outputs: Mapping[str, int], arguments: Mapping[str, Any]) -> list[str]:
    """Tasks in the order of their log-variances: that of the run's arguments, or of the heads."""
    given = arguments.get("out_modalities")
    return list(given) if isinstance(given, dict) and set(given) == set(outputs) else list(outputs)


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
    tables = [arguments.get(key) for key in ("inp_modalities", "out_modalities", "modalities")]
    found = [table[name] for table in tables if isinstance(table, dict) and isinstance(table.get(name), list)]
    return [given for given in found if set(given) <= set(get(name).bands)]


def _selected(row: Modality, bands: list[str]) -> Modality:
    try:
        return row.select(bands)
    except ValueError as error:
        raise UsageError(str(error)) from error


def export_published(source: Exported, path: Path) -> None:
    """Write the published `.pth` of an exported model; importing it again gives the same.

    The optimizer's state is not in it.  Raises DataError where the decoder is not there or the disk does not take it.
    """
    description = source.description
    origin = description.origin.get("published", {})
    content = {
        "model": to_published(source.pretraining_tensors(), description.targets),
        "epoch": origin.get("epoch"),
        "args": argparse.Namespace(**origin.get("args", _arguments(description))),
    }
    with complete_or_absent(path) as temporary:
        torch.save(content, temporary)


def _arguments(d: Description) -> dict[str, Any]:
    """The arguments that a published run of this model would have had."""
    entry = input_of(d)
    targets = {name: d.target_bands.get(name, "all") for name in d.targets}
    return {
        "model": f"convnextv2_{d.size}", "input_size": d.image_size, "patch_size": d.patch_size,
        "use_orig_stem": d.stem == "original", "norm_pix_loss": bool(d.normalise_targets), "loss_aggr": d.weighting,
        "decoder_depth": d.decoder_depth, "decoder_embed_dim": d.decoder_width,
        "inp_modalities": {entry.name: d.bands}, "out_modalities": targets, "modalities": {entry.name: d.bands} | targets,
    }  # fmt: skip
