"""EuroSAT-MS in arrays (an .npz file) -> a labelled data set.

The file holds `s2` (N, C, H, W), `band_names` (C,), `label` (N,), `classes` (K,), and may hold `file` (N,) ids, `s2_b10`
(N, H, W), `lat` and `lon` (N,) in degrees, `level` (L1C or L2A) and `bands_present` (C,).

Shapes: N images, C bands, H x W pixels, K classes.
"""

import lzma
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmearth_ray.errors import DataError, one_line
from mmearth_ray.evaluate.datasets.assigning import assigned, check_shares, neighbours, strata_of
from mmearth_ray.evaluate.datasets.task import DTYPES, Goal, TaskInfo, is_identity
from mmearth_ray.evaluate.datasets.writing import ROW_GROUP, Block, require_place, write_task
from mmearth_ray.modalities import DEFAULT_INPUT, PRODUCTS, get
from mmearth_ray.settings import key

NEEDED = ("s2", "band_names", "label", "classes")
READ_ERRORS = (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What numpy and zipfile make of bytes that are no .npz, of one that was cut off, and of one that holds pickles."""


@dataclass(frozen=True)
class ArraysOptions:
    """Settings of `convert-arrays`."""

    name: str = key("", "name of the data set; empty: the file's stem")
    folds: int = key(5, "folds, each the test set in turn; 0: one split by shares instead", at_least=0, at_most=100)
    valid: float = key(0.2, "without folds: share of images to choose settings by", above=0, below=1)
    test: float = key(0.2, "without folds: share of images to test on", above=0, below=1)
    together: float = key(5.0, "km: images nearer than this share a fold or split, where their places are known", at_least=0)
    cirrus: bool = key(False, "keep B10, which encoders do not read by default")
    seed: int = key(0, "of folds and splits", at_least=0, at_most=2**63 - 1)


def convert(place: Path, out: Path, options: ArraysOptions) -> TaskInfo:
    """Convert arrays and return the description of the labelled data set.

    Raises UsageError for settings that do not fit, DataError for a file that is damaged or lacks what is needed.
    """
    require_place(out)
    check_shares(options.folds, options.valid, options.test)
    arrays = _read(place)
    images_NCHW, bands, notes = _images(arrays, place, options)
    labels, classes = arrays["label"], tuple(str(name) for name in arrays["classes"].reshape(-1).tolist())
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0 or labels.max(initial=0) >= len(classes):
        raise DataError(f"{place}: 'label' must hold whole numbers of 0..{len(classes) - 1}, one of the {len(classes)} classes")
    latitude, longitude = (np.asarray(arrays.get(n, np.full(len(labels), np.nan)), np.float64) for n in ("lat", "lon"))
    unit_N = neighbours(latitude, longitude, options.together)
    held = len(labels) - len(np.unique(unit_N))
    notes += (
        (f"Images within {options.together:g} km of each other share a fold or split ({held} join another).",) if held else ()
    )
    splits, folds = assigned(strata_of(labels), unit_N, options.folds, options.valid, options.test, options.seed)
    ids = [str(name) for name in arrays.get("file", np.arange(len(labels))).tolist()]
    info = TaskInfo(
        name=options.name or place.stem, goal=Goal.SINGLE, classes=classes, bands=bands, product=_product(arrays, place),
        dtype=str(images_NCHW.dtype), height=images_NCHW.shape[2], width=images_NCHW.shape[3],
        missing=get(DEFAULT_INPUT).missing, folds=options.folds, notes=notes,
        origin={"kind": "arrays", "file": place.name, "seed": options.seed, "together_km": options.together},
    )  # fmt: skip
    return write_task(out, info, _blocks(ids, splits, folds, labels, images_NCHW))


def _read(place: Path) -> dict[str, np.ndarray]:
    """The file's arrays, of which all that are per image have one entry for each."""
    try:
        found = np.load(place, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("it is one array, no .npz")
        with found as file:
            wanted = {*NEEDED, "file", "s2_b10", "lat", "lon", "level", "bands_present"}
            arrays = {name: file[name] for name in file.files if name in wanted}
    except FileNotFoundError as error:
        raise DataError(f"there is no file {place}; name an .npz of arrays") from error
    except READ_ERRORS as error:
        raise DataError(f"{place} cannot be read as an .npz of arrays without pickles ({one_line(error)})") from error
    lacking = [name for name in NEEDED if name not in arrays]
    if lacking:
        raise DataError(f"{place} lacks {', '.join(lacking)}; an .npz with {', '.join(NEEDED)} is needed")
    rows = len(arrays["label"]) if arrays["label"].ndim == 1 else -1
    for name in ("s2", "label", "file", "s2_b10", "lat", "lon"):
        if name in arrays and arrays[name].shape[:1] != (rows,):
            raise DataError(
                f"{place}: '{name}' has shape {arrays[name].shape}; one entry for each of the {rows} labels is needed"
            )
    for name, most in (("lat", 90), ("lon", 180)):
        if name in arrays:
            values = arrays[name]
            if values.shape != (rows,) or values.dtype.kind not in "fiu" or (np.abs(values[np.isfinite(values)]) > most).any():
                raise DataError(f"{place}: '{name}' must hold a number of degrees from -{most} to {most} for each image")
    return arrays


def _images(arrays: dict[str, np.ndarray], place: Path, options: ArraysOptions) -> tuple[np.ndarray, tuple[str, ...], Any]:
    """(N, C, H, W) with the bands that are there, their names, and notes on the others."""
    images_NCHW, names = arrays["s2"], [str(name) for name in arrays["band_names"].reshape(-1).tolist()]
    if images_NCHW.ndim != 4 or images_NCHW.shape[1] != len(names) or str(images_NCHW.dtype) not in DTYPES:
        raise DataError(f"{place}: 's2' is {images_NCHW.dtype} {images_NCHW.shape}; images of {len(names)} bands (N, C, H, W) "
                        f"of {', '.join(DTYPES)} are needed")  # fmt: skip
    unknown = [name for name in names if not is_identity(name)]
    if unknown or len(set(names)) < len(names):
        raise DataError(
            f"{place}: 'band_names' holds {', '.join(unknown) or 'a name twice'}; use {', '.join(get(DEFAULT_INPUT).bands)}"
        )
    present = np.asarray(arrays.get("bands_present", np.ones(len(names))), bool).reshape(-1)
    if present.shape != (len(names),):
        raise DataError(f"{place}: 'bands_present' has {len(present)} entries for {len(names)} bands")
    kept = [i for i in range(len(names)) if present[i] and (options.cirrus or names[i] not in get(DEFAULT_INPUT).unused)]
    images_NCHW, bands = images_NCHW[:, kept], [names[i] for i in kept]
    if options.cirrus and "s2_b10" in arrays and "B10" not in names:
        if arrays["s2_b10"].shape != arrays["s2"][:, 0].shape:
            raise DataError(f"{place}: 's2_b10' has shape {arrays['s2_b10'].shape}, not {arrays['s2'][:, 0].shape}")
        if arrays["s2_b10"].dtype != images_NCHW.dtype:
            raise DataError(f"{place}: 's2_b10' is {arrays['s2_b10'].dtype}, 's2' is {images_NCHW.dtype}; use one type")
        images_NCHW = np.concatenate([images_NCHW, arrays["s2_b10"][:, None].astype(images_NCHW.dtype)], axis=1)
        bands.append("B10")
    left = [name for name in (*names, *(["B10"] if "s2_b10" in arrays else [])) if name not in bands]
    return images_NCHW, tuple(bands), (f"Left out: {', '.join(left)}.",) if left else ()


def _product(arrays: dict[str, np.ndarray], place: Path) -> str | None:
    levels = {str(level).lower() for level in np.asarray(arrays.get("level", [])).reshape(-1).tolist()}
    if not levels:
        return None
    if len(levels) > 1 or not levels <= set(PRODUCTS):
        raise DataError(f"{place}: 'level' holds {', '.join(sorted(levels))}; it must be one of {', '.join(PRODUCTS)}")
    return levels.pop()


def _blocks(ids: list[str], splits: list[str], folds: np.ndarray, labels: np.ndarray, images: np.ndarray) -> Iterator[Block]:
    for start in range(0, len(ids), ROW_GROUP):
        some = slice(start, start + ROW_GROUP)
        yield Block(ids[some], splits[some], folds[some], labels[some], images[some])
