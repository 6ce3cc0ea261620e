"""Stretches of features on disk: a Parquet file each, which says what it holds and is whole or absent.

    id         of every image
    features   its little-endian numbers, of fixed length

Shapes: n images of a part, D features, h x w cells.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmearth_ray.errors import DataError, one_line
from mmearth_ray.files import complete_or_absent

FORM = 1
KEY = b"mmearth_ray.features"
ROW_GROUP = 16
"""Images of a row group, as in a data set: so many are read to give one, which matters for maps."""


@dataclass(frozen=True)
class PartKey:
    """What decides the numbers of a part: whose features of which images, and how those were fed; digests of each."""

    encoder: str
    task: str
    feed: str
    start: int
    stop: int
    dtype: str


@dataclass(frozen=True)
class Computed:
    """How a part came about.  `shape`: of one image's features; `seconds` on `clock`, "cpu" or "gpu"."""

    shape: tuple[int, ...]
    images: int
    seconds: float
    clock: str
    threads: int
    device: str
    versions: str


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def write_part(path: Path, key: PartKey, computed: Computed, ids: np.ndarray, values: np.ndarray) -> None:
    """Write the features of images, whole or not at all.  Raises DataError if the disk does not take it."""
    stored = np.ascontiguousarray(values, np.dtype(key.dtype).newbyteorder("<")).reshape(len(values), -1)
    kind = pa.binary(stored.shape[1] * stored.itemsize)
    said = json.dumps({"form": FORM, "key": asdict(key), "computed": asdict(computed)})
    schema = pa.schema([("id", pa.string()), ("features", kind)], metadata={KEY: said.encode()})
    numbers = pa.Array.from_buffers(kind, len(stored), [None, pa.py_buffer(stored)])
    table = pa.Table.from_arrays([pa.array(ids.tolist(), pa.string()), numbers], schema=schema)
    with complete_or_absent(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP, use_dictionary=False, compression="none",
                       write_statistics=False, write_page_checksum=True)  # fmt: skip


def read_part(path: Path, key: PartKey, ids: np.ndarray, *, whole: bool) -> tuple[Computed, np.ndarray | None] | None:
    """How a part came about and, if asked for the `whole`, its features (n, ...); None unless it is just that part, undamaged.

    Of what is not read as a whole, pages of features are checked when they are read.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            said = json.loads((file.schema_arrow.metadata or {}).get(KEY, b"{}"))
            if said.get("form") != FORM or said.get("key") != asdict(key):
                return None
            computed = _computed(said["computed"])
            table = file.read(columns=["id", "features"] if whole else ["id"], use_threads=False)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError):
        return None
    if table.column("id").to_pylist() != ids.tolist():
        return None
    values = _numbers(table.column("features"), key.dtype, computed.shape) if whole else None
    return (computed, values) if values is None or np.isfinite(values).all() else None


def read_rows(path: Path, rows: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Features (n, *shape) of images of a part, in the order asked for.  Raises DataError where it is damaged or gone."""
    groups, places = np.unique(rows // ROW_GROUP, return_inverse=True)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read_row_groups(groups.tolist(), columns=["features"], use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}); remove it and run the command again") from error
    return _numbers(table.column("features"), dtype, shape)[places * ROW_GROUP + rows % ROW_GROUP]


def _computed(said: dict[str, Any]) -> Computed:
    return Computed(**{**said, "shape": tuple(said["shape"])})


def _numbers(column: pa.ChunkedArray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Fixed-size bytes as numbers (n, *shape)."""
    stored, width = np.dtype(dtype).newbyteorder("<"), int(np.prod(shape))
    parts = [np.frombuffer(chunk.buffers()[1], stored, len(chunk) * width, chunk.offset * width * stored.itemsize)
             for chunk in column.chunks]  # fmt: skip
    return np.concatenate([*parts, np.empty(0, stored)]).reshape(-1, *shape).astype(dtype)
