"""Where the column chunks of a shard are: what the stream needs of a footer, small enough to keep for thousands of shards.

A parsed footer takes some 200 KB of memory.  An index takes 4 bytes for each column of each row group: 45 MB in each process
that reads all of 10,000 shards with 15 row groups of 74 columns, about as many as MMEarth has at 128 px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmearth_ray.shards.write import TAIL
from mmearth_ray.storage import Stamp

GAP = 4096
"""Unused bytes between two chunks that cost less to read than another request."""


class Places(NamedTuple):
    """Where chunks lie in what is read: chunk i in bytes begin[i]..end[i]-1 of the span of number span[i].

    They are in the order of row groups and, within one, of columns, whose `numbers` these are.
    """

    numbers: dict[str, int]
    span: list[int]
    begin: list[int]
    end: list[int]


@dataclass(frozen=True, eq=False)
class Columns:
    """Each column's number in the file and its type.  Shards of one table share them."""

    numbers: dict[str, int]
    types: dict[str, pa.DataType]


@dataclass(frozen=True, eq=False, slots=True)
class Index:
    """Where the column chunks of a shard are, and what the file was like when that was read.

    `rows` (groups,): rows of each row group, which begins at `starts` (groups,).  Its chunks lie one after the other:
    `edges` (groups, columns + 1) tell, from there, where each begins and the last one ends.
    """

    stamp: Stamp
    columns: Columns
    compression: str
    rows: np.ndarray
    starts: np.ndarray
    edges: np.ndarray

    @staticmethod
    def of(footer: pq.FileMetaData, stamp: Stamp) -> "Index":
        """Raises OSError for chunks that lie as this project's writer would not have put them."""
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(footer.num_columns)]
        compressions = {chunk.compression for chunk in chunks}
        begins = [min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in chunks]
        lengths = [chunk.total_compressed_size for chunk in chunks]
        begins, lengths = np.array([begins, lengths], np.int64).reshape(2, len(groups), footer.num_columns)
        starts = begins[:, 0].copy()
        edges = np.zeros((len(groups), footer.num_columns + 1), np.int64)
        np.cumsum(lengths, axis=1, out=edges[:, 1:])
        if len(compressions) > 1 or (begins - starts[:, None] != edges[:, :-1]).any():
            raise OSError("its column chunks are not compressed alike, or do not lie one after the other")
        schema = footer.schema.to_arrow_schema()
        return Index(
            stamp, _shared(tuple(schema.names), tuple(schema.types)), "".join(compressions),
            np.array([group.num_rows for group in groups], np.int32), starts,
            edges if edges.max(initial=0) >> 32 else edges.astype(np.uint32),
        )  # fmt: skip

    def find(self, groups: Sequence[int], columns: Sequence[str]) -> tuple[list[tuple[int, int]], Places]:
        """The spans of bytes to read for those columns of those row groups, neighbouring chunks together, and their places.

        At least one of each.  Raises LookupError if there is no such row group or column.
        """
        if not all(0 <= group < len(self.rows) for group in groups):
            raise LookupError(f"it has {len(self.rows)} row groups")
        pairs, numbers = _pairs(self.columns, tuple(columns))
        edges = np.concatenate([self.edges[group][pairs] + self.starts[group] for group in groups])
        begin, end = edges[edges[:, 0].argsort()].T
        cut = np.ones(len(edges) + 1, bool)  # before and after each chunk, whether another span begins there
        cut[1:-1] = begin[1:] - end[:-1] > GAP
        first, last = begin[cut[:-1]], end[cut[1:]]
        span = first.searchsorted(edges[:, 0], "right") - 1
        inside = (edges - first[span, None]).T.tolist()
        return list(zip(first.tolist(), last.tolist(), strict=True)), Places(numbers, span.tolist(), *inside)


@lru_cache(maxsize=64)
def _shared(names: tuple[str, ...], types: tuple[pa.DataType, ...]) -> Columns:
    return Columns({name: number for number, name in enumerate(names)}, dict(zip(names, types, strict=True)))


@lru_cache(maxsize=64)
def _pairs(columns: Columns, names: tuple[str, ...]) -> tuple[np.ndarray, dict[str, int]]:
    """(names, 2) which edges each of those columns lies between, and the number of each among them."""
    for name in names:
        if name not in columns.numbers:
            raise LookupError(f"it has no column {name}")
    first = np.array([columns.numbers[name] for name in names])
    return np.stack([first, first + 1], axis=1), {name: number for number, name in enumerate(names)}


def footer_length(tail: bytes | memoryview) -> int:
    """Bytes of the footer and what follows it, as the end of a Parquet file tells; 0 for other files."""
    return int.from_bytes(tail[-TAIL:-4], "little") + TAIL if bytes(tail[-4:]) == b"PAR1" else 0


def parsed(tail: bytes | memoryview) -> pq.FileMetaData:
    """The metadata at the end of a Parquet file.  Raises ArrowException if that is something else."""
    return pq.read_metadata(pa.BufferReader(tail))
