"""Band statistics: float64 moments that merge exactly, and the tables a normaliser reads.

Statistics have the form {modality: {variant: {band: {"count", "mean", "std", "min", "max"}}}}; the variant is the
Sentinel-2 product where the table says so and "all" elsewhere.  A band without a valid value has count 0 and nulls.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import PRODUCTS, TABLE, Kind, Modality
from mmearth_ray.shards.schema import TileBlock

ALL = "all"
Statistics = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]


@dataclass(frozen=True)
class Moments:
    """Count, mean, sum of squared deviations, minimum and maximum of some values, all in float64."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        """Moments of a one-dimensional array."""
        if not values.size:
            return cls()
        exact = values.astype(np.float64)
        mean = float(exact.mean())
        return cls(int(exact.size), mean, float(((exact - mean) ** 2).sum()), float(exact.min()), float(exact.max()))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together (Chan, Golub and LeVeque, 1979, eq. 1.5)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * other.count / count
        m2 = self.m2 + other.m2 + delta * delta * self.count * other.count / count
        return Moments(count, mean, m2, min(self.low, other.low), max(self.high, other.high))

    def summary(self) -> dict[str, float | int | None]:
        """JSON form; the standard deviation is the population's, as in the release (facts of its `band_stats`)."""
        if not self.count:
            return {"count": 0, "mean": None, "std": None, "min": None, "max": None}
        std = math.sqrt(self.m2 / self.count)
        return {"count": self.count, "mean": self.mean, "std": std, "min": self.low, "max": self.high}


MomentTable = dict[str, dict[str, Moments]]
"""{variant: {column: Moments}}"""


def variant_of(modality: Modality, product: str) -> str:
    return product if modality.by_product else ALL


def block_moments(block: TileBlock, split: str, table: tuple[Modality, ...] = TABLE) -> MomentTable:
    """Moments of every continuous band over the block's tiles of one split; absent layers and no-data do not count."""
    result: MomentTable = {}
    in_split = np.array([s == split for s in block.split], bool)
    products = np.array(block.product)
    for modality in table:
        if modality.kind is not Kind.CONTINUOUS:
            continue
        usable = in_split & block.present[modality.name]
        for variant in sorted(set(PRODUCTS if modality.by_product else (ALL,))):
            rows = usable & (products == variant) if modality.by_product else usable
            layer = block.layers[modality.name][rows]
            valid = modality.valid(layer)
            for band, column in enumerate(modality.columns):
                result.setdefault(variant, {})[column] = Moments.of(layer[:, band][valid[:, band]])
    return result


def merge_tables(tables: Iterable[MomentTable]) -> MomentTable:
    """One table from many, column by column."""
    result: MomentTable = {}
    for table in tables:
        for variant, columns in table.items():
            mine = result.setdefault(variant, {})
            for column, moments in columns.items():
                mine[column] = mine.get(column, Moments()).merge(moments)
    return result


def statistics_of(moments: MomentTable, table: tuple[Modality, ...] = TABLE) -> dict[str, Any]:
    """The statistics that a manifest carries, from merged moments."""
    return {
        m.name: {
            variant: {
                band: moments.get(variant, {}).get(column, Moments()).summary()
                for band, column in zip(m.bands, m.columns, strict=True)
            }
            for variant in (PRODUCTS if m.by_product else (ALL,))
        }
        for m in table
        if m.kind is Kind.CONTINUOUS
    }


def normalisation(statistics: Statistics, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std), each float32 (products, bands), of the modality's bands; NaN where a band has no statistics.

    A constant band has std 1 here, so that it normalises to zero.
    """
    shape = (len(PRODUCTS), len(modality.bands))
    mean, std = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for row, product in enumerate(PRODUCTS):
        bands = statistics.get(modality.name, {}).get(variant_of(modality, product), {})
        for column, band in enumerate(modality.bands):
            entry = bands.get(band, {})
            if usable(entry):
                mean[row, column], std[row, column] = entry["mean"], entry["std"] or 1.0
    return mean, std


def usable(entry: Mapping[str, Any]) -> bool:
    """Whether one band's statistics can normalise: a finite mean and standard deviation."""
    values = [entry.get("mean"), entry.get("std")]
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def checked(loaded: object, origin: str) -> Statistics:
    """Statistics that come from a user's JSON file.  Raises DataError unless they have the form of this module."""
    entries: list[tuple[tuple[str, ...], Any]] = [((), loaded)]
    for holds in ("modalities", "variants", "bands", ""):
        for names, entry in entries:
            if not isinstance(entry, dict):
                what = f"'{_path(names)}' must hold {holds or 'mean and std'}" if names else "holds no statistics"
                raise DataError(f"{origin}: {what}; use manifest, release or the JSON of a manifest")
        if holds:
            entries = [((*names, str(name)), inner) for names, entry in entries for name, inner in entry.items()]
    for names, entry in entries:
        for what in ("mean", "std"):
            value = entry.get(what)
            number = type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
            if value is not None and not number:
                raise DataError(f"{origin}: '{_path((*names, what))}' must be a number or null")
    return cast(Statistics, loaded)


def _path(names: tuple[str, ...]) -> str:
    """Names on one line, whatever a file has put into them."""
    return " ".join(".".join(names).split())


def require_statistics(
    statistics: Statistics, valid: Mapping[str, Mapping[str, int]], modalities: Iterable[Modality], origin: str
) -> None:
    """Raise DataError if a band has valid values but no statistics (invariant: null statistics only for empty bands).

    `valid[variant][column]` counts valid values.
    """
    for modality in modalities:
        if modality.kind is not Kind.CONTINUOUS:
            continue
        for variant in PRODUCTS if modality.by_product else (ALL,):
            bands = statistics.get(modality.name, {}).get(variant, {})
            for band, column in zip(modality.bands, modality.columns, strict=True):
                count = valid.get(variant, {}).get(column, 0)
                if count and not usable(bands.get(band, {})):
                    which = f" ({variant})" if modality.by_product else ""
                    raise DataError(
                        f"{column}{which} has {count:,} valid values but {origin} has no finite mean and std for it; "
                        "correct that file, or use the statistics computed from the shards (statistics=manifest)"
                    )
