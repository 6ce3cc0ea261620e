"""Reading shards back as they were written: a row group becomes a block of tiles again, raw and with every column."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import TABLE, Kind, Level, Modality
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.schema import METADATA_FIELDS, TileBlock
from mmearth_ray.shards.write import ShardRecord
from mmearth_ray.storage import Location, read_ranges, stamp


class RangeFile(io.RawIOBase):
    """A remote file for readers that ask for some of its bytes only.  Raises Absent and DataError."""

    def __init__(self, place: UPath) -> None:
        self.place, self.size, self.position = place, stamp(place).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_CUR: self.position, io.SEEK_END: self.size}.get(whence, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        stop = min(self.size, self.position + len(buffer))
        (data,), _ = read_ranges(self.place, [(self.position, stop)])
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def open_shard(path: Location, *, pre_buffer: bool = False) -> pq.ParquetFile:
    """The shard's Parquet file, of which only what is asked for is read; `pre_buffer`: neighbouring columns together.

    Raises DataError if it is missing or damaged.
    """
    try:
        file = path if isinstance(path, Path) else pa.PythonFile(RangeFile(path), mode="r")
        return pq.ParquetFile(file, pre_buffer=pre_buffer)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())})") from error


def read_block(file: pq.ParquetFile, row_group: int, tile_size: int, table: tuple[Modality, ...] = TABLE) -> TileBlock:
    """One row group as the block it was written from.  Raises DataError if its bytes are damaged."""
    try:
        rows = file.read_row_group(row_group)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"row group {row_group} cannot be read ({' '.join(str(error).split())})") from error
    given = {f.name: rows.column(f.name) for f in METADATA_FIELDS if f.name != "geometry"}
    places = {name: given[name].to_numpy().astype(np.float64) for name in ("latitude", "longitude")}
    lists = {name: column.to_pylist() for name, column in given.items() if name not in places}
    return TileBlock(
        **places,
        **lists,
        layers={m.name: read_layer(rows, m, tile_size) for m in table},
        present={m.name: rows.column(m.present_column).to_numpy().astype(bool) for m in table},
    )


def read_layer(rows: pa.Table, modality: Modality, tile_size: int) -> np.ndarray:
    """A modality of those rows: maps (n, bands, H, W), vectors (n, bands), labels (n,) with -1 for unknown."""
    columns = [rows.column(name).combine_chunks() for name in modality.columns]
    if modality.level is Level.PIXEL:
        return np.stack([_maps(column, modality, tile_size) for column in columns], axis=1)
    if modality.kind is Kind.CATEGORICAL:
        return columns[0].fill_null(-1).to_numpy(zero_copy_only=False).astype(modality.dtype)
    return np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)


def _maps(column: pa.Array, modality: Modality, tile_size: int) -> np.ndarray:
    data = column.buffers()[1]
    if data is None:
        return np.zeros((0, tile_size, tile_size), modality.dtype)
    dtype = np.dtype(modality.dtype).newbyteorder("<")
    pixels = tile_size * tile_size
    values = np.frombuffer(data, dtype, len(column) * pixels, column.offset * pixels * dtype.itemsize)
    return values.reshape(len(column), tile_size, tile_size).astype(modality.dtype, copy=False)


def shard_ids(manifest: Manifest, record: ShardRecord) -> Iterator[tuple[int, list[str]]]:
    """(row group, tile ids) of a shard, without reading its layers.  Raises DataError if the shard is damaged."""
    with open_shard(manifest.directory / record.file) as file:
        for group in range(file.num_row_groups):
            try:
                yield group, file.read_row_group(group, columns=["id"]).column("id").to_pylist()
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{record.file}: the tile ids cannot be read ({' '.join(str(error).split())})") from error


def filler(modality: Modality, tiles: int, tile_size: int) -> np.ndarray:
    """The layer of tiles that lack it: the modality's first missing value, as the release fills (-inf in float maps)."""
    if modality.level is Level.IMAGE and modality.kind is Kind.CATEGORICAL:
        return np.full(tiles, -1, modality.dtype)
    shape = (tiles, len(modality.bands)) + ((tile_size, tile_size) if modality.level is Level.PIXEL else ())
    nothing = modality.missing[0] if modality.missing else -np.inf if modality.level is Level.PIXEL else np.nan
    return np.full(shape, nothing, modality.dtype)
