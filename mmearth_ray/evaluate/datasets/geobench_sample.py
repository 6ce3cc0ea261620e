"""One sample of a GEO-Bench v1 set: an HDF5 file with a 2-D dataset per band, and what its pickled attribute says of them."""

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmearth_ray.errors import DataError, one_line
from mmearth_ray.evaluate.datasets.restricted import Record, from_text

LABEL = "label"
DATE = re.compile(r"_\d{4}-\d{2}-\d{2}.*$")
"""What follows the name of a band that has a date."""


@dataclass(frozen=True, eq=False)
class Sample:
    """`bands`: published name and class of each; `pixels`: (H, W) by published name; `label`: as pickled, or (H, W)."""

    bands: tuple[tuple[str, str], ...]
    pixels: dict[str, np.ndarray]
    label: Any


def read_sample(path: Path, wanted: Container[str] | None = None) -> Sample:
    """A sample with the pixels of all bands, or of those of the wanted names.

    Raises DataError for a file that is missing, damaged, a time series or of another form, and if its pickle is refused.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            said = from_text(file.attrs.get("pickle"), str(path))
            if not isinstance(said, dict):
                raise DataError(f"{path}: its attribute 'pickle' holds no entry per band")
            return _sample(file, said, path, wanted)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing, which the partition names; download the set again") from error
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as HDF5 ({one_line(error)}); download it again") from error


def _sample(file: Any, said: dict[Any, Any], path: Path, wanted: Container[str] | None) -> Sample:
    keys = said.get("bands_order") or sorted(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise DataError(f"{path}: its 'bands_order' is no list of names")
    bands: dict[str, tuple[str, str]] = {}
    for key in keys:
        if not key.startswith(LABEL):
            name, kind = _name_of(key, said.get(key))
            if name in bands:
                raise DataError(f"{path} holds '{name}' more than once ('{bands[name][0]}', '{key}'): it is a time series; "
                                "only sets of one date per band can be converted")  # fmt: skip
            bands[name] = key, kind
    pixels = {name: _pixels(file, key, path) for name, (key, _) in bands.items() if wanted is None or name in wanted}
    maps = [key for key in keys if key.startswith(LABEL)]
    label = _pixels(file, maps[0], path) if maps else said.get(LABEL)
    if label is None:
        raise DataError(f"{path} has no label")
    return Sample(tuple((name, kind) for name, (_, kind) in bands.items()), pixels, label)


def _name_of(key: str, entry: Any) -> tuple[str, str]:
    """The published name of a band without its date, and its class ("" where the pickle does not tell)."""
    info = entry.get("band_info") if isinstance(entry, dict) else None
    name = info.get("name") if isinstance(info, Record) else None
    kind = info.kind if isinstance(info, Record) else ""
    return (name if isinstance(name, str) else DATE.sub("", key)), kind


def _pixels(file: Any, key: str, path: Path) -> np.ndarray:
    """A dataset that lies in the file itself."""
    import h5py

    if not isinstance(file.get(key, getlink=True), h5py.HardLink) or not isinstance(file[key], h5py.Dataset):
        raise DataError(f"{path} has no band '{key}' of its own; download it again")
    found = file[key]
    if found.is_virtual or found.external or found.ndim != 2 or found.dtype.kind not in "iufb" or not found.size:
        raise DataError(f"{path}: '{key}' is no 2-D map of numbers in the file itself, but {found.dtype} {found.shape}")
    return np.asarray(found[()])
