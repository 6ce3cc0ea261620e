"""Reading and checking a published MMEarth release: one HDF5 file and three JSON files that share a stem.

Everything here happens before a shard is written, so that an incomplete release is refused at once and in one line.
Layout, dtypes and names are those of MMEarth v001 (github.com/vishalned/MMEarth-data, commit 32fe297): every dataset has
one row per tile, row i of each is the same tile, `metadata[i]` names it, `tile_info` says where and when it was taken.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import DEFAULT_INPUT, TABLE, Kind, Level, Modality
from mmearth_ray.shards.release_info import Rows, compact, join, read_json, release_statistics, row_splits, short

PARTS = ("band_stats", "splits", "tile_info")
"""The JSON files beside <stem>.h5 are <stem>_<part>.json."""

READ_ERRORS = (OSError, RuntimeError, KeyError, ValueError)
"""What h5py raises for a damaged file, depending on where the damage is."""


@dataclass(frozen=True)
class Release:
    """A checked release: where it is, what it holds, and what its reader should be told (`notes`)."""

    stem: str
    files: dict[str, Path]
    tile_size: int
    absent: tuple[str, ...]
    rows: Rows
    statistics: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def open_release(directory: Path) -> Release:
    """Read and check everything of a release but its layers.  Raises DataError naming the file, dataset, tile or row."""
    stem, files = _find(directory)
    if (megabytes := files["tile_info"].stat().st_size / 1e6) > 50:
        print(f"reading {files['tile_info'].name}, {megabytes:,.0f} MB ...", file=sys.stderr)
    notes: list[str] = []
    with open_hdf5(files["h5"]) as file:
        tiles, tile_size, absent = _check_layers(file, files["h5"])
        ids, products = _read_metadata(file, files["h5"])
    if absent:
        notes.append(f"{files['h5'].name} has no {', '.join(absent)}: marked as not present in every tile")
    statistics = release_statistics(read_json(files["band_stats"]), files["band_stats"].name)
    split, split_names = row_splits(read_json(files["splits"]), tiles, files["splits"].name)
    info = read_json(files["tile_info"], compact)
    if not isinstance(info, dict):
        raise DataError(f"{files['tile_info']} must be an object of tile id -> description")
    rows = join(ids, products, info, (split, split_names), stem, files["tile_info"].name, notes)
    return Release(stem, files, tile_size, absent, rows, statistics, notes)


def open_hdf5(path: Path) -> h5py.File:
    """The HDF5 file, for reading.  Raises DataError if it is truncated or no HDF5 file."""
    try:
        return h5py.File(path, "r", locking=False)
    except READ_ERRORS as error:
        raise DataError(f"{path} is truncated or no HDF5 file ({short(error)}); download it again") from error


def read_failure(path: Path, dataset: str, row: int, error: Exception) -> DataError:
    """The error for a row that cannot be read."""
    return DataError(
        f"{path}: row {row} of '{dataset}' cannot be read ({short(error)}); the file is damaged, download it again"
    )


def _find(directory: Path) -> tuple[str, dict[str, Path]]:
    """The stem of the release in that directory, and its four files."""
    if not directory.is_dir():
        what = "is a file; name the directory that holds it" if directory.exists() else "does not exist"
        raise DataError(f"the release {directory} {what}")
    stems = sorted(p.stem for p in directory.glob("*.h5") if not p.name.startswith("."))
    if len(stems) > 1 and directory.resolve().name in stems:
        stems = [directory.resolve().name]
    if len(stems) > 1:
        raise DataError(f"{directory} holds several releases ({', '.join(stems)}); give each a directory of its own")
    if not stems:
        known = [p.name.removesuffix(f"_{part}.json") for part in PARTS for p in directory.glob(f"*_{part}.json")]
        raise DataError(f"{directory} has no {known[0] if known else '<stem>'}.h5, so it is no release")
    stem = stems[0]
    files = {"h5": directory / f"{stem}.h5", **{part: directory / f"{stem}_{part}.json" for part in PARTS}}
    for path in files.values():
        if not path.is_file():
            raise DataError(f"{path} is missing; a release is {', '.join(p.name for p in files.values())}")
    return stem, files


# ---- the HDF5 file ----


def stored_bands(modality: Modality) -> int:
    """Length of the second axis of the modality's dataset: its bands, or its classes where labels are one-hot."""
    one_hot = modality.level is Level.IMAGE and modality.kind is Kind.CATEGORICAL
    return len(modality.classes) if one_hot else len(modality.bands)


def _check_layers(file: Any, path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Rows, tile size and absent layers.  Raises DataError for a dataset of another shape or type than published."""
    for needed in (DEFAULT_INPUT, "metadata"):
        if not isinstance(file.get(needed), h5py.Dataset):
            raise DataError(f"{path} has no dataset '{needed}', so it is no MMEarth release")
    shape = file[DEFAULT_INPUT].shape
    bands = stored_bands(next(m for m in TABLE if m.name == DEFAULT_INPUT))
    if len(shape) != 4 or shape[1] != bands or shape[2] != shape[3]:
        raise DataError(f"{path}: '{DEFAULT_INPUT}' has shape {shape}, expected (tiles, {bands}, size, size)")
    tiles, size = shape[0], shape[2]
    if not tiles:
        raise DataError(f"{path} holds no tiles")
    absent = []
    for m in TABLE:
        dataset = file.get(m.name)
        if not isinstance(dataset, h5py.Dataset):
            absent.append(m.name)
            continue
        wanted = (tiles, stored_bands(m)) + ((size, size) if m.level is Level.PIXEL else ())
        if dataset.shape != wanted:
            raise DataError(f"{path}: '{m.name}' has shape {dataset.shape}, expected {wanted}")
        one_hot = m.level is Level.IMAGE and m.kind is Kind.CATEGORICAL
        same = dataset.dtype.newbyteorder("=") == np.dtype(m.dtype)
        if not (dataset.dtype.kind in "iu" if one_hot else same):
            raise DataError(f"{path}: '{m.name}' is {dataset.dtype}, expected {'an integer type' if one_hot else m.dtype}")
    if file["metadata"].shape != (tiles,):
        raise DataError(f"{path}: 'metadata' has shape {file['metadata'].shape}, expected {(tiles,)}")
    return tiles, size, tuple(absent)


def _read_metadata(file: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tile ids and products ("" where the file does not say) of all rows, as arrays of bytes."""
    dataset = file["metadata"]
    try:
        records = dataset[:]
    except READ_ERRORS:
        for row in range(len(dataset)):
            try:
                dataset[row]
            except READ_ERRORS as error:
                raise read_failure(path, "metadata", row, error) from error
        raise
    names = records.dtype.names
    ids = records[names[0]] if names else records
    if ids.dtype.kind == "O":  # variable-length strings
        ids = np.array([v if isinstance(v, bytes) else str(v).encode() for v in ids])
    if ids.dtype.kind != "S":
        raise DataError(f"{path}: the first field of 'metadata' is {ids.dtype}, expected the tile id as a string")
    _, first, place = np.unique(ids, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[place] != np.arange(len(ids)))
    if again.size:
        row = int(again[0])
        raise DataError(f"{path}: tile '{ids[row].decode()}' is in rows {first[place[row]]} and {row}; ids must be unique")
    products = np.zeros(len(ids), "S10")
    if names and len(names) > 1 and records[names[1]].dtype.kind == "S":
        products = np.char.lower(records[names[1]])
    return ids, products
