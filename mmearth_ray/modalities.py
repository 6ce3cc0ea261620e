"""The table of modalities: everything the package knows about what a tile holds.

One frozen row per layer of an MMEarth tile: twelve that are trained on and three Sentinel-2 quality layers that are
stored only.  Arrow schema, normaliser, heads, losses, metrics and figures all derive from these rows by `level` and
`kind`; no other module of the stream, the model or the training knows a modality by name.  A new modality costs one row.

Sources: layout, dtypes and class codes from the MMEarth v001 release (github.com/vishalned/MMEarth-data, commit 32fe297);
the order of the rows is the order of tasks in the published training code (github.com/vishalned/MMEarth-train,
commit 1f368b3), so that its per-task uncertainty weights line up with ours.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import reduce
from operator import and_
from typing import Any, Literal

import numpy as np


class Level(StrEnum):
    """Where a value lives: one per pixel (a map of the tile) or one per tile (an image-level scalar or label)."""

    PIXEL = "pixel"
    IMAGE = "image"


class Kind(StrEnum):
    """What a value is: a measured quantity, one of a list of classes, or a set of bit flags (stored, never trained)."""

    CONTINUOUS = "continuous"
    CATEGORICAL = "categorical"
    FLAGS = "flags"


class Role(StrEnum):
    """TASK: one of the twelve modalities of MP-MAE.  QUALITY: describes how good a tile is; stored beside it."""

    TASK = "task"
    QUALITY = "quality"


Missing = Literal["ignored", "mean"]
"""What missing pixels of continuous target maps are to the loss: nothing, or, as published, the mean of their band."""


@dataclass(frozen=True)
class ClassCode:
    """One class of a categorical modality: its raw code in the release and its name.  Its label is its place in the row."""

    code: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One row of the table.

    `units` and `bounds` hold one entry per band: `bounds` are the inclusive physical limits of valid values, for `verify`.
    `missing` lists the raw values that mean "no data"; in floating-point layers every non-finite value is missing as well.
    `unused` names bands that no experiment uses unless asked; `display` the bands a figure shows (three make a colour image).
    `by_product`: statistics differ between Sentinel-2 products (L1C, L2A), so they are looked up by the tile's product.
    """

    name: str
    level: Level
    kind: Kind
    bands: tuple[str, ...]
    dtype: str
    source: str
    role: Role = Role.TASK
    units: tuple[str, ...] = ()
    bounds: tuple[tuple[float, float], ...] = ()
    classes: tuple[ClassCode, ...] = ()
    missing: tuple[int, ...] = ()
    unused: tuple[str, ...] = ()
    display: tuple[str, ...] = ()
    by_product: bool = False

    @property
    def width(self) -> int:
        """Outputs that a head needs for one pixel or one tile: bands of a quantity, classes of a categorical."""
        return len(self.classes) if self.kind is Kind.CATEGORICAL else len(self.bands)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the shard columns that hold the bands, in band order."""
        if self.level is Level.IMAGE and self.kind is Kind.CATEGORICAL:
            return (self.name,)
        return tuple(f"{self.name}.{band}" for band in self.bands)

    @property
    def present_column(self) -> str:
        """Name of the boolean shard column that is false where the whole layer is absent or not to be trusted."""
        return f"{self.name}.present"

    @property
    def trainable(self) -> bool:
        return self.kind is not Kind.FLAGS

    def select(self, bands: Iterable[str]) -> "Modality":
        """The same modality with only these bands, in this order.  Raises ValueError for a band it does not have."""
        wanted = tuple(bands)
        unknown = [band for band in wanted if band not in self.bands]
        if unknown or not wanted or len(set(wanted)) < len(wanted):
            raise ValueError(f"bands of {self.name} must be distinct and among {', '.join(self.bands)}; got {list(wanted)}")
        place = [self.bands.index(band) for band in wanted]
        pick = lambda values: tuple(values[i] for i in place) if values else ()  # noqa: E731
        shown = tuple(band for band in self.display if band in wanted)
        return replace(
            self,
            bands=wanted,
            units=pick(self.units),
            bounds=pick(self.bounds),
            unused=(),
            display=shown if len(shown) == len(self.display) else wanted[:1],
        )

    def default_bands(self) -> "Modality":
        """The modality with the bands that experiments use by default (Sentinel-2 without B10)."""
        return self.select(band for band in self.bands if band not in self.unused)

    def valid(self, raw: Any) -> Any:
        """Where raw values are data: a boolean array of `raw`'s shape.  Works alike on numpy arrays and torch tensors.

        Must see raw values (or a float copy that represents them exactly), never normalised ones.
        """
        tests = [raw != value for value in self.missing]
        if np.dtype(self.dtype).kind == "f" or not tests:
            tests += [abs(raw) < np.inf]  # NaN is not data either
        return reduce(and_, tests)

    def holes(self, raw: np.ndarray) -> np.ndarray | None:
        """Where raw values are data, or None where all of them are, which a minimum, a maximum or a sum mostly tells."""
        with np.errstate(invalid="ignore", over="ignore"):  # of infinities, which are to be found
            finite = raw.dtype.kind != "f" or np.isfinite(raw.sum())
        if finite and all(value < raw.min() or value > raw.max() for value in self.missing):
            return None
        valid = self.valid(raw)
        return None if valid.all() else valid

    def label_table(self) -> np.ndarray:
        """int16 (256,): raw class code -> contiguous label 0..classes-1, or -1 where the code is no class."""
        table = np.full(256, -1, np.int16)
        for label, entry in enumerate(self.classes):
            table[entry.code] = label
        return table


def _classes(*pairs: tuple[int, str]) -> tuple[ClassCode, ...]:
    return tuple(ClassCode(code, name) for code, name in pairs)


def _numbered(names: Iterable[str], start: int = 0) -> tuple[ClassCode, ...]:
    return tuple(ClassCode(code, name) for code, name in enumerate(names, start))


_REFLECTANCE = "reflectance x 10000"
_S2_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12")
_S1_BANDS = tuple(f"{orbit}_{pol}" for orbit in ("asc", "desc") for pol in ("VV", "VH", "HH", "HV"))
_ERA5_BANDS = tuple(
    f"{period}_{value}"
    for period in ("prev_month", "curr_month", "year")
    for value in ("avg_temp", "min_temp", "max_temp", "total_precip")
)
_UNIT = (-1.0001, 1.0001)  # sines and cosines, with float32 rounding

TABLE: tuple[Modality, ...] = (
    Modality(
        name="sentinel2", level=Level.PIXEL, kind=Kind.CONTINUOUS, bands=_S2_BANDS, dtype="uint16",
        units=(_REFLECTANCE,) * 13, bounds=((1, 65535),) * 13, missing=(0,), unused=("B10",), display=("B4", "B3", "B2"),
        by_product=True, source="COPERNICUS/S2_SR_HARMONIZED (L2A, without B10), COPERNICUS/S2_HARMONIZED (L1C)",
    ),
    Modality(
        name="sentinel1", level=Level.PIXEL, kind=Kind.CONTINUOUS, bands=_S1_BANDS, dtype="float32",
        units=("dB",) * 8, bounds=((-150, 100),) * 8, display=("asc_VV",),
        source="COPERNICUS/S1_GRD, IW mode, nearest ascending and descending scene",
    ),
    Modality(
        name="aster", level=Level.PIXEL, kind=Kind.CONTINUOUS, bands=("elevation", "slope"), dtype="int16",
        units=("m", "degrees"), bounds=((-1000, 9000), (0, 90)), missing=(-32768,), display=("elevation",),
        source="ASTER GDEM; int16 stores the release's -inf filler as -32768",
    ),
    Modality(
        name="era5", level=Level.IMAGE, kind=Kind.CONTINUOUS, bands=_ERA5_BANDS, dtype="float32",
        units=("K", "K", "K", "m") * 3, bounds=((150, 350), (150, 350), (150, 350), (-0.01, 100)) * 3,
        source="ECMWF/ERA5_LAND/MONTHLY_AGGR; 'year' spans 13 monthly images",
    ),
    Modality(
        name="dynamic_world", level=Level.PIXEL, kind=Kind.CATEGORICAL, bands=("landcover",), dtype="uint8", missing=(0,),
        classes=_numbered(
            ("water", "trees", "grass", "flooded vegetation", "crops", "shrub and scrub", "built", "bare", "snow and ice"),
            start=1,
        ),
        source="GOOGLE/DYNAMICWORLD/V1, mode over the year; stored code is the original class + 1",
    ),
    Modality(
        name="canopy_height_eth", level=Level.PIXEL, kind=Kind.CONTINUOUS, bands=("height", "std"), dtype="int8",
        units=("m", "m"), bounds=((0, 126), (0, 126)), missing=(127, -128), display=("height",),
        source="ETH Global Canopy Height 2020; int8 stores the release's 255 filler as 127 (or -128)",
    ),
    Modality(
        name="lat", level=Level.IMAGE, kind=Kind.CONTINUOUS, bands=("sin", "cos"), dtype="float32",
        units=("1", "1"), bounds=(_UNIT,) * 2, source="tile centroid",
    ),
    Modality(
        name="lon", level=Level.IMAGE, kind=Kind.CONTINUOUS, bands=("sin", "cos"), dtype="float32",
        units=("1", "1"), bounds=(_UNIT,) * 2, source="tile centroid",
    ),
    Modality(
        name="biome", level=Level.IMAGE, kind=Kind.CATEGORICAL, bands=("biome",), dtype="int16",
        classes=_numbered((
            "Tundra", "Tropical & Subtropical Moist Broadleaf Forests", "Mediterranean Forests, Woodlands & Scrub",
            "Deserts & Xeric Shrublands", "Temperate Grasslands, Savannas & Shrublands", "Boreal Forests/Taiga",
            "Temperate Conifer Forests", "Temperate Broadleaf & Mixed Forests", "Montane Grasslands & Shrublands", "Mangroves",
            "Flooded Grasslands & Savannas", "Tropical & Subtropical Grasslands, Savannas & Shrublands",
            "Tropical & Subtropical Dry Broadleaf Forests", "Tropical & Subtropical Coniferous Forests",
        )),
        source="RESOLVE Ecoregions 2017",
    ),
    Modality(
        name="eco_region", level=Level.IMAGE, kind=Kind.CATEGORICAL, bands=("eco_region",), dtype="int16",
        classes=_numbered(f"ecoregion {i}" for i in range(846)),
        source="RESOLVE Ecoregions 2017, numbered biome by biome",
    ),
    Modality(
        name="month", level=Level.IMAGE, kind=Kind.CONTINUOUS, bands=("sin_month", "cos_month"), dtype="float32",
        units=("1", "1"), bounds=(_UNIT,) * 2, source="month of the Sentinel-2 acquisition, angle 2 pi m / 12",
    ),
    Modality(
        name="esa_worldcover", level=Level.PIXEL, kind=Kind.CATEGORICAL, bands=("map",), dtype="uint8", missing=(0,),
        classes=_classes(
            (10, "tree cover"), (20, "shrubland"), (30, "grassland"), (40, "cropland"), (50, "built-up"),
            (60, "bare or sparse"), (70, "snow and ice"), (80, "permanent water"), (90, "herbaceous wetland"),
            (95, "mangroves"), (100, "moss and lichen"),
        ),
        source="ESA/WorldCover/v100",
    ),
    Modality(
        name="sentinel2_cloudmask", level=Level.PIXEL, kind=Kind.FLAGS, bands=("QA60",), dtype="uint16", missing=(65535,),
        classes=_classes((1024, "opaque cloud"), (2048, "cirrus")), role=Role.QUALITY,
        source="Sentinel-2 QA60; 65535 where the product has none",
    ),
    Modality(
        name="sentinel2_cloudprod", level=Level.PIXEL, kind=Kind.CONTINUOUS, bands=("MSK_CLDPRB",), dtype="uint16",
        units=("%",), bounds=((0, 100),), missing=(65535,), by_product=True, role=Role.QUALITY,
        source="Sentinel-2 L2A MSK_CLDPRB ('cloudprod' is the release's own spelling); 65535 in L1C",
    ),
    Modality(
        name="sentinel2_scl", level=Level.PIXEL, kind=Kind.CATEGORICAL, bands=("SCL",), dtype="uint8", missing=(255,),
        classes=_numbered(
            ("saturated or defective", "dark area", "cloud shadow", "vegetation", "bare soil", "water",
             "cloud, low probability", "cloud, medium probability", "cloud, high probability", "cirrus", "snow or ice"),
            start=1,
        ),
        role=Role.QUALITY, source="Sentinel-2 L2A scene classification; 255 in L1C",
    ),
)  # fmt: skip

DEFAULT_INPUT = "sentinel2"
PRODUCTS = ("l1c", "l2a")


def get(name: str, table: tuple[Modality, ...] = TABLE) -> Modality:
    """The row of that name.  Raises ValueError, naming the rows there are."""
    for modality in table:
        if modality.name == name:
            return modality
    raise ValueError(f"there is no modality '{name}'; the table has {', '.join(m.name for m in table)}")


def tasks(table: tuple[Modality, ...] = TABLE) -> tuple[Modality, ...]:
    """The rows that MP-MAE trains on, with their default bands, in table order."""
    return tuple(m.default_bands() for m in table if m.role is Role.TASK)


def table_hash(table: tuple[Modality, ...] = TABLE) -> str:
    """Hex digest of all that decides what stored values mean; shards and checkpoints carry it."""
    text = json.dumps([asdict(m) for m in table], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
