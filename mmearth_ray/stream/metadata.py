"""The metadata of a data set's tiles, which `where` asks about."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from mmearth_ray.errors import DataError, one_line
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.metadata import COLUMNS, SCHEMA, read_metadata
from mmearth_ray.shards.write import ShardRecord
from mmearth_ray.storage import is_remote, sizes
from mmearth_ray.stream.shard import LOCAL, Reading, Shard, fetch, fetch_file

AT_ONCE = 16
"""Shards of a store whose metadata is asked for at once."""


@dataclass(frozen=True, eq=False)
class Metadata:
    """A data set with the metadata of its tiles: read when first needed, and then there for all that choose among them."""

    manifest: Manifest
    reading: Reading = LOCAL

    @cached_property
    def table(self) -> pa.Table:
        """A row per tile (`SCHEMA`), shard by shard: from the file that the manifest names, or else from the shards.

        Raises DataError if that is missing or damaged, or if a shard is that lies on a disk.
        """
        manifest, reading = self.manifest, self.reading
        if manifest.metadata:
            if not is_remote(manifest.directory):
                _require_shards(manifest)
            return read_metadata(manifest, manifest.metadata, reading.patience)
        with ThreadPoolExecutor(AT_ONCE if is_remote(manifest.directory) else 1, "metadata") as pool:
            tables = pool.map(lambda record: _of_shard(manifest, record, reading), manifest.shards)
            return pa.concat_tables([SCHEMA.empty_table(), *tables])


def _require_shards(manifest: Manifest) -> None:
    """Raise DataError for the first shard that is missing or of another size."""
    held = sizes(manifest.directory)
    for record in manifest.shards:
        if held.get(record.file) != record.bytes:
            fetch(Shard.of(manifest.directory, record), [0], ["id"])  # says what is wrong with it


def _of_shard(manifest: Manifest, record: ShardRecord, reading: Reading) -> pa.Table:
    shard = Shard.of(manifest.directory, record)
    try:
        file = fetch_file(shard, range(len(record.row_groups)), COLUMNS, reading)
        if file.metadata.num_rows != record.rows:
            raise DataError(f"the shard {shard.place} has {file.metadata.num_rows} rows, its manifest says {record.rows}; "
                            "build the data set again")  # fmt: skip
        return file.read(columns=list(COLUMNS), use_threads=False).select(list(COLUMNS)).cast(SCHEMA)
    except (OSError, LookupError, pa.ArrowException) as error:
        raise DataError(f"the shard {shard.place} is damaged ({one_line(error)}); `shards verify` tells more") from error
