"""Labels of tiles, drawn from a row of the table: its class, the class that most of a tile is of, a map, or a mean.

Shapes: n tiles of a row group, H x W pixels of a tile, S x S of its middle, K classes.
"""

from dataclasses import dataclass

import numpy as np

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.modalities import Kind, Level, Modality, get
from mmearth_ray.stream.reader import RowGroup

LEAST_KNOWN = 0.5
"""Share of a tile's pixels that must be known for its dominant class or its mean: of fewer, the rest may say another thing."""


@dataclass(frozen=True)
class TileLabel:
    """What is asked of a tile: `modality` is the row's, with the one band that is used."""

    modality: Modality
    goal: Goal

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all its classes, or the quantity."""
        if self.goal is Goal.REGRESSION:
            units = f" ({self.modality.units[0]})" if self.modality.units else ""
            return (f"{self.modality.name} {self.modality.bands[0]}{units}",)
        return tuple(entry.name for entry in self.modality.classes)

    def maps(self, group: RowGroup, rows: np.ndarray, size: int) -> np.ndarray:
        """int16 (n, S, S): class of each pixel of the tiles' middles, -1 unknown."""
        return self.modality.label_table()[middle(group.columns[self.modality.columns[0]][rows], size)]

    def occurs(self, group: RowGroup, rows: np.ndarray, size: int) -> np.ndarray:
        """bool (n, K): which classes the map of each tile's middle holds."""
        flat = self.maps(group, rows, size).reshape(len(rows), -1)
        found = np.stack([(flat == k).any(1) for k in range(len(self.modality.classes))], axis=1)
        return found & group.present[self.modality.name][rows, None]

    def values(self, group: RowGroup, rows: np.ndarray, size: int) -> np.ndarray:
        """(n,) float64: class or mean of each tile's middle, NaN where it is unknown."""
        modality, column = self.modality, group.columns[self.modality.columns[0]][rows]
        if modality.level is Level.IMAGE:
            known = column >= 0 if modality.kind is Kind.CATEGORICAL else modality.valid(column)
            values = np.where(known, column, np.nan).astype(np.float64)
        elif modality.kind is Kind.CATEGORICAL:
            values = _dominant(self.maps(group, rows, size), len(modality.classes))
        else:
            values = _mean(modality, middle(column, size))
        return np.where(group.present[modality.name][rows], values, np.nan)


def middle(maps: np.ndarray, size: int) -> np.ndarray:
    """(n, S, S): the middle of (n, H, W)."""
    top, left = ((side - size) // 2 for side in maps.shape[-2:])
    return maps[..., top : top + size, left : left + size]


def _dominant(labels_nSS: np.ndarray, classes: int) -> np.ndarray:
    """The most frequent class of each map, the first of equals; NaN where too few pixels are known."""
    flat = labels_nSS.reshape(len(labels_nSS), -1)
    count_nK = np.stack([(flat == k).sum(1) for k in range(classes)], axis=1)
    return np.where(count_nK.sum(1) >= LEAST_KNOWN * flat.shape[1], count_nK.argmax(1), np.nan)


def _mean(modality: Modality, maps_nSS: np.ndarray) -> np.ndarray:
    flat = maps_nSS.reshape(len(maps_nSS), -1)
    valid = modality.valid(flat)
    total = np.where(valid, flat, 0).astype(np.float64).sum(1)
    known = valid.sum(1)
    return np.where(known >= LEAST_KNOWN * flat.shape[1], total / np.maximum(known, 1), np.nan)


def tile_label(name: str, band: str, table: tuple[Modality, ...], *, mask: bool, given: str) -> TileLabel:
    """What settings ask of tiles, whose input is the row `given`.  Raises UsageError for a row, band or form that cannot be."""
    try:
        modality = get(name, table)
    except ValueError as error:
        raise UsageError(f"label={name}: {error}") from error
    if modality.kind is Kind.FLAGS or modality.name == given:
        usable = [m.name for m in table if m.kind is not Kind.FLAGS and m.name != given]
        why = "is what encoders are given" if modality.name == given else "holds flags"
        raise UsageError(f"label={name}: {name} {why}; choose one of {', '.join(usable)}")
    if modality.kind is Kind.CATEGORICAL:
        if mask and modality.level is Level.IMAGE:
            raise UsageError(f"mask=true: {name} is one class for a whole tile; leave mask out, or choose a map")
        if band:
            raise UsageError(f"band={band}: {name} has classes, which need no band")
        return TileLabel(modality, Goal.SEGMENTATION if mask else Goal.SINGLE)
    if mask:
        raise UsageError(f"mask=true: {name} is a quantity, no classes; leave mask out for its mean")
    if band not in modality.bands and (band or len(modality.bands) > 1):
        raise UsageError(f"band={band}: of {name} choose one of {', '.join(modality.bands)}")
    return TileLabel(modality.select([band] if band else modality.bands), Goal.REGRESSION)
