"""The published way: tiles in one HDF5 file, read tile by tile; own code that does the same operations on the same layout.

MMEarth-train (commit 1f368b3, January 2026) opens the file once per process and for every tile and layer reads the chosen bands
by a list of their numbers, maps class codes one after the other, turns no-data into NaN, and makes float32 maps and int64
labels.  It would then normalise, which is left out here since our stream leaves it to the device, and crop, which is done here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.loader_clock import box_of
from mmearth_ray.modalities import DEFAULT_INPUT, TABLE, Kind, Level, Modality, get, tasks
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.read import open_shard, read_block
from mmearth_ray.shards.release import stored_bands
from mmearth_ray.shards.schema import TileBlock

METADATA = np.dtype([("tile_id", "S100"), ("S2_type", "S10")])


def blocks_of(manifest: Manifest) -> Iterator[TileBlock]:
    """All tiles of a data set on this machine, row group by row group."""
    for record in manifest.shards:
        with open_shard(Path(str(manifest.directory / record.file))) as file:
            for group in range(file.num_row_groups):
                yield read_block(file, group, manifest.tile_size)


def write_release(manifest: Manifest, path: Path) -> None:
    """The tiles in the HDF5 layout of the MMEarth v001 release: gzip, one chunk per tile and layer, labels one-hot."""
    with h5py.File(path, "w") as opened:
        file: Any = opened
        for m in TABLE:
            shape = (stored_bands(m), *((manifest.tile_size,) * 2 if m.level is Level.PIXEL else ()))
            file.create_dataset(m.name, (manifest.rows, *shape), m.dtype, chunks=(1, *shape), compression="gzip")
        file.create_dataset("metadata", (manifest.rows,), METADATA, chunks=(1,))
        row = 0
        for block in blocks_of(manifest):
            rows = slice(row, row + len(block))
            for m in TABLE:
                file[m.name][rows] = _stored(m, block.layers[m.name])
            file["metadata"][rows] = np.array(list(zip(block.id, block.product, strict=True)), METADATA)
            row += len(block)


def _stored(m: Modality, layer: np.ndarray) -> np.ndarray:
    """A layer as the release stores it: labels one-hot, all zero where unknown."""
    if m.level is Level.IMAGE and m.kind is Kind.CATEGORICAL:
        return (layer[:, None] == np.arange(len(m.classes))).astype(m.dtype)
    return layer


def published_tile(file: Any, row: int, box: tuple[int, int], size: int) -> dict[str, Any]:
    """The tile of that row, its maps cropped to `size` px at `box` (top, left): float32 with NaN for no data, int64 labels with
    -1."""
    top, left = box
    found: dict[str, Any] = {"id": file["metadata"][row][0].decode()}
    for m in tasks():
        values = _READ[m.level, m.kind](file[m.name], row, m)
        if m.kind is Kind.CATEGORICAL:
            values = np.where(np.isnan(values), -1, values).astype(np.int64)
        else:
            no_data = m.missing[0] if m.missing else -np.inf
            values = np.where(values == no_data, np.nan, values).astype(np.float32)
        found[m.name] = values[:, top : top + size, left : left + size] if m.level is Level.PIXEL else values
    return found


def _bands(dataset: Any, row: int, m: Modality) -> np.ndarray:
    stored = get(m.name).bands
    return np.array(dataset[row, [stored.index(band) for band in m.bands], ...])


def _classes(dataset: Any, row: int, m: Modality) -> np.ndarray:
    values = _bands(dataset, row, m).astype(float)
    values = np.where(values == 0, np.nan, values)
    for label, entry in enumerate(m.classes):
        values = np.where(values == entry.code, label - len(m.classes), values)  # below zero, out of the way of later codes
    values = values + len(m.classes)
    return np.where(values >= len(m.classes), np.nan, values)


def _label(dataset: Any, row: int, _: Modality) -> np.ndarray:
    one_hot = np.array(dataset[row, ...])
    return np.array(one_hot.argmax() if one_hot.any() else np.nan)


_READ = {
    (Level.PIXEL, Kind.CONTINUOUS): _bands, (Level.IMAGE, Kind.CONTINUOUS): _bands,
    (Level.PIXEL, Kind.CATEGORICAL): _classes, (Level.IMAGE, Kind.CATEGORICAL): _label,
}  # fmt: skip


def stacked(tiles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tiles as a batch."""
    return {name: [t[name] for t in tiles] if name == "id" else np.stack([t[name] for t in tiles]) for name in tiles[0]}


def batches(path: str, size: int, batch: int, rank: int) -> Iterator[dict[str, Any]]:
    """Batches of tiles drawn in an order of their own for each rank, without end."""
    with h5py.File(path, "r") as opened:
        file: Any = opened
        count, edge = len(file["metadata"]), file[DEFAULT_INPUT].shape[-1]
        ids = [entry[0].decode() for entry in file["metadata"][:]]
        generator = np.random.default_rng(rank)
        while True:
            rows = generator.integers(count, size=batch).tolist()
            yield stacked([published_tile(file, row, box_of(ids[row], edge - size + 1), size) for row in rows])
