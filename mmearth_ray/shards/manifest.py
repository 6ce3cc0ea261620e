"""The manifest: what a data set consists of, so that everything else can trust it without opening a shard.

`manifest.json` is written last and atomically: a directory of shards without one is not a data set yet.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmearth_ray.errors import DataError
from mmearth_ray.files import atomic_text
from mmearth_ray.modalities import TABLE, Modality, table_hash
from mmearth_ray.patience import Absent
from mmearth_ray.shards.schema import SCHEMA_VERSION
from mmearth_ray.shards.stats import merge_tables, statistics_of
from mmearth_ray.shards.write import MetadataRecord, ShardRecord
from mmearth_ray.storage import Location, read_bytes

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """A data set: its shards, its statistics, and where it came from.

    `name` tells the samples of one data set from another's in everything random.  `statistics` are computed over the
    training split; `release_statistics` are those published with a release (null where there was none).  `metadata`: the file
    that holds the metadata of all tiles, which data sets of earlier versions lack.
    """

    directory: Location
    name: str
    tile_size: int
    shards: tuple[ShardRecord, ...]
    origin: dict[str, Any]
    release_statistics: dict[str, Any] | None = None
    metadata: MetadataRecord | None = None
    table: tuple[Modality, ...] = field(default=TABLE, repr=False)

    @cached_property
    def statistics(self) -> dict[str, Any]:
        return joint_statistics([self])

    @cached_property
    def valid(self) -> dict[str, dict[str, int]]:
        """{variant: {column: valid values}} over all shards and splits."""
        return _total(shard.valid for shard in self.shards)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        body = {
            "schema_version": SCHEMA_VERSION,
            "table_hash": table_hash(self.table),
            "name": self.name,
            "tile_size": self.tile_size,
            "rows": self.rows,
            "origin": self.origin,
            "statistics": self.statistics,
            "release_statistics": self.release_statistics,
            "shards": [shard.to_json() for shard in self.shards],
        }
        if self.metadata:
            body["metadata"] = asdict(self.metadata)
        return {"digest": digest_of(body), **body}

    @cached_property
    def digest(self) -> str:
        return self.to_json()["digest"]

    def save(self) -> None:
        atomic_text(self.directory / MANIFEST, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


def joint_statistics(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The statistics over the training split of those data sets together."""
    tables = (shard.moment_table() for manifest in manifests for shard in manifest.shards)
    return statistics_of(merge_tables(tables), manifests[0].table)


def training_counts(manifests: Sequence[Manifest]) -> dict[str, dict[str, int]]:
    """{variant: {column: valid training values}} of continuous bands: how many values their statistics are made of."""
    tables = (shard.moment_table() for manifest in manifests for shard in manifest.shards)
    return _total({v: {name: m.count for name, m in columns.items()} for v, columns in table.items()} for table in tables)


def _total(counts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """The counts of {variant: {column: count}} added up."""
    total: dict[str, dict[str, int]] = {}
    for variant, columns in (pair for table in counts for pair in table.items()):
        mine = total.setdefault(variant, {})
        for column, count in columns.items():
            mine[column] = mine.get(column, 0) + count
    return total


def digest_of(body: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything but the digest itself."""
    text = json.dumps({k: v for k, v in body.items() if k != "digest"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def load_manifest(directory: Location, table: tuple[Modality, ...] = TABLE) -> Manifest:
    """Read and check the manifest of a data set.

    Raises DataError if it is absent, damaged, of another schema version or of another table of modalities.
    """
    path = directory / MANIFEST
    try:
        text = read_bytes(path)
    except Absent as error:
        raise DataError(_why_absent(directory, error)) from error
    try:
        body = json.loads(text.decode())
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}); restore it, or build the data set again") from error
    if not isinstance(body, dict):
        raise DataError(f"{path} is no manifest; restore it, or build the data set again")
    version = body.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(f"{directory} has schema version {version}, this program reads {SCHEMA_VERSION}; build it again")
    if digest_of(body) != body.get("digest"):
        raise DataError(f"{path} was altered after it was written (its digest does not match); build the data set again")
    if body["table_hash"] != table_hash(table):
        raise DataError(f"{directory} was written with another table of modalities; build the data set again")
    return Manifest(
        directory=directory,
        name=body["name"],
        tile_size=body["tile_size"],
        shards=tuple(ShardRecord(**shard) for shard in body["shards"]),
        origin=body["origin"],
        release_statistics=body["release_statistics"],
        metadata=MetadataRecord(**body["metadata"]) if "metadata" in body else None,
        table=table,
    )


def _why_absent(directory: Location, error: Absent) -> str:
    if not isinstance(directory, Path):
        return f"{error}, so {directory} is no data set; name the prefix that `shards convert` wrote to"
    if not directory.is_dir():
        return (f"there is no data set at {directory}; make one with `python -m mmearth_ray.shards convert RELEASE "
                f"{directory}`, or a synthetic one with `python -m mmearth_ray.shards synthesise {directory}`")  # fmt: skip
    if (directory / ".building").is_dir():
        return f"{directory} is unfinished; run the command that was making it again, it continues where it stopped"
    return f"{directory} has no {MANIFEST}, so it is no data set; name the directory that `shards convert` wrote"
