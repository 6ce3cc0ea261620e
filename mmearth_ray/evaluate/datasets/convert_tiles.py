"""Tiles of shards with a label of their own -> a labelled data set of Sentinel-2 alone, its test split apart in space.

Shapes: N tiles that may be used, n tiles of a row group, S x S pixels of a tile's middle, K classes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.assigning import blocks_of, check_shares, km_to_nearest, splits_by_block
from mmearth_ray.evaluate.datasets.task import SPLITS, Goal, TaskInfo
from mmearth_ray.evaluate.datasets.tile_labels import TileLabel, middle, tile_label
from mmearth_ray.evaluate.datasets.writing import Block, require_place, write_task
from mmearth_ray.modalities import DEFAULT_INPUT, PRODUCTS, Modality, get
from mmearth_ray.settings import flatten, key
from mmearth_ray.shards.manifest import Manifest, load_manifest
from mmearth_ray.shards.read import open_shard
from mmearth_ray.shards.write import TRAINING_SPLIT
from mmearth_ray.storage import Location
from mmearth_ray.stream.metadata import Metadata
from mmearth_ray.stream.reader import read_group
from mmearth_ray.stream.select import NothingSelected, select
from mmearth_ray.stream.shard import Shard

ALL = "all"


@dataclass(frozen=True)
class TilesOptions:
    """Settings of `convert-tiles`."""

    label: str = key("biome", "row of the table: a class of the tile, a map (its dominant class), a quantity (its mean)")
    band: str = key("", "which band of a quantity of several, such as height of canopy_height_eth")
    mask: bool = key(False, "of a map of classes the map itself: segmentation")
    split: str = key("val", "which split's tiles: val, which pretraining does not see; all takes those that it saw as well")
    where: str = key("", "which of them, such as latitude > 0; empty: all")
    product: str = key("", "l1c or l2a; empty: the one with most tiles", among=("", *PRODUCTS))
    block: float = key(1.0, "degrees: side of the blocks that go to a split as a whole", at_least=0.25, at_most=90)
    valid: float = key(0.1, "share of blocks to choose settings by", above=0, below=1)
    test: float = key(0.3, "share of blocks to test on", above=0, below=1)
    gap: float = key(5.0, "km: other tiles whose middle is nearer to that of a test tile are left out", at_least=0)
    size: int | None = key(None, "px: the middle of each tile; null: the whole tile", at_least=1)
    tiles: int | None = key(None, "at most so many, drawn by seed; null: all", at_least=1)
    least: int = key(5, "training tiles below which a class is left out", at_least=1)
    name: str = key("", "name of the data set; empty: that of the shards and the label")
    seed: int = key(0, "of blocks and draws", at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True, eq=False)
class _Tiles:
    """N tiles: row group (counted over all shards) and row in it, id, middle in degrees (N, 2); then what was found out.

    `value`: (N,) class or quantity, NaN unknown; `occurs`: bool (N, K) classes of a map, else (N, 0); `split`: (N,).
    """

    group: np.ndarray
    row: np.ndarray
    id: np.ndarray
    place: np.ndarray
    value: np.ndarray
    occurs: np.ndarray
    split: np.ndarray

    def __len__(self) -> int:
        return len(self.id)

    def take(self, rows: np.ndarray) -> "_Tiles":
        return _Tiles(**{name: values[rows] for name, values in vars(self).items()})


@dataclass(frozen=True, eq=False)
class _Shards:
    """A data set with its row groups counted over all shards."""

    manifest: Manifest
    given: Modality
    label: TileLabel
    size: int

    @property
    def sizes(self) -> np.ndarray:
        return np.array([rows for record in self.manifest.shards for rows in record.row_groups], np.int64)

    def read(self, number: int, *modalities: Modality) -> Any:
        """The row group of that number.  Raises DataError if its shard is damaged."""
        for record in self.manifest.shards:
            if number < len(record.row_groups):
                return read_group(Shard.of(self.manifest.directory, record), number, self.manifest.tile_size, modalities)
            number -= len(record.row_groups)
        raise ValueError("there is no row group of that number")

    def present(self) -> np.ndarray:
        """bool (all tiles,): which have the images."""
        column, found = self.given.present_column, [np.zeros(0, bool)]
        for record in self.manifest.shards:
            with open_shard(self.manifest.directory / record.file) as file:
                found.append(file.read(columns=[column], use_threads=False).column(column).to_numpy())
        return np.concatenate(found)


def convert(place: Location, out: Path, options: TilesOptions) -> TaskInfo:
    """Draw a labelled data set from shards and return its description.

    Raises UsageError for settings that do not fit the shards, DataError for damaged shards or where too few tiles are left.
    """
    require_place(out)
    check_shares(0, options.valid, options.test)
    manifest = load_manifest(place)
    given = get(DEFAULT_INPUT, manifest.table).default_bands()
    label = tile_label(options.label, options.band, manifest.table, mask=options.mask, given=given.name)
    if options.size is not None and options.size > manifest.tile_size:
        raise UsageError(f"size={options.size} is larger than the {manifest.tile_size} px tiles of {place}")
    shards, notes = _Shards(manifest, given, label, options.size or manifest.tile_size), []
    tiles, product = _chosen(shards, options, notes)
    tiles = _separated(_labelled(shards, tiles, options, notes), options, notes)
    _require(tiles, options)
    tiles, kept = _classes(label, tiles, options, notes)
    _require(tiles, options)
    names = label.names if kept is None else tuple(label.names[k] for k in kept)
    info = TaskInfo(
        name=options.name or f"{manifest.name}-{label.modality.name}", goal=label.goal, classes=names, bands=given.bands,
        product=product, dtype=given.dtype, height=shards.size, width=shards.size, missing=given.missing, notes=tuple(notes),
        origin={"kind": "tiles", "shards": manifest.name, "digest": manifest.digest, **flatten(options)},
    )  # fmt: skip
    return write_task(out, info, _blocks(shards, tiles, kept))


def _chosen(shards: _Shards, options: TilesOptions, notes: list[str]) -> tuple[_Tiles, str]:
    """The tiles that settings choose by what metadata tells, and their product."""
    metadata, sizes = Metadata(shards.manifest), shards.sizes
    selection = select(metadata, options.where, "where")
    first_group = np.cumsum([0, *(len(record.row_groups) for record in shards.manifest.shards)])
    group = np.repeat(first_group[selection.shard] + selection.group, selection.sizes)
    rows = (np.cumsum(sizes) - sizes)[group] + selection.rows
    if not len(rows):
        raise NothingSelected(f"where={options.where}: no tile of {shards.manifest.directory} satisfies it")
    columns = {name: np.array(metadata.table.column(name).take(rows).to_pylist()) for name in ("id", "split", "product")}
    place = np.stack([metadata.table.column(name).to_numpy()[rows] for name in ("latitude", "longitude")], axis=1).astype(float)
    asked = np.ones(len(rows), bool) if options.split == ALL else columns["split"] == options.split
    if not asked.any():
        there = ", ".join(f"{name} {count:,}" for name, count in sorted(Counter(columns["split"].tolist()).items()))
        raise UsageError(f"split={options.split}: none of the tiles is in it ({there}); hold some out when the shards are made "
                         "(holdout=0.1), or take split=all, tiles that pretraining saw among them")  # fmt: skip
    counts = Counter(columns["product"][asked].tolist())
    product = options.product or max(sorted(counts), key=lambda name: counts[name])
    if not counts[product]:
        raise UsageError(f"product={product}: none of the tiles is of it ({', '.join(sorted(counts))})")
    _note(notes, sum(counts.values()) - counts[product], f"of another product than {product}")
    if TRAINING_SPLIT in columns["split"][asked]:
        notes.append("Pretraining on these shards sees some of the tiles: not only held-out ones were asked for.")
    usable = asked & (columns["product"] == product)
    seen = shards.present()[rows] & np.isfinite(place).all(1)
    _note(notes, int((usable & ~seen).sum()), "without images or a place")
    kept = np.flatnonzero(usable & seen)
    empty = np.full(len(kept), np.nan)
    found = _Tiles(group[kept], selection.rows[kept], columns["id"][kept], place[kept], empty, empty[:, None], empty)
    return found, product


def _note(notes: list[str], tiles: int, why: str) -> None:
    if tiles:
        notes.append(f"Left out: {tiles:,} {'tile' if tiles == 1 else 'tiles'} {why}.")


def _groups(tiles: _Tiles) -> Iterator[tuple[int, np.ndarray]]:
    """(row group, places of its tiles), ascending."""
    groups, starts = np.unique(tiles.group, return_index=True)  # ascending, as tiles are chosen
    yield from zip(groups.tolist(), np.split(np.arange(len(tiles)), starts[1:]), strict=True)


def _labelled(shards: _Shards, tiles: _Tiles, options: TilesOptions, notes: list[str]) -> _Tiles:
    """The tiles whose label is known, at most as many as asked for."""
    label, masks = shards.label, shards.label.goal is Goal.SEGMENTATION
    values = np.full(len(tiles), np.nan)
    occurs = np.zeros((len(tiles), len(label.modality.classes) if masks else 0), bool)
    for group, places in _groups(tiles):
        read, rows = shards.read(group, label.modality), tiles.row[places]
        if masks:
            occurs[places] = label.occurs(read, rows, shards.size)
        else:
            values[places] = label.values(read, rows, shards.size)
    known = occurs.any(1) if masks else np.isfinite(values)
    _note(notes, int((~known).sum()), f"whose {label.modality.name} is unknown")
    kept = np.flatnonzero(known)
    if not len(kept):
        raise DataError(f"of {len(tiles):,} tiles none has a known {label.modality.name}")
    if options.tiles is not None and len(kept) > options.tiles:
        kept = np.sort(np.random.default_rng([options.seed, 22]).permutation(kept)[: options.tiles])
    return replace(tiles, value=values, occurs=occurs).take(kept)


def _separated(tiles: _Tiles, options: TilesOptions, notes: list[str]) -> _Tiles:
    """The tiles with their splits, without those that are too near to one of the test split."""
    if not len(tiles):
        return tiles
    blocks = blocks_of(tiles.place[:, 0], tiles.place[:, 1], options.block)
    split = splits_by_block(blocks, options.valid, options.test, options.seed)
    is_test = split == SPLITS[2]
    away = is_test | (km_to_nearest(tiles.place[:, 0], tiles.place[:, 1], tiles.place[is_test]) >= options.gap)
    _note(notes, int((~away).sum()), f"of train or valid nearer than {options.gap:g} km to one of test")
    notes.append(
        f"Splits are of whole blocks of {options.block:g} degrees, of which the tiles lie in {len(np.unique(blocks, axis=0))}."
    )
    return replace(tiles, split=split).take(np.flatnonzero(away))


def _classes(label: TileLabel, tiles: _Tiles, options: TilesOptions, notes: list[str]) -> tuple[_Tiles, np.ndarray | None]:
    """The tiles of classes that occur often enough to be learnt, and those classes in the table's order; None: a quantity."""
    if label.goal is Goal.REGRESSION:
        return tiles, None
    train = tiles.split == SPLITS[0]
    if label.goal is Goal.SEGMENTATION:
        in_all, in_train = tiles.occurs.sum(0), tiles.occurs[train].sum(0)
    else:
        in_all, in_train = (np.bincount(tiles.value[rows].astype(np.int64), minlength=len(label.names))
                            for rows in (slice(None), train))  # fmt: skip
    kept = np.flatnonzero(in_train >= options.least)
    rare = [f"{label.names[k]} ({in_train[k]})" for k in np.flatnonzero((in_all > 0) & (in_train < options.least))]
    if rare:
        pixels = "; their pixels count for nothing" if label.goal is Goal.SEGMENTATION else ""
        notes.append(f"Left out: classes of fewer than {options.least} training tiles: {', '.join(rare)}{pixels}.")
    if len(kept) < 2:
        found = ", ".join(f"{label.names[k]} {in_train[k]}" for k in np.flatnonzero(in_train)) or "none"
        raise DataError(f"fewer than 2 classes of {label.modality.name} have {options.least} training tiles ({found}); "
                        "lower least=, or take more tiles")  # fmt: skip
    has = tiles.occurs[:, kept].any(1) if label.goal is Goal.SEGMENTATION else np.isin(tiles.value, kept)
    _note(notes, int((~has).sum()), "of those classes alone")
    return tiles.take(np.flatnonzero(has)), kept


def _require(tiles: _Tiles, options: TilesOptions) -> None:
    """Raise DataError if no tile is left to train or to test on."""
    counts = {split: int((tiles.split == split).sum()) for split in SPLITS}
    if not counts[SPLITS[0]] or not counts[SPLITS[2]]:
        there = ", ".join(f"{split} {count}" for split, count in counts.items())
        raise DataError(f"too few blocks of {options.block:g} degrees hold tiles to have some in train and in test ({there}); "
                        "use a smaller block= (0.25 at least), a smaller gap=, another seed=, or more tiles")  # fmt: skip


def _blocks(shards: _Shards, tiles: _Tiles, kept: np.ndarray | None) -> Iterator[Block]:
    label, given = shards.label, shards.given
    masks = label.goal is Goal.SEGMENTATION
    new = np.full(len(label.names) + 1, -1, np.int64)  # the last place, of code -1, stays
    if kept is not None:
        new[kept] = np.arange(len(kept))
    for group, places in _groups(tiles):
        read, rows = shards.read(group, given, *((label.modality,) if masks else ())), tiles.row[places]
        pixels = np.stack([middle(read.columns[column][rows], shards.size) for column in given.columns], axis=1)
        labels = tiles.value[places] if kept is None else new[tiles.value[places].astype(np.int64)] if not masks else (
            new[label.maps(read, rows, shards.size)])  # fmt: skip
        ids, splits = tiles.id[places].tolist(), tiles.split[places].tolist()
        yield Block(ids, splits, np.full(len(places), -1), labels, pixels.astype(given.dtype))
