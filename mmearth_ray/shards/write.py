"""Writing one shard: blocks of tiles become row groups of a Parquet file that appears under its name only when complete."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mmearth_ray.files import complete_or_absent
from mmearth_ray.modalities import PRODUCTS, TABLE, Level, Modality
from mmearth_ray.shards.schema import METADATA_FIELDS, TileBlock, arrow_schema, to_record_batch, validity
from mmearth_ray.shards.stats import ALL, Moments, MomentTable, block_moments, merge_tables
from mmearth_ray.storage import Location

TRAINING_SPLIT = "train"
COMPRESSIONS = ("zstd", "lz4", "none")

CONTENT = "mmearth_ray.content"
"""Key of the footer's metadata that holds the digest of the rows."""

TAIL = 8
"""Bytes at the very end of a Parquet file: the footer's length (4 bytes, little-endian) and "PAR1" (Parquet format, "File
format")."""


@dataclass(frozen=True)
class ShardRecord:
    """What a manifest says of one shard.

    `valid[variant][column]`: valid values over all splits (the variant is the product, or "all").
    `present[modality]`: tiles that have the layer.  `moments[variant][column]`: over the training split only.
    `content`: digest of the rows, which the footer repeats, so that whoever opens the file knows it for this one; `footer`: its
    length in bytes.  Shards of earlier versions have neither.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    row_groups: list[int]
    splits: dict[str, int]
    products: dict[str, int]
    dates: list[str | None]
    present: dict[str, int]
    valid: dict[str, dict[str, int]]
    moments: dict[str, dict[str, list[float]]]
    content: str = ""
    footer: int = 0

    def to_json(self) -> dict[str, Any]:
        """What the manifest holds; without what shards of earlier versions lack, so that their manifests' digests stay."""
        return {name: value for name, value in asdict(self).items() if name not in ("content", "footer") or value}

    def moment_table(self) -> MomentTable:
        return {
            variant: {column: Moments(int(v[0]), *v[1:]) if v[0] else Moments() for column, v in columns.items()}
            for variant, columns in self.moments.items()
        }


@dataclass(frozen=True)
class MetadataRecord:
    """What a manifest says of the file that holds the metadata of all tiles."""

    file: str
    bytes: int
    sha256: str


def write_shard(
    path: Location,
    blocks: Iterable[TileBlock],
    tile_size: int,
    compression: str = "zstd",
    table: tuple[Modality, ...] = TABLE,
) -> ShardRecord:
    """Write the blocks, one row group each, and describe the shard.  Raises DataError if the disk or store does not take it."""
    tally = _Tally(table)
    with complete_or_absent(path) as temporary:
        content = hashlib.blake2b(digest_size=16)
        with pq.ParquetWriter(temporary, arrow_schema(tile_size, table), **_parquet_options(compression, table)) as writer:
            for block in blocks:
                tally.add(block)
                rows = to_record_batch(block, tile_size, table)
                for column in rows.columns:
                    for buffer in filter(None, column.buffers()):
                        content.update(buffer)
                writer.write_batch(rows, row_group_size=len(block))
            writer.add_key_value_metadata({CONTENT: content.hexdigest()})
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(-TAIL, os.SEEK_END)
            footer = int.from_bytes(file.read(4), "little") + TAIL
        size = temporary.stat().st_size
    return tally.record(path.name, size, digest, content.hexdigest(), footer)


def _parquet_options(compression: str, table: tuple[Modality, ...]) -> dict[str, Any]:
    scalars = [f.name for f in METADATA_FIELDS if f.name != "geometry"]
    scalars += [column for m in table if m.level is Level.IMAGE for column in m.columns]
    return {
        "compression": compression,
        "use_dictionary": False,
        "data_page_size": 1 << 28,  # a chunk is one page, so that a reader makes one array of it
        "write_statistics": scalars,  # the minimum and maximum of a map would store two whole maps per row group
        "write_page_checksum": True,  # a reader notices a flipped byte by itself
        "store_schema": True,
    }


class _Tally:
    """Counts what goes into a shard while it is written."""

    def __init__(self, table: tuple[Modality, ...]) -> None:
        self.table = table
        self.row_groups: list[int] = []
        self.splits: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.present: Counter[str] = Counter()
        self.valid: dict[str, Counter[str]] = {}
        self.moments: MomentTable = {}
        self.dates: list[str] = []

    def add(self, block: TileBlock) -> None:
        self.row_groups.append(len(block))
        self.splits.update(block.split)
        self.products.update(block.product)
        self.dates += [day.isoformat() for day in block.date if day]
        self.dates = [min(self.dates), max(self.dates)] if self.dates else []
        for m in self.table:
            self.present[m.name] += int(block.present[m.name].sum())
        for variant, columns in tally_valid(block, self.table).items():
            self.valid.setdefault(variant, Counter()).update(columns)
        self.moments = merge_tables([self.moments, block_moments(block, TRAINING_SPLIT, self.table)])

    def record(self, file: str, size: int, digest: str, content: str, footer: int) -> ShardRecord:
        moments: dict[str, dict[str, list[float]]] = {
            variant: {column: [x.count, x.mean, x.m2, x.low, x.high] if x.count else [0] for column, x in columns.items()}
            for variant, columns in self.moments.items()
        }
        return ShardRecord(
            file=file, rows=sum(self.row_groups), bytes=size, sha256=digest, row_groups=self.row_groups,
            splits=dict(self.splits), products=dict(self.products), dates=list(self.dates) or [None, None],
            present=dict(self.present), valid={v: dict(c) for v, c in self.valid.items()}, moments=moments,
            content=content, footer=footer,
        )  # fmt: skip


def tally_valid(block: TileBlock, table: tuple[Modality, ...] = TABLE) -> dict[str, dict[str, int]]:
    """{variant: {column: valid values}} of the block's tiles, over all splits; absent layers do not count."""
    products = np.array(block.product)
    valid: dict[str, dict[str, int]] = {}
    for m in table:
        present = block.present[m.name]
        for variant in PRODUCTS if m.by_product else (ALL,):
            rows = present & (products == variant) if m.by_product else present
            valid.setdefault(variant, {}).update(count_valid(block.layers[m.name][rows], m))
    return valid


def count_valid(layer: np.ndarray, modality: Modality) -> dict[str, int]:
    """Valid values per column of the tiles given: maps (n, bands, H, W), vectors (n, bands) or labels (n,)."""
    valid = validity(layer, modality)
    if valid.ndim == 1:  # labels: one column
        valid = valid[:, None]
    return {column: int(valid[:, band].sum()) for band, column in enumerate(modality.columns)}
