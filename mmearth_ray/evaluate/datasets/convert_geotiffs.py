"""A folder of GeoTIFFs with a table of labels -> a labelled data set.

Shapes: N images, C bands, H x W pixels, K classes.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmearth_ray.errors import DataError, UsageError, one_line
from mmearth_ray.evaluate.datasets.assigning import assigned, check_shares, neighbours, strata_of
from mmearth_ray.evaluate.datasets.label_table import LabelTable, encoded, read_table
from mmearth_ray.evaluate.datasets.task import DTYPES, IGNORED, OTHER, Goal, TaskInfo, is_identity
from mmearth_ray.evaluate.datasets.writing import ROW_GROUP, Block, require_place, write_task
from mmearth_ray.modalities import PRODUCTS
from mmearth_ray.settings import key

SENTINEL2_NAME = re.compile(r"B0?(\d{1,2}A?)", re.IGNORECASE)
"""B2 is also written B02, and B8A b8a."""


@dataclass(frozen=True)
class GeotiffsOptions:
    """Settings of `convert-geotiffs`."""

    goal: str = key(Goal.SINGLE.value, "what the labels are; masks are files of one band", among=tuple(g.value for g in Goal))
    table: str = key("labels.csv", "CSV in the folder, or a path: file, label (a class, a;b, a number, a mask), split or fold")
    bands: list[str] = key(
        [], "what the files' bands are, in their order: B4, sentinel1.asc_VV, other.NAME; empty: as they say"
    )
    classes: list[str] = key([], "names of the classes, of masks in the order of their codes; empty: those that occur")
    product: str = key("", "of Sentinel-2, so that pretraining's statistics fit; empty: none", among=("", *PRODUCTS))
    scale: float = key(1.0, "what stored values are multiplied by to be in pretraining's units (reflectance x 10000)", above=0)
    missing: list[float] = key([], "stored values that are no data; empty: what the files state")
    valid: float = key(0.2, "without a column split or fold: share of images to choose settings by", above=0, below=1)
    test: float = key(0.2, "without a column split or fold: share of images to test on", above=0, below=1)
    together: float = key(0.0, "km: without a column split or fold, images nearer than this share a split; 0: none", at_least=0)
    name: str = key("", "name of the data set; empty: that of the folder")
    seed: int = key(0, "of the split", at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True, eq=False)
class _Raster:
    """A file's pixels (C, H, W), what it says of its bands, its value for no data, and its middle in degrees."""

    pixels: np.ndarray
    descriptions: tuple[str | None, ...]
    missing: float | None
    latitude: float
    longitude: float


def convert(place: Path, out: Path, options: GeotiffsOptions) -> TaskInfo:
    """Convert a folder of GeoTIFFs and return the description of the labelled data set.

    Raises UsageError for settings that do not fit, DataError, naming the file or the line, for what cannot be taken.
    """
    require_place(out)
    check_shares(0, options.valid, options.test)
    _rasterio()
    goal, table = Goal(options.goal), read_table(place / options.table)
    files = _files(place, table.files, table)
    first = _read(files[0])
    bands = _bands(first, options, files[0])
    if goal is Goal.SEGMENTATION:
        masks, labels = _files(place, table.labels, table, again=True), None
        classes = tuple(options.classes) or tuple(f"class {code}" for code in range(_largest(masks) + 1))
    else:
        masks, (labels, classes) = None, encoded(table, goal, options.classes)
    splits, folds, how = _assigned(table, labels, files, options)
    info = TaskInfo(
        name=options.name or place.resolve().name, goal=goal, classes=classes, bands=bands, product=options.product or None,
        dtype=str(first.pixels.dtype), height=first.pixels.shape[1], width=first.pixels.shape[2], scale=options.scale,
        missing=tuple(options.missing) or (() if first.missing is None else (first.missing,)), folds=table.fold_count,
        origin={"kind": "geotiffs", "folder": place.resolve().name, "table": options.table, "splits": how},
    )  # fmt: skip
    source = _Source(info, files, masks, labels, first, bool(options.missing))
    return write_task(out, info, source.blocks(table.files, splits, folds))


def _files(place: Path, names: list[str], table: LabelTable, *, again: bool = False) -> list[Path]:
    """Where those files are.  Raises DataError for one that is not there, or that comes twice and need not (`again`)."""
    seen: dict[Path, int] = {}
    paths = [place / name for name in names]
    for line, path in zip(table.lines, paths, strict=True):
        if not path.is_file():
            raise DataError(f"{table.path}, line {line}: there is no file {path}")
        before = seen.setdefault(path.resolve(), line)
        if before != line and not again:
            raise DataError(f"{table.path}, line {line}: {path} is in line {before} already; each image may come once")
    return paths


def _rasterio() -> Any:
    try:
        import rasterio
    except ImportError as error:
        raise UsageError("convert-geotiffs needs a package: pip install 'mmearth-ray[geotiff]'") from error
    return rasterio


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: that a file has no place on the Earth, which none needs, and what rasterio has to say of its parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(path: Path) -> _Raster:
    """Raises DataError, naming the file, if it is no GeoTIFF that can be read, or of a type that cannot be stored."""
    rasterio = _rasterio()
    try:
        with _quiet(), rasterio.open(path, driver="GTiff") as file:
            pixels = file.read()
            if any(scale != 1 for scale in file.scales) or any(file.offsets):
                raise DataError(f"{path} says that its values have scales {file.scales} and offsets {file.offsets}; write them "
                                "as plain numbers, without those tags")  # fmt: skip
            descriptions, missing = tuple(file.descriptions), file.nodata
            longitude, latitude = file.lnglat() if file.crs else (np.nan, np.nan)
    except (OSError, ValueError, rasterio.errors.RasterioError) as error:
        raise DataError(f"{path} cannot be read as a GeoTIFF ({one_line(error)})") from error
    if pixels.dtype == np.float64:
        pixels = pixels.astype(np.float32)
    if str(pixels.dtype) not in DTYPES:
        raise DataError(f"{path} holds {pixels.dtype}; it must be one of {', '.join(DTYPES)}")
    stated = None if missing is None or not np.isfinite(missing) else float(missing)
    return _Raster(pixels, descriptions, stated, float(latitude), float(longitude))


def _identity(text: str | None) -> str | None:
    """What a band is that a file or a setting calls so, or None."""
    if not text:
        return None
    match = SENTINEL2_NAME.fullmatch(text.strip())
    name = "B" + match[1].upper() if match else text.strip()
    return name if is_identity(name) else None


def _bands(first: _Raster, options: GeotiffsOptions, path: Path) -> tuple[str, ...]:
    """What the files' bands are, by the setting or by what the first file says; both must agree where both tell."""
    said = [_identity(text) for text in first.descriptions]
    given = [_identity(text) for text in options.bands] or said
    unknown = [text for text, band in zip(options.bands or first.descriptions, given, strict=True) if band is None]
    if unknown:
        calls = f"calls a band '{unknown[0]}', which is none" if unknown[0] else "does not say what its bands are"
        problem = f"bands=[{','.join(options.bands)}]: '{unknown[0]}' is no band" if options.bands else f"{path} {calls}"
        raise UsageError(f"{problem}; name its {len(said)} bands in order by bands=[B4,B3,B2,{OTHER}NAME,...]")
    bands = [band for band in given if band]
    if len(bands) != len(said):
        raise UsageError(f"bands= names {len(bands)} bands, {path} has {len(said)}; name all of them, in the file's order")
    wrong = [(i, band, own) for i, (band, own) in enumerate(zip(bands, said, strict=True), 1) if own and band != own]
    if wrong:
        raise UsageError(
            f"bands= says that band {wrong[0][0]} is {wrong[0][1]}, {path} says {wrong[0][2]}; correct the one that is wrong"
        )
    return tuple(bands)


def _largest(masks: list[Path]) -> int:
    """The largest code in masks that is a class."""
    codes = [_mask(path) for path in masks]
    return max((int(code[code != -1].max(initial=0)) for code in codes), default=0)


def _mask(path: Path) -> np.ndarray:
    """(H, W) codes of a mask, -1 where it states that there is no data or holds the code for nothing."""
    raster = _read(path)
    if len(raster.pixels) != 1 or raster.pixels.dtype.kind not in "iu":
        raise DataError(
            f"{path} is no mask: {raster.pixels.dtype} of {len(raster.pixels)} bands; whole numbers of one are needed"
        )
    codes = raster.pixels[0].astype(np.int64)
    return np.where((codes == IGNORED) | (codes == raster.missing), -1, codes)


def _assigned(
    table: LabelTable, labels: np.ndarray | None, files: list[Path], options: GeotiffsOptions
) -> tuple[list[str], np.ndarray, str]:
    """Split and fold of each image, and where they are from."""
    if table.fold_count:
        return [""] * len(files), table.folds, "column fold"
    if table.splits is not None:
        return table.splits, table.folds, "column split"
    stratum_N = strata_of(labels) if labels is not None else np.zeros(len(files), np.int64)
    unit_N = np.arange(len(files))
    if options.together:
        places = np.array([(raster.latitude, raster.longitude) for raster in map(_read, files)])
        unit_N = neighbours(places[:, 0], places[:, 1], options.together)
    splits, folds = assigned(stratum_N, unit_N, 0, options.valid, options.test, options.seed)
    return splits, folds, f"shares valid {options.valid:g}, test {options.test:g}, seed {options.seed}"


@dataclass(frozen=True, eq=False)
class _Source:
    """The images in order, each checked against the first."""

    info: TaskInfo
    files: list[Path]
    masks: list[Path] | None
    labels: np.ndarray | None
    first: _Raster
    missing_given: bool

    def blocks(self, ids: list[str], splits: list[str], folds: np.ndarray) -> Iterator[Block]:
        for start in range(0, len(ids), ROW_GROUP):
            some = slice(start, start + ROW_GROUP)
            pixels = np.stack([self._image(path) for path in self.files[some]])
            labels = np.stack([self._codes(path) for path in self.masks[some]]) if self.masks else None
            labels = self.labels[some] if labels is None and self.labels is not None else labels
            assert labels is not None
            yield Block(ids[some], splits[some], folds[some], labels, pixels)

    def _image(self, path: Path) -> np.ndarray:
        raster, first = _read(path), self.first
        if raster.pixels.shape != first.pixels.shape or raster.pixels.dtype != first.pixels.dtype:
            raise DataError(f"{path} is {raster.pixels.dtype} {raster.pixels.shape}, the first file is {first.pixels.dtype} "
                            f"{first.pixels.shape}; all must have the same bands, height and width")  # fmt: skip
        if [_identity(text) for text in raster.descriptions] != [_identity(text) for text in first.descriptions]:
            raise DataError(f"{path} says that its bands are {raster.descriptions}, the first file {first.descriptions}")
        if raster.missing != first.missing and not self.missing_given:
            raise DataError(f"{path} states {raster.missing} for no data, the first file {first.missing}; set missing=[...]")
        return raster.pixels

    def _codes(self, path: Path) -> np.ndarray:
        codes, info = _mask(path), self.info
        if codes.shape != (info.height, info.width):
            raise DataError(
                f"{path} is a mask of {codes.shape[1]} x {codes.shape[0]} px; images have {info.width} x {info.height}"
            )
        return codes
