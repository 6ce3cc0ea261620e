"""The metadata of all tiles in one file beside the shards, so that choosing tiles asks for no shard.

A row per tile, shard by shard in the manifest's order.  The manifest names the file and its digest; data sets of earlier
versions have none.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmearth_ray.errors import DataError, one_line
from mmearth_ray.files import complete_or_absent
from mmearth_ray.patience import PATIENCE, Absent, Patience, note
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.read import open_shard
from mmearth_ray.shards.schema import METADATA_FIELDS
from mmearth_ray.shards.write import MetadataRecord, ShardRecord
from mmearth_ray.storage import REQUESTS, Location, counted_stamp, read_bytes, read_ranges

METADATA = "metadata.parquet"
COLUMNS = ("id", "split", "product", "date", "latitude", "longitude", "source")
"""What tiles are chosen by."""

SCHEMA = pa.schema([field for name in COLUMNS for field in METADATA_FIELDS if field.name == name])


def write_metadata(directory: Location, shards: Sequence[ShardRecord]) -> MetadataRecord:
    """Gather the metadata of those shards in a file beside them.  Raises DataError if they cannot be read, or it written."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        tables = list(pool.map(lambda record: shard_metadata(directory / record.file), shards))
    with complete_or_absent(directory / METADATA) as temporary:
        pq.write_table(pa.concat_tables(tables).combine_chunks(), temporary, compression="zstd", write_page_checksum=True)
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
    return MetadataRecord(METADATA, size, digest)


def shard_metadata(path: Location) -> pa.Table:
    """The metadata of a shard's tiles, as `SCHEMA`.  Raises DataError if it is missing or damaged."""
    try:
        with open_shard(path, pre_buffer=True) as file:
            return file.read(columns=list(COLUMNS), use_threads=False).select(list(COLUMNS)).cast(SCHEMA)
    except DataError:
        raise
    except (OSError, LookupError, pa.ArrowException) as error:
        raise DataError(f"the metadata of {path} cannot be read ({one_line(error)})") from error


def read_metadata(manifest: Manifest, record: MetadataRecord, patience: Patience = PATIENCE) -> pa.Table:
    """The metadata of all tiles, as `SCHEMA`.  Raises DataError if the file is missing or not the one that was written."""
    path = manifest.directory / record.file
    try:
        data = _whole(path, record.bytes, patience)
    except Absent as error:
        raise DataError(f"{path} is missing; restore it, or build the data set again") from error
    if data is None or hashlib.sha256(data).hexdigest() != record.sha256:
        raise DataError(f"{path} is not the one that the manifest describes (its digest differs): it was replaced after the "
                        "data set was built; restore it, or build the data set again")  # fmt: skip
    table = pq.read_table(pa.BufferReader(data), use_threads=False).cast(SCHEMA)
    if table.num_rows != manifest.rows:
        raise DataError(f"{path} has {table.num_rows} rows, its manifest says {manifest.rows}; build the data set again")
    return table


def _whole(path: Location, size: int, patience: Patience) -> bytes | None:
    """All bytes of a file, or None if they are not as many.  Raises Absent and DataError."""
    if isinstance(path, Path):
        return read_bytes(path)
    now, faults = counted_stamp(path, patience)
    note(faults)
    if now.size != size:
        return None
    (data,), faults = read_ranges(path, [(0, size)], patience)
    note(faults)
    return data
