"""The JSON files of a published MMEarth release: parsing, checking, and lining them up with the rows of the HDF5 file.

Names and forms are those of MMEarth v001 (github.com/vishalned/MMEarth-data, commit 32fe297): `splits` lists row numbers,
`band_stats` holds bare NaN and Infinity, `tile_info` says per tile id where and when it was taken and which bands it had.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import DEFAULT_INPUT, PRODUCTS, TABLE, Kind
from mmearth_ray.shards.stats import ALL

NO_SPLIT = "none"
"""The split of a row that the release puts in none."""

CLOUD_PROBABILITY = "MSK_CLDPRB"
LABELS = ("biome", "eco_region")
_FIELDS = {"S2_DATE", "S2_type", "CRS", "lat", "lon", "BANDS", *LABELS}


@dataclass(frozen=True)
class Rows:
    """What the release says of each of its n rows beside the layers; small next to them, as arrays of length n.

    `id` UTF-8 bytes; `product` a place in PRODUCTS; `latitude`, `longitude` degrees (NaN unknown); `date` days (NaT
    unknown); `crs`, `source` and `split` places in `names` (-1: none); `labels[modality]` int32, -1 where tile_info does
    not say; `shifted`: the layers after the Sentinel-2 cloud probability are displaced by one band.
    """

    id: np.ndarray
    product: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    date: np.ndarray
    crs: np.ndarray
    source: np.ndarray
    split: np.ndarray
    shifted: np.ndarray
    labels: dict[str, np.ndarray]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.id)

    def tile(self, row: int) -> str:
        """The row's tile id."""
        return self.id[row].decode(errors="replace")


def read_json(path: Path, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON in which bare NaN and Infinity are legal, as in the release."""
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=hook)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} does not parse as JSON ({short(error)}); download it again") from error


def short(error: Exception) -> str:
    """The error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


class _Info(NamedTuple):
    """One entry of tile_info, reduced while parsing: 1.2 million full entries would take gigabytes."""

    date: Any
    product: Any
    crs: Any
    latitude: Any
    longitude: Any
    labels: tuple[Any, ...]
    source: Any
    s2_bands: Any


def compact(pairs: list[tuple[str, Any]]) -> Any:
    """Hook of the JSON parser for tile_info.  Raises DataError for a tile that is given twice."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DataError(f"'{twice}' is given twice; tile ids must be unique")
    if not _FIELDS & entry.keys():
        return entry
    share = {k: sys.intern(v) if isinstance(v, str) else v for k, v in entry.items()}
    bands = entry.get("BANDS")
    s2_bands = bands.get(DEFAULT_INPUT) if isinstance(bands, dict) else None
    return _Info(
        share.get("S2_DATE"), share.get("S2_type"), share.get("CRS"), entry.get("lat"), entry.get("lon"),
        tuple(entry.get(k) for k in LABELS), share.get("source"),
        None if not isinstance(s2_bands, list) else CLOUD_PROBABILITY in s2_bands,
    )  # fmt: skip


def row_splits(splits: Any, tiles: int, file: str) -> tuple[np.ndarray, list[str]]:
    """Per row the place of its split in the list of names.  Raises DataError for a row in two splits or out of range."""
    if not isinstance(splits, dict) or not all(isinstance(v, list) for v in splits.values()):
        raise DataError(f"{file} must be an object of split name -> list of row numbers")
    names = [*splits, NO_SPLIT]
    split = np.full(tiles, len(names) - 1, np.int16)
    for place, (name, listed) in enumerate(splits.items()):
        if not all(type(row) is int for row in listed):
            raise DataError(f"{file}: '{name}' must list row numbers only")
        rows = np.array(listed, dtype=object if any(abs(r) > 2**62 for r in listed) else np.int64)
        outside = rows[(rows < 0) | (rows >= tiles)]
        if outside.size:
            raise DataError(f"{file}: '{name}' lists row {outside[0]}, but the rows are 0 to {tiles - 1}")
        taken = rows[split[rows] != len(names) - 1]
        if taken.size:
            raise DataError(f"{file}: row {taken[0]} is in both '{names[split[taken[0]]]}' and '{name}'")
        split[rows] = place
        again = np.flatnonzero(np.bincount(rows, minlength=1) > 1)
        if again.size:
            raise DataError(f"{file}: row {again[0]} is listed twice in '{name}'")
    return split, names


def release_statistics(given: Any, file: str) -> dict[str, Any]:
    """A release's band statistics as {modality: {variant: {band: {"mean", "std", "min", "max"}}}}; null where not finite."""
    if not isinstance(given, dict):
        raise DataError(f"{file} must be an object of layer -> mean, std, min and max")
    result: dict[str, Any] = {}
    for m in TABLE:
        if m.kind is not Kind.CONTINUOUS:
            continue
        for variant in PRODUCTS if m.by_product else (ALL,):
            key = f"{m.name}_{variant}" if m.by_product else m.name
            columns = {what: _numbers(given.get(key), key, what, len(m.bands), file) for what in ("mean", "std", "min", "max")}
            bands = {band: {what: values[i] for what, values in columns.items()} for i, band in enumerate(m.bands)}
            result.setdefault(m.name, {})[variant] = bands
    return result


def _numbers(entry: Any, key: str, what: str, length: int, file: str) -> list[float | None]:
    if entry is None:
        return [None] * length
    values = entry.get(what) if isinstance(entry, dict) else None
    if not isinstance(values, list) or len(values) != length or not all(v is None or type(v) in (int, float) for v in values):
        raise DataError(f"{file}: '{what}' of '{key}' must be a list of {length} numbers")
    return [float(v) if v is not None and math.isfinite(v) else None for v in values]


def join(
    ids: np.ndarray, products: np.ndarray, info: dict[str, Any], splits: tuple[np.ndarray, list[str]], stem: str, file: str,
    notes: list[str],
) -> Rows:  # fmt: skip
    """Line the entries of tile_info up with the rows of the HDF5 file."""
    n, names = len(ids), list(splits[1])
    where = {name: place for place, name in enumerate(names)}

    def place_of(name: str) -> int:
        if name not in where:
            where[name] = len(names)
            names.append(name)
        return where[name]

    rows = Rows(
        id=np.array(ids.tolist(), "S"), product=np.zeros(n, np.int8), latitude=np.full(n, np.nan), longitude=np.full(n, np.nan),
        date=np.full(n, "NaT", "datetime64[D]"), crs=np.full(n, -1, np.int32), source=np.zeros(n, np.int32),
        split=splits[0], shifted=np.zeros(n, bool), labels={k: np.full(n, -1, np.int32) for k in LABELS},
        names=(),
    )  # fmt: skip
    differing = []
    for row in range(n):
        tile = ids[row].decode(errors="replace")
        entry = info.get(tile)
        if not isinstance(entry, _Info):
            raise DataError(f"{file} has no entry for tile '{tile}' (row {row})")
        told = str(entry.product or "").lower()
        product = products[row].decode(errors="replace") or told
        if product not in PRODUCTS:
            raise DataError(f"tile '{tile}' (row {row}): S2_type is '{product}', expected {' or '.join(PRODUCTS)}")
        if told and told != product:
            differing.append(tile)
        rows.product[row] = PRODUCTS.index(product)
        rows.latitude[row] = _degrees(entry.latitude, 90, "lat", tile, file)
        rows.longitude[row] = _degrees(entry.longitude, 180, "lon", tile, file)
        rows.date[row] = _day(entry.date, tile, file)
        rows.crs[row] = place_of(entry.crs) if isinstance(entry.crs, str) and entry.crs else -1
        rows.source[row] = place_of(entry.source if isinstance(entry.source, str) and entry.source else stem)
        rows.shifted[row] = product == "l2a" and entry.s2_bands is False
        for label, value in zip(rows.labels.values(), entry.labels, strict=True):
            label[row] = value if type(value) is int and 0 <= value < 2**15 else -1
    if differing:
        notes.append(f"S2_type of {len(differing):,} tiles (first '{differing[0]}') differs in {file}: the HDF5 file's is used")
    if rows.shifted.any():
        notes.append(
            f"{int(rows.shifted.sum()):,} L2A tiles were published without {CLOUD_PROBABILITY}, which displaced their later "
            "layers: those are marked as not present"
        )
    return replace(rows, names=tuple(names))


def _degrees(value: Any, limit: float, what: str, tile: str, file: str) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or (math.isfinite(value) and abs(value) > limit):
        raise DataError(f"{file}: {what} of tile '{tile}' is {value!r}, expected degrees between -{limit} and {limit}")
    return float(value) if math.isfinite(value) else math.nan


def _day(text: Any, tile: str, file: str) -> np.datetime64:
    if text is None or text == "":
        return np.datetime64("NaT")
    try:
        return np.datetime64(datetime.fromisoformat(text).date())
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: S2_DATE of tile '{tile}' is {text!r}, expected a date such as 2017-04-20") from error
