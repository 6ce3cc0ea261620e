"""Preparing samples: aligned crop, class labels, patch mask and valid counts; everything stays in its native type.

The crop and the mask of a sample depend on (seed, epoch, data-set name, tile id) alone.  The crop box is one for all
maps of a tile.  Counts say how many valid target elements each sample has at hidden places, which is what the loss divides
by; they follow the losses' own rules.

Shapes: B samples, C bands, h w the crop, L patches of p x p px, V visible, N hidden, T targets, P products.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mmearth_ray.modalities import Kind, Level, Missing, Modality
from mmearth_ray.stream import arrays
from mmearth_ray.stream.draws import words
from mmearth_ray.stream.reader import RowGroup

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class SampleSpec:
    """What an experiment makes of a tile.

    `known[name]` bool (P, C): bands that have statistics, by product; values of other bands count as missing.
    `normalise_targets`: maps whose loss is relative to each patch's mean and deviation, which takes two valid values.
    `missing`: whether missing pixels of continuous target maps count.
    """

    seed: int
    image_size: int
    patch_size: int
    visible: int
    input: Modality
    targets: tuple[Modality, ...]
    normalise_targets: frozenset[str] = frozenset()
    missing: Missing = "ignored"
    known: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Everything that is read: the targets, and the input if it is not one of them."""
        extra = () if self.input.name in {m.name for m in self.targets} else (self.input,)
        return self.targets + extra

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a row group of a data set, in the given epoch: what one batch takes out of it."""

    group: RowGroup
    rows: np.ndarray
    epoch: int
    dataset: str

    @property
    def ids(self) -> list[str]:
        return [self.group.id[row] for row in self.rows.tolist()]


def assemble(spec: SampleSpec, pieces: Sequence[Piece], places: np.ndarray | None = None) -> Batch:
    """The samples of those pieces as one batch; every map is copied once, from its row group to its place.

    They come in order, or at `places` (B,) of the batch, each exactly once.

    Returns per modality: maps (B, C, h, w) in the stored dtype, class maps int8 (B, h, w) with -1 for missing, vectors
    float32 (B, C), labels int16 (B,) with -1 for missing, and `<name>.present` bool (B,); `visible` (B, V) and `hidden`
    (B, N) int16 patch indices, ascending; `count` int64 (B, T); `product` int8 (B,); `id` (B,).
    """
    drawn = [draw(spec, piece.ids, piece.epoch, piece.dataset, piece.group.tile_size) for piece in pieces]
    top, left, visible, hidden = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    order = slice(None) if places is None else np.argsort(places)
    crops = Crops(top, left, np.arange(len(top)) if places is None else places)
    batch: Batch = {"visible": visible[order], "hidden": hidden[order]}

    def joined(parts: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(parts))[order]

    batch["id"] = joined(np.array(piece.ids) for piece in pieces)
    batch["product"] = joined(piece.group.product[piece.rows] for piece in pieces)
    for m in spec.modalities:
        batch[m.present_column] = joined(piece.group.present[m.name][piece.rows] for piece in pieces)
        if m.level is Level.PIXEL:
            batch[m.name] = _MAPS[m.kind](spec, m, pieces, crops)
        else:
            batch[m.name] = joined(_VALUES[m.kind](m, piece) for piece in pieces)
    batch["count"] = valid_counts(spec, batch)
    return batch


class Crops(NamedTuple):
    """Where each sample's crop begins in its tile, and its place in the batch, each (B,)."""

    top: np.ndarray
    left: np.ndarray
    places: np.ndarray


def draw(
    spec: SampleSpec, ids: list[str], epoch: int, dataset: str, tile_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Crop offsets (top, left), each (B,), and visible (B, V) and hidden (B, N) patch indices of those tiles."""
    room = tile_size - spec.image_size + 1
    drawn = np.stack([words(2 + spec.patches, "sample", spec.seed, epoch, dataset, tile) for tile in ids])
    top, left = (drawn[:, :2] % np.uint64(room)).astype(np.int64).T
    order = np.argsort(drawn[:, 2:], axis=1, kind="stable").astype(np.int16)
    return top, left, np.sort(order[:, : spec.visible]), np.sort(order[:, spec.visible :])


def _boxes(
    spec: SampleSpec, m: Modality, pieces: Sequence[Piece], crops: Crops
) -> Iterator[tuple[int, RowGroup, int, list[np.ndarray]]]:
    """For each sample its place in the batch, its row group and row, and its box (h, w) of each band: views, no copies."""
    size, columns = spec.image_size, m.columns
    starts = zip(*(values.tolist() for values in crops), strict=True)
    for piece in pieces:
        maps = [piece.group.columns[name] for name in columns]
        for row, (y, x, place) in zip(piece.rows.tolist(), starts, strict=False):
            box = row, slice(y, y + size), slice(x, x + size)
            yield place, piece.group, row, [column[box] for column in maps]


def _maps(spec: SampleSpec, m: Modality, pieces: Sequence[Piece], crops: Crops) -> np.ndarray:
    out = arrays.empty((len(crops.top), len(m.bands), spec.image_size, spec.image_size), m.dtype)
    for place, _, _, bands in _boxes(spec, m, pieces, crops):
        for band, crop in enumerate(bands):
            out[place, band] = crop
    return out


def _class_maps(spec: SampleSpec, m: Modality, pieces: Sequence[Piece], crops: Crops) -> np.ndarray:
    out = arrays.empty((len(crops.top), spec.image_size, spec.image_size), np.int8)
    labels = m.label_table().astype(np.int8)
    for place, group, row, (codes,) in _boxes(spec, m, pieces, crops):
        out[place] = labels.take(codes) if group.present[m.name][row] else -1
    return out


_MAPS: dict[Kind, Callable[..., np.ndarray]] = {Kind.CONTINUOUS: _maps, Kind.CATEGORICAL: _class_maps}


def _vector(m: Modality, piece: Piece) -> np.ndarray:
    return np.stack([piece.group.columns[name][piece.rows] for name in m.columns], axis=1)


def _label(m: Modality, piece: Piece) -> np.ndarray:
    labels = piece.group.columns[m.columns[0]][piece.rows].astype(np.int16)
    known = piece.group.present[m.name][piece.rows] & (labels >= 0) & (labels < m.width)
    return np.where(known, labels, np.int16(-1))


_VALUES: dict[Kind, Callable[[Modality, Piece], np.ndarray]] = {Kind.CONTINUOUS: _vector, Kind.CATEGORICAL: _label}


def valid_counts(spec: SampleSpec, batch: Batch) -> np.ndarray:
    """int64 (B, T): valid elements of each target at hidden patches (maps) or of the tile (image level)."""
    return np.stack([_COUNT[m.level](spec, m, batch) for m in spec.targets], axis=1)


def valid_mask(spec: SampleSpec, modality: Modality, batch: Batch) -> np.ndarray:
    """Where a sample has data, in the shape of its values: from raw values, the layer's presence and known statistics."""
    values = batch[modality.name]
    if modality.kind is Kind.CATEGORICAL:
        return values >= 0
    usable = _usable(spec, modality, batch)
    return modality.valid(values) & usable.reshape(*usable.shape, *(1,) * (values.ndim - 2))


def _usable(spec: SampleSpec, modality: Modality, batch: Batch) -> np.ndarray:
    """bool (B, C): bands of a continuous modality that the sample has and that have statistics."""
    usable = np.broadcast_to(batch[modality.present_column][:, None], batch[modality.name].shape[:2])
    return usable & spec.known[modality.name][batch["product"]] if modality.name in spec.known else usable


def _count_hidden(spec: SampleSpec, modality: Modality, batch: Batch) -> np.ndarray:
    """One sample after the other, whose masks stay in the processor's cache; most lack nothing."""
    values, hidden = batch[modality.name], batch["hidden"]
    full = hidden.shape[1] * spec.patch_size**2
    if modality.kind is Kind.CATEGORICAL:
        usable, holes = np.ones((len(values), 1), bool), _unlabelled
        values = values[:, None]
    elif spec.missing == "mean":
        return np.full(len(values), full * values.shape[1], np.int64)
    else:
        usable, holes = _usable(spec, modality, batch), modality.holes
    least = 2 if modality.name in spec.normalise_targets else 0
    counts = np.zeros(len(values), np.int64)
    for sample in np.flatnonzero(usable.any(1)).tolist():
        bands = values[sample] if usable[sample].all() else values[sample, usable[sample]]
        valid = holes(bands)
        if valid is None:
            counts[sample] = full * len(bands)
        else:
            per_patch = _per_patch(valid, spec.patch_size)[hidden[sample]]
            counts[sample] = per_patch[per_patch >= least].sum()
    return counts


def _unlabelled(labels: np.ndarray) -> np.ndarray | None:
    """Where class maps have labels, or None where they have one everywhere."""
    return None if labels.min() >= 0 else labels >= 0


def _per_patch(valid: np.ndarray, patch_size: int) -> np.ndarray:
    """int64 (L,): valid elements of each patch, over all bands of a mask (C, h, w).  Columns of a patch fit into 8 bits."""
    bands, height, width = valid.shape
    rows, columns = height // patch_size, width // patch_size
    strips = np.add.reduce(valid.view(np.uint8).reshape(bands, rows, patch_size, width), axis=2, dtype=np.uint8)
    return strips.sum(0, dtype=np.int64).reshape(rows * columns, patch_size).sum(1)


def _count_tile(spec: SampleSpec, modality: Modality, batch: Batch) -> np.ndarray:
    valid = valid_mask(spec, modality, batch)
    return valid.reshape(len(valid), -1).sum(1)


_COUNT: dict[Level, Callable[[SampleSpec, Modality, Batch], np.ndarray]] = {
    Level.PIXEL: _count_hidden,
    Level.IMAGE: _count_tile,
}


def bytes_per_tile(spec: SampleSpec) -> int:
    """Bytes of a prepared sample, the few that are no map left out."""
    maps = [m for m in spec.modalities if m.level is Level.PIXEL]
    widths = [1 if m.kind is Kind.CATEGORICAL else len(m.bands) * np.dtype(m.dtype).itemsize for m in maps]
    return spec.image_size**2 * sum(widths)


def elements(spec: SampleSpec) -> np.ndarray:
    """int64 (T,): target elements per sample that would be counted if nothing were missing; coverage is count / this."""
    hidden = (spec.patches - spec.visible) * spec.patch_size**2
    return np.array([hidden * _channels(m) if m.level is Level.PIXEL else _channels(m) for m in spec.targets], np.int64)


def _channels(modality: Modality) -> int:
    return 1 if modality.kind is Kind.CATEGORICAL else len(modality.bands)
