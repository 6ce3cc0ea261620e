"""Preparing samples: aligned crop, class labels, patch mask and valid counts; everything stays in its native type.

The crop and the mask of a sample depend on (seed, epoch, data-set name, tile id) alone.  The crop box is one for all
maps of a tile.  Counts say how many valid target elements each sample has at hidden places, which is what the loss divides
by; they follow the losses' own rules.

Shapes: B samples, C bands, h w the crop, L patches of p x p px, V visible, N hidden, T targets, P products.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mmearth_ray.modalities import Kind, Level, Missing, Modality
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

    dataset: str
    seed: int
    tile_size: int
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


def prepare(spec: SampleSpec, group: RowGroup, rows: np.ndarray, epoch: int) -> Batch:
    """The samples of those rows of a row group.

    Returns per modality: maps (B, C, h, w) in the stored dtype, class maps int8 (B, h, w) with -1 for missing, vectors
    float32 (B, C), labels int16 (B,) with -1 for missing, and `<name>.present` bool (B,); `visible` (B, V) and `hidden`
    (B, N) int16 patch indices, ascending; `count` int64 (B, T); `product` int8 (B,); `id` (B,).
    """
    ids = [group.id[row] for row in rows]
    top, left, visible, hidden = draw(spec, ids, epoch)
    batch: Batch = {"id": np.array(ids), "product": group.product[rows], "visible": visible, "hidden": hidden}
    for modality in spec.modalities:
        batch[modality.name] = _LAYER[modality.level, modality.kind](spec, modality, group, rows, top, left)
        batch[modality.present_column] = group.present[modality.name][rows]
    batch["count"] = valid_counts(spec, batch)
    return batch


def draw(spec: SampleSpec, ids: list[str], epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Crop offsets (top, left), each (B,), and visible (B, V) and hidden (B, N) patch indices of those tiles."""
    room = spec.tile_size - spec.image_size + 1
    drawn = np.stack([words(2 + spec.patches, "sample", spec.seed, epoch, spec.dataset, tile) for tile in ids])
    top, left = (drawn[:, :2] % np.uint64(room)).astype(np.int64).T
    order = np.argsort(drawn[:, 2:], axis=1, kind="stable").astype(np.int16)
    return top, left, np.sort(order[:, : spec.visible]), np.sort(order[:, spec.visible :])


def _crop(spec: SampleSpec, column: np.ndarray, rows: np.ndarray, top: np.ndarray, left: np.ndarray) -> np.ndarray:
    """(B, h, w): each row's box out of a column of maps (n, H, W)."""
    size = spec.image_size
    windows = np.lib.stride_tricks.sliding_window_view(column, (size, size), axis=(1, 2))
    return windows[rows, top, left]


def _map(
    spec: SampleSpec, modality: Modality, group: RowGroup, rows: np.ndarray, top: np.ndarray, left: np.ndarray
) -> np.ndarray:
    out = np.empty((len(rows), len(modality.bands), spec.image_size, spec.image_size), np.dtype(modality.dtype))
    for band, name in enumerate(modality.columns):
        out[:, band] = _crop(spec, group.columns[name], rows, top, left)
    return out


def _class_map(
    spec: SampleSpec, modality: Modality, group: RowGroup, rows: np.ndarray, top: np.ndarray, left: np.ndarray
) -> np.ndarray:
    codes = _crop(spec, group.columns[modality.columns[0]], rows, top, left)
    labels = modality.label_table().astype(np.int8)[codes]
    labels[~group.present[modality.name][rows]] = -1
    return labels


def _vector(spec: SampleSpec, modality: Modality, group: RowGroup, rows: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return np.stack([group.columns[name][rows] for name in modality.columns], axis=1)


def _label(spec: SampleSpec, modality: Modality, group: RowGroup, rows: np.ndarray, *_: np.ndarray) -> np.ndarray:
    labels = group.columns[modality.columns[0]][rows].astype(np.int16)
    known = group.present[modality.name][rows] & (labels >= 0) & (labels < modality.width)
    return np.where(known, labels, np.int16(-1))


_LAYER: dict[tuple[Level, Kind], Callable[..., np.ndarray]] = {
    (Level.PIXEL, Kind.CONTINUOUS): _map,
    (Level.PIXEL, Kind.CATEGORICAL): _class_map,
    (Level.IMAGE, Kind.CONTINUOUS): _vector,
    (Level.IMAGE, Kind.CATEGORICAL): _label,
}


def valid_counts(spec: SampleSpec, batch: Batch) -> np.ndarray:
    """int64 (B, T): valid elements of each target at hidden patches (maps) or of the tile (image level)."""
    return np.stack([_COUNT[m.level](spec, m, batch) for m in spec.targets], axis=1)


def valid_mask(spec: SampleSpec, modality: Modality, batch: Batch) -> np.ndarray:
    """Where a sample has data, in the shape of its values: from raw values, the layer's presence and known statistics."""
    values = batch[modality.name]
    if modality.kind is Kind.CATEGORICAL:
        return values >= 0
    usable = np.broadcast_to(batch[modality.present_column][:, None], values.shape[:2])
    if modality.name in spec.known:
        usable = usable & spec.known[modality.name][batch["product"]]
    return modality.valid(values) & usable.reshape(*usable.shape, *(1,) * (values.ndim - 2))


def _count_hidden(spec: SampleSpec, modality: Modality, batch: Batch) -> np.ndarray:
    valid = valid_mask(spec, modality, batch)
    if spec.missing == "mean" and modality.kind is Kind.CONTINUOUS:
        valid = np.ones_like(valid)
    samples, p, side = len(valid), spec.patch_size, spec.image_size // spec.patch_size
    bands = valid.size // (samples * spec.image_size**2)
    if valid.all():
        return np.full(samples, (spec.patches - spec.visible) * p * p * bands, np.int64)
    blocks = valid.reshape(samples, bands, side, p, side, p)
    per_patch = np.count_nonzero(blocks, axis=(1, 3, 5)).reshape(samples, spec.patches)
    if modality.name in spec.normalise_targets:
        per_patch = np.where(per_patch >= 2, per_patch, 0)
    return np.take_along_axis(per_patch, batch["hidden"].astype(np.int64), axis=1).sum(1)


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


def concatenate(batches: list[Batch]) -> Batch:
    """One batch from several, in order."""
    if len(batches) == 1:
        return batches[0]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
