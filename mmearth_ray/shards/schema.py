"""The shard schema: from the table of modalities to Arrow columns.

One row per tile and one column per band, so that an experiment reads only the bands it uses.  A band's map is a
FIXED_LEN_BYTE_ARRAY of H*W*itemsize bytes (Parquet format, "Physical types"): little-endian, row-major, raw values as
released.  A tensor type would be twice as large and a tenth as fast, because Parquet has no 16-bit integers.
"""

import json
from dataclasses import dataclass, fields
from datetime import date

import numpy as np
import pyarrow as pa

from mmearth_ray.modalities import TABLE, Kind, Level, Modality, table_hash

SCHEMA_VERSION = 1
"""Raised when a reader of the previous version could misread a shard."""

METADATA_FIELDS: tuple[pa.Field, ...] = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("latitude", pa.float64()),
    pa.field("longitude", pa.float64()),
    pa.field("date", pa.date32()),
    pa.field("product", pa.string(), nullable=False),
    pa.field("crs", pa.string()),
    pa.field("split", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("geometry", pa.binary()),
)
"""What every tile carries beside its layers: place in degrees (WGS 84), date of the Sentinel-2 scene, product, origin."""


@dataclass(frozen=True)
class TileBlock:
    """Tiles in memory, at most a row group of them, on their way into a shard.  n tiles; H = W = the tile's size.

    `layers[m.name]`: maps (n, bands, H, W), vectors (n, bands), labels (n,) with -1 for unknown; all in the stored dtype.
    `present[m.name]`: bool (n,), false where the layer is absent or not to be trusted.
    """

    id: list[str]
    latitude: np.ndarray
    longitude: np.ndarray
    date: list[date | None]
    product: list[str]
    crs: list[str | None]
    split: list[str]
    source: list[str]
    layers: dict[str, np.ndarray]
    present: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.id)


def column_type(modality: Modality, tile_size: int) -> pa.DataType:
    """Arrow type of one column of that modality."""
    if modality.level is Level.PIXEL:
        return pa.binary(tile_size * tile_size * np.dtype(modality.dtype).itemsize)
    return pa.from_numpy_dtype(np.dtype(modality.dtype))


def arrow_schema(tile_size: int, table: tuple[Modality, ...] = TABLE) -> pa.Schema:
    """Schema of a shard of `tile_size` x `tile_size` px tiles, with its version, the table's hash and GeoParquet metadata."""
    columns = list(METADATA_FIELDS)
    for modality in table:
        is_label = modality.level is Level.IMAGE and modality.kind is Kind.CATEGORICAL
        columns += [pa.field(name, column_type(modality, tile_size), nullable=is_label) for name in modality.columns]
        columns.append(pa.field(modality.present_column, pa.bool_(), nullable=False))
    # GeoParquet 1.1.0: one WKB point per row, in longitude/latitude (the default CRS, OGC:CRS84).
    geo = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Point"]}},
    }
    metadata = {
        "mmearth_ray.schema_version": str(SCHEMA_VERSION),
        "mmearth_ray.table_hash": table_hash(table),
        "mmearth_ray.tile_size": str(tile_size),
        "geo": json.dumps(geo),
    }
    return pa.schema(columns, metadata=metadata)


def to_record_batch(block: TileBlock, tile_size: int, table: tuple[Modality, ...] = TABLE) -> pa.RecordBatch:
    """The Arrow rows of a block.  Maps are copied once, band by band."""
    schema = arrow_schema(tile_size, table)
    given = {f.name: getattr(block, f.name) for f in fields(block)}
    arrays: list[pa.Array] = []
    for column in METADATA_FIELDS:
        values = wkb_points(block.longitude, block.latitude) if column.name == "geometry" else given[column.name]
        arrays.append(pa.array(values, type=column.type, from_pandas=True))
    for modality in table:
        layer = block.layers[modality.name]
        if layer.dtype != np.dtype(modality.dtype):
            raise ValueError(f"{modality.name} must be {modality.dtype}, got {layer.dtype}")
        arrays += [_column(layer, modality, band, tile_size) for band in range(len(modality.columns))]
        arrays.append(pa.array(block.present[modality.name], type=pa.bool_()))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _column(layer: np.ndarray, modality: Modality, band: int, tile_size: int) -> pa.Array:
    dtype = column_type(modality, tile_size)
    if modality.level is Level.PIXEL:
        values = np.ascontiguousarray(layer[:, band], dtype=np.dtype(modality.dtype).newbyteorder("<"))
        return pa.Array.from_buffers(dtype, len(layer), [None, pa.py_buffer(values)])
    if modality.kind is Kind.CATEGORICAL:
        return pa.array(layer, type=dtype, mask=layer < 0)
    return pa.array(np.ascontiguousarray(layer[:, band]), type=dtype)


def wkb_points(longitude: np.ndarray, latitude: np.ndarray) -> list[bytes | None]:
    """Well-known binary of each point (OGC 06-103r4, 8.2: byte order, type 1, x, y); None where the place is unknown."""
    points = np.zeros(len(longitude), dtype=[("order", "u1"), ("type", "<u4"), ("x", "<f8"), ("y", "<f8")])
    points["order"], points["type"], points["x"], points["y"] = 1, 1, longitude, latitude
    known = np.isfinite(longitude) & np.isfinite(latitude)
    return [point.tobytes() if ok else None for point, ok in zip(points, known, strict=True)]


def validity(layer: np.ndarray, modality: Modality) -> np.ndarray:
    """Where stored values are data, boolean and of the layer's shape: a known class, or a quantity that is not missing."""
    if modality.kind is Kind.CATEGORICAL:
        return np.asarray((layer if modality.level is Level.IMAGE else modality.label_table()[layer]) >= 0)
    return np.asarray(modality.valid(layer))


def has_value(layer: np.ndarray, modality: Modality) -> np.ndarray:
    """bool (n,): tiles with at least one valid value."""
    return np.asarray(validity(layer, modality).reshape(len(layer), -1).any(axis=1))
