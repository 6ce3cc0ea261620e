"""The reader: one row group of a shard -> arrays of its used columns, raw and without a copy of any map."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import PRODUCTS, Kind, Level, Modality
from mmearth_ray.shards.schema import column_type


@dataclass(frozen=True)
class RowGroup:
    """A row group in memory: n tiles of H x W px.

    `columns`: by shard column, maps (n, H, W) in the stored dtype, vectors' components (n,) float32, labels (n,) int16
    with -1 for unknown.  `present` by modality, bool (n,).  `product` int8 (n,) indexes PRODUCTS.
    """

    id: list[str]
    product: np.ndarray
    columns: dict[str, np.ndarray]
    present: dict[str, np.ndarray]


def used_columns(modalities: tuple[Modality, ...]) -> list[str]:
    """The shard columns that those modalities need, beside the id and the product; nothing else is read."""
    names = ["id", "product"]
    for modality in modalities:
        names += [*modality.columns, modality.present_column]
    return names


def read_group(path: Path, group: int, tile_size: int, modalities: tuple[Modality, ...]) -> RowGroup:
    """Read the used columns of one row group.  Raises DataError if the shard is missing, damaged or of another schema."""
    try:
        table = _open(path).read_row_group(group, columns=used_columns(modalities), use_threads=False)
        batch = table.combine_chunks()
        return RowGroup(
            id=batch.column("id").to_pylist(),
            product=np.array([PRODUCTS.index(p) for p in batch.column("product").to_pylist()], np.int8),
            columns={
                name: _values(name, batch.column(name).chunk(0), modality, tile_size)
                for modality in modalities
                for name in modality.columns
            },
            present={m.name: batch.column(m.present_column).to_numpy() for m in modalities},
        )
    except FileNotFoundError as error:
        raise DataError(f"the shard {path} is missing; restore it, or build the data set again") from error
    except (OSError, pa.ArrowException, KeyError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot read row group {group} of {path} ({reason}); `shards verify` tells more") from error


@lru_cache(maxsize=8)
def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, page_checksum_verification=True)


def _values(name: str, column: pa.Array, modality: Modality, tile_size: int) -> np.ndarray:
    if column.type != column_type(modality, tile_size):
        raise ValueError(f"{name} is {column.type}, not {column_type(modality, tile_size)}")
    if modality.level is Level.PIXEL:
        dtype = np.dtype(modality.dtype).newbyteorder("<")
        start = column.offset * tile_size * tile_size * dtype.itemsize
        flat = np.frombuffer(column.buffers()[1], dtype, len(column) * tile_size * tile_size, offset=start)
        return flat.reshape(len(column), tile_size, tile_size)
    if modality.kind is Kind.CATEGORICAL:
        return column.fill_null(-1).to_numpy(zero_copy_only=False)
    return column.to_numpy(zero_copy_only=False)
