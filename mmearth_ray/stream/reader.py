"""The reader: one row group of a shard -> arrays of its used columns, raw; maps are views of what was decompressed."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmearth_ray.errors import DataError, one_line
from mmearth_ray.modalities import PRODUCTS, Kind, Level, Modality
from mmearth_ray.shards.schema import column_type
from mmearth_ray.stream.pages import read_labels, read_strings, read_values
from mmearth_ray.stream.shard import LOCAL, Fetched, Reading, Shard, fetch


@dataclass(frozen=True)
class RowGroup:
    """A row group in memory: n tiles of H x W px.

    `columns`: by shard column, maps (n, H, W) in the stored dtype, vectors' components (n,) float32, labels (n,) int16
    with -1 for unknown.  `present` by modality, bool (n,).  `product` int8 (n,) indexes PRODUCTS.  `faults`: requests to a
    store that failed before the bytes came.
    """

    id: list[str]
    product: np.ndarray
    columns: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    tile_size: int
    faults: int = 0


def used_columns(modalities: tuple[Modality, ...]) -> list[str]:
    """The shard columns that those modalities need, beside the id and the product; nothing else is read."""
    names = ["id", "product"]
    for modality in modalities:
        names += [*modality.columns, modality.present_column]
    return names


def read_group(
    shard: Shard, group: int, tile_size: int, modalities: tuple[Modality, ...], reading: Reading = LOCAL
) -> RowGroup:
    """Read the used columns of one row group.  Raises DataError if the shard is missing, damaged or of another schema."""
    try:
        fetched = fetch(shard, [group], used_columns(modalities), reading)
    except LookupError as error:
        raise unreadable(shard, group, error) from error
    return decode(fetched, shard, group, tile_size, modalities)


def decode(fetched: Fetched, shard: Shard, group: int, tile_size: int, modalities: tuple[Modality, ...]) -> RowGroup:
    """The arrays of a row group whose bytes were fetched.  Raises DataError if they are damaged or of another schema."""
    try:
        rows = fetched.rows(group)
        columns: dict[str, np.ndarray] = {}
        for m in modalities:
            wanted = column_type(m, tile_size)
            for name in m.columns:
                if fetched.types[name] != wanted:
                    raise ValueError(f"{name} is {fetched.types[name]}, not {wanted}")
                columns[name] = _column(*fetched.chunk(group, name), m, tile_size, rows)
        return RowGroup(
            id=read_strings(*fetched.chunk(group, "id"), rows),
            product=np.array([PRODUCTS.index(p) for p in read_strings(*fetched.chunk(group, "product"), rows)], np.int8),
            columns=columns,
            present={m.name: read_values(*fetched.chunk(group, m.present_column), rows, BOOL) for m in modalities},
            tile_size=tile_size,
            faults=fetched.faults,
        )
    except (OSError, pa.ArrowException, LookupError, ValueError) as error:
        raise unreadable(shard, group, error) from error


def unreadable(shard: Shard, group: int, error: Exception) -> DataError:
    return DataError(f"cannot read row group {group} of {shard.place} ({one_line(error)}); `shards verify` tells more")


BOOL = np.dtype(bool)


def _column(chunk: memoryview, compression: str, modality: Modality, tile_size: int, rows: int) -> np.ndarray:
    """Maps (rows, H, W), components of a vector (rows,) or labels (rows,)."""
    dtype = np.dtype(modality.dtype).newbyteorder("<")
    if modality.level is Level.PIXEL:
        return read_values(chunk, compression, rows, np.dtype((dtype, (tile_size, tile_size))))
    if modality.kind is Kind.CATEGORICAL:
        return read_labels(chunk, compression, rows)
    return read_values(chunk, compression, rows, dtype)
