"""MMEarth HDF5 -> shards: every value survives bit for bit, only the order of the rows and the one-hot labels change.

Presence is made explicit: a layer counts as present in a tile if it has a valid value and is where it should be.  An L2A
scene published without its cloud probability displaces the tile's later layers by one band (a defect of the published
export); those layers are kept as they are, but marked as not present.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import PRODUCTS, TABLE, Kind, Level, Modality, Role
from mmearth_ray.settings import key
from mmearth_ray.shards.build import build, file_identity, rows_per_group, rows_per_shard
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.read import filler
from mmearth_ray.shards.release import READ_ERRORS, Release, open_hdf5, open_release, read_failure
from mmearth_ray.shards.release_info import Rows
from mmearth_ray.shards.schema import TileBlock, has_value
from mmearth_ray.shards.stats import require_statistics, usable
from mmearth_ray.shards.write import COMPRESSIONS, TRAINING_SPLIT, tally_valid
from mmearth_ray.storage import Location

DISPLACED = ("sentinel1", "aster", "dynamic_world", "canopy_height_eth", "esa_worldcover")
"""The layers that follow the Sentinel-2 cloud probability in the published export."""


@dataclass(frozen=True)
class ConvertOptions:
    """Settings of `convert`."""

    name: str | None = key(None, "name of the data set; null: the release's file stem")
    workers: int = key(0, "parallel tasks; 0: one per CPU", at_least=0)
    seed: int = key(0, "of the shuffle of the rows and of the hold-out", at_least=0, at_most=2**63 - 1)
    shard_mb: int = key(128, "raw megabytes of a shard, before compression", at_least=1)
    shard_rows: int = key(0, "tiles of a shard; 0: as many as shard_mb gives", at_least=0)
    compression: str = key("auto", "of the shards; auto: lz4 in a directory, zstd in a store", among=("auto", *COMPRESSIONS))
    statistics: str = key(
        "release", "release: also keep the published band statistics; manifest: only those computed from the shards",
        among=("release", "manifest"),
    )  # fmt: skip
    holdout: float = key(0.0, "fraction of the training tiles' places to move to an empty `val` split", at_least=0, below=1)
    block: float = key(1.0, "degrees: side of the blocks that the hold-out takes or leaves whole", above=0, at_most=90)


@dataclass(frozen=True)
class ReleaseTiles:
    """A release as the source of a data set.  Tile t of the data set is row `order[t]` of the release."""

    path: Path
    tile_size: int
    absent: tuple[str, ...]
    rows: Rows
    order: np.ndarray
    statistics: dict[str, Any] | None
    statistics_file: str

    def blocks(self, start: int, stop: int) -> Iterator[TileBlock]:
        """Tiles start..stop-1, a row group at a time.  Raises DataError naming the dataset and row, or the tile."""
        with open_hdf5(self.path) as file:
            rows = rows_per_group(self.tile_size)
            for first in range(start, stop, rows):
                block = self._block(file, self.order[first : min(first + rows, stop)])
                self._check_statistics(block)
                yield block

    def _block(self, file: Any, chosen: np.ndarray) -> TileBlock:
        rows = self.rows
        layers = {m.name: self._layer(file, m, chosen) for m in TABLE}
        present = {m.name: has_value(layers[m.name], m) for m in TABLE}
        for name in DISPLACED:
            present[name] &= ~rows.shifted[chosen]
        names = np.array([*rows.names, None], object)  # place -1 is None
        return TileBlock(
            id=[rows.tile(row) for row in chosen],
            latitude=rows.latitude[chosen],
            longitude=rows.longitude[chosen],
            date=rows.date[chosen].astype(object).tolist(),
            product=[PRODUCTS[place] for place in rows.product[chosen].tolist()],
            crs=names[rows.crs[chosen]].tolist(),
            split=names[rows.split[chosen]].tolist(),
            source=names[rows.source[chosen]].tolist(),
            layers=layers,
            present=present,
        )

    def _layer(self, file: Any, m: Modality, chosen: np.ndarray) -> np.ndarray:
        if m.name in self.absent:
            return filler(m, len(chosen), self.tile_size)
        dataset = file[m.name]
        values = np.empty((len(chosen), *dataset.shape[1:]), dataset.dtype.newbyteorder("="))
        for place in np.argsort(chosen).tolist():  # in file order: kinder to a spinning disk
            row = int(chosen[place])
            try:
                dataset.read_direct(values, np.s_[row], np.s_[place])
            except READ_ERRORS as error:
                raise read_failure(self.path, m.name, row, error) from error
        return self._labels(m, values, chosen) if m.level is Level.IMAGE and m.kind is Kind.CATEGORICAL else values

    def _labels(self, m: Modality, one_hot: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """(n,) labels from (n, classes) one-hot rows, -1 where a row is all zero."""
        hot = one_hot != 0
        for at in np.flatnonzero((hot.sum(axis=1) > 1) | (hot & (one_hot != 1)).any(axis=1)).tolist():
            raise DataError(f"'{m.name}' of {self._tile(chosen[at])} is not one-hot: at most one entry may be 1, the others 0")
        labels = np.where(hot.any(axis=1), hot.argmax(axis=1), -1).astype(m.dtype)
        told = self.rows.labels.get(m.name, np.full(len(self.rows), -1))[chosen]
        for at in np.flatnonzero((labels >= 0) & (told >= 0) & (labels != told)).tolist():
            raise DataError(
                f"{m.name} of {self._tile(chosen[at])} is {labels[at]} in {self.path.name} but {told[at]} in tile_info: "
                "the files do not belong together"
            )
        return labels

    def _tile(self, row: int) -> str:
        return f"tile '{self.rows.tile(row)}' (row {row})"

    def _check_statistics(self, block: TileBlock) -> None:
        """Raise DataError if a task's band has valid values that the release's statistics cannot normalise."""
        if self.statistics is None:
            return
        lacking = [
            m
            for m in TABLE
            if m.role is Role.TASK
            and not all(usable(entry) for bands in self.statistics.get(m.name, {}).values() for entry in bands.values())
        ]
        require_statistics(self.statistics, tally_valid(block, tuple(lacking)), lacking, self.statistics_file)


def convert(release_directory: Path, out: Location, options: ConvertOptions) -> Manifest:
    """Make a data set in `out` from a published release; an interrupted conversion continues where it stopped.

    Raises DataError if the release is incomplete or its parts do not fit together: before anything is written for what
    `open_release` checks, at the shard that holds the tile for what only its layers show (damaged values, labels that are
    not one-hot or not those of tile_info, values without statistics).  Finished shards then stay; if there are none yet,
    `out` is left as it was found.
    """
    release_directory = release_directory.resolve()  # tasks may have another working directory
    release = open_release(release_directory)
    rows = hold_out(release, options)
    for note in release.notes:
        print(f"note: {note}", file=sys.stderr)
    published = release.statistics if options.statistics == "release" else None
    tiles, h5, file = len(rows), release.files["h5"], release.files["band_stats"].name
    order = shuffled(tiles, options.seed)
    name = options.name or release.stem
    origin = {
        "kind": "release", "release": release.stem, "name": name, "seed": options.seed, "holdout": options.holdout,
        "block": options.block, "files": {part: file_identity(path) for part, path in sorted(release.files.items())},
    }  # fmt: skip
    shard_rows = options.shard_rows or rows_per_shard(release.tile_size, options.shard_mb)
    manifest = build(
        out,
        ReleaseTiles(h5, release.tile_size, release.absent, rows, order, published, file),
        name=name,
        tiles=tiles,
        tile_size=release.tile_size,
        shard_rows=shard_rows,
        origin=origin,
        compression=options.compression,
        workers=min(options.workers or cpus(), -(-tiles // shard_rows)),
        release_statistics=published,
    )
    if manifest.release_statistics != published:
        raise DataError(f"{out} already holds this data set, made with the other value of `statistics`; remove it first")
    return manifest


def shuffled(tiles: int, seed: int) -> np.ndarray:
    """A permutation of 0..tiles-1 that depends on `seed` alone: sorted keys of a counter-based generator (Philox 4x64)."""
    keys = np.random.Philox(key=seed).random_raw(tiles)
    return np.argsort(keys, kind="stable")


def hold_out(release: Release, options: ConvertOptions) -> Rows:
    """The rows, with whole blocks of places moved from `train` to `val` where the release has no `val` and one is asked for.

    A block is a cell of `options.block` degrees; a hash of (seed, cell) decides.  Tiles without a place stay in `train`.
    """
    rows = release.rows
    train, val = (rows.names.index(name) if name in rows.names else -1 for name in (TRAINING_SPLIT, "val"))
    if not options.holdout:
        return rows
    if (rows.split == val).any() and val >= 0:
        release.notes.append("the release has a `val` split of its own: holdout is not applied")
        return rows
    names = rows.names if val >= 0 else (*rows.names, "val")
    movable = np.flatnonzero((rows.split == train) & np.isfinite(rows.latitude) & np.isfinite(rows.longitude))
    cells = np.floor(np.stack([rows.latitude[movable], rows.longitude[movable]], axis=1) / options.block).astype(np.int64)
    distinct, cell = np.unique(cells, axis=0, return_inverse=True)
    taken = np.array([_share(options.seed, *pair) < options.holdout for pair in distinct.tolist()], bool)
    split = rows.split.copy()
    split[movable[taken[cell.reshape(-1)]]] = names.index("val")
    return replace(rows, split=split, names=names)


def _share(seed: int, south: int, west: int) -> float:
    """A number in [0, 1) from the seed and a cell's place in the grid."""
    digest = hashlib.blake2b(f"{seed},{south},{west}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
