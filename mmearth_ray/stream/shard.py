"""The bytes of a row group: of a local file or of an object in a store, only the used column chunks.

A shard's footer is read once per process, then exactly the chunks that are used (Parquet format, "Column chunks"),
neighbouring ones together.  Whether a shard still is the one its manifest describes is checked whenever it is opened, and in a
store whenever its bytes are asked for.
"""

import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import SEEK_CUR, SEEK_END
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from mmearth_ray.errors import DataError
from mmearth_ray.shards.write import CONTENT, TAIL, ShardRecord
from mmearth_ray.storage import Absent, Location, Patience, Stamp, counted_stamp, merged, read_ranges
from mmearth_ray.stream import arrays
from mmearth_ray.stream.cache import Cache

OPEN_SHARDS = 64
"""Shards whose footers a process remembers; a parsed footer takes some 200 KB."""

GAP = 4096
"""Unused bytes between two chunks that cost less to read than another request."""

FOOTER = 1 << 17
"""Bytes read from the end of a shard whose manifest does not tell the footer's length."""


@dataclass(frozen=True)
class Shard:
    """A file of a data set, with what its manifest says of it: bytes, and the digest of its rows ("" if it has none)."""

    place: Location
    bytes: int
    content: str
    footer: int

    @staticmethod
    def of(folder: Location, record: ShardRecord) -> "Shard":
        return Shard(folder / record.file, record.bytes, record.content, record.footer)


@dataclass(frozen=True)
class Reading:
    """How shards are read: the patience with a store, and where its bytes are kept."""

    patience: Patience = Patience()
    cache: Cache | None = None


LOCAL = Reading()


@dataclass(frozen=True, eq=False)
class Footer:
    """A shard's metadata and, of a local one, the open file, which stays the one that was opened whatever takes its name."""

    metadata: pq.FileMetaData
    size: int
    stamp: Stamp
    file: BinaryIO | None

    @cached_property
    def places(self) -> dict[str, int]:
        """The number of each column."""
        return {self.metadata.schema.column(i).path: i for i in range(self.metadata.num_columns)}

    @cached_property
    def types(self) -> dict[str, pa.DataType]:
        """The type of each column."""
        schema = self.metadata.schema.to_arrow_schema()
        return dict(zip(schema.names, schema.types, strict=True))

    def chunk(self, group: int, column: str) -> "Chunk":
        """Where a column chunk is.  Raises LookupError if the shard has no such group or column."""
        if not 0 <= group < self.metadata.num_row_groups:
            raise LookupError(f"it has {self.metadata.num_row_groups} row groups")
        if column not in self.places:
            raise LookupError(f"it has no column {column}")
        found = self.metadata.row_group(group).column(self.places[column])
        start = min(found.data_page_offset, found.dictionary_page_offset or found.data_page_offset)
        return Chunk(start, start + found.total_compressed_size, found.compression)


class Chunk(NamedTuple):
    """Bytes start..stop-1 of a file, and their compression as the footer names it."""

    start: int
    stop: int
    compression: str


class Fetched(NamedTuple):
    """Column chunks in memory, and how many requests to a store had failed before they came."""

    footer: Footer
    chunks: dict[tuple[int, str], Chunk]
    held: "Held"
    faults: int

    def chunk(self, group: int, column: str) -> tuple[memoryview, str]:
        """The bytes of a column chunk, and their compression."""
        start, stop, compression = self.chunks[group, column]
        return self.held.part(start, stop), compression

    def file(self) -> pq.ParquetFile:
        """A Parquet file of what was fetched; other parts of it cannot be read."""
        held = pa.PythonFile(self.held, mode="r")
        return pq.ParquetFile(held, metadata=self.footer.metadata, pre_buffer=False, page_checksum_verification=True)


def _chunks(footer: Footer, groups: Sequence[int], columns: Sequence[str]) -> dict[tuple[int, str], Chunk]:
    return {(group, name): footer.chunk(group, name) for group in groups for name in columns}


def _spans(chunks: dict[tuple[int, str], Chunk]) -> list[tuple[int, int]]:
    """The bytes of those chunks, neighbouring ones joined, in order."""
    return merged(((chunk.start, chunk.stop) for chunk in chunks.values()), GAP)


def fetch(shard: Shard, groups: Sequence[int], columns: Sequence[str], reading: Reading = LOCAL) -> Fetched:
    """Those columns' chunks of those row groups.

    Raises DataError if the shard is missing, is not the one that the manifest describes, or the store does not answer;
    LookupError if it has no such row group or column.
    """
    try:
        if isinstance(shard.place, Path):
            return _local(shard, shard.place, groups, columns)
        return _remote(shard, shard.place, groups, columns, reading)
    except (Absent, FileNotFoundError) as error:
        raise DataError(f"the shard {shard.place} is missing; restore it, or build the data set again") from error
    except PermissionError as error:
        raise DataError(f"the shard {shard.place} cannot be read (permission denied); change its permissions") from error
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the shard {shard.place} is damaged ({reason}); `shards verify` tells more") from error


_footers: dict[Shard, Footer] = {}  # of this process, the longest unused first
_lock = threading.Lock()


def _remember(shard: Shard, footer: Footer) -> Footer:
    with _lock:
        _footers.pop(shard, None)
        while len(_footers) >= OPEN_SHARDS:
            _footers.pop(next(iter(_footers)))
        _footers[shard] = footer
    return footer


def _local(shard: Shard, path: Path, groups: Sequence[int], columns: Sequence[str]) -> Fetched:
    footer = _footers.get(shard)
    if footer is None or footer.file is None or footer.stamp != _local_stamp(footer.file):
        file = path.open("rb", buffering=0)
        now = _local_stamp(file)
        size = now.size
        tail = _pread(file, max(0, size - (shard.footer or FOOTER)), size)
        if (needed := _footer_length(tail)) > len(tail):
            tail = _pread(file, max(0, size - needed), size)
        footer = Footer(_parsed(tail), size, now, file)
        weakref.finalize(footer, file.close)  # once no thread reads from it any more
        _require_same(shard, footer)
    _remember(shard, footer)
    chunks = _chunks(footer, groups, columns)
    spans = _spans(chunks)
    parts = [_pread(footer.file, *span) for span in spans]
    return Fetched(footer, chunks, Held(footer.size, spans, parts), 0)


def _local_stamp(file: BinaryIO) -> Stamp:
    """The stamp of an open file, which changes when it is written to in place."""
    status = os.fstat(file.fileno())
    return Stamp(status.st_size, str(status.st_mtime_ns))


def _pread(file: BinaryIO | None, start: int, stop: int) -> memoryview:
    """Bytes start..stop-1 of a file.  Raises OSError if it is shorter."""
    assert file is not None
    buffer = arrays.empty((stop - start,), np.uint8).data
    done = 0
    while done < len(buffer):
        count = os.preadv(file.fileno(), [buffer[done:]], start + done)
        if count == 0:
            raise OSError(f"it ends {len(buffer) - done} bytes too early")
        done += count
    return buffer


def _require_same(shard: Shard, footer: Footer) -> None:
    found = (footer.metadata.metadata or {}).get(CONTENT.encode(), b"").decode()
    if footer.size != shard.bytes or (shard.content and found != shard.content):
        raise DataError(f"the shard {shard.place} is not the one that the manifest describes (its digest differs): it was "
                        "replaced after the data set was built; restore it, or build the data set again")  # fmt: skip


def _remote(shard: Shard, place: UPath, groups: Sequence[int], columns: Sequence[str], reading: Reading) -> Fetched:
    footer, faults = _remote_footer(shard, place, reading)
    chunks = _chunks(footer, groups, columns)
    spans = _spans(chunks)
    cache = reading.cache if shard.content else None
    kept = cache.get(shard.content, *spans) if cache else None
    if kept is None or len(kept) != sum(stop - start for start, stop in spans):
        now, failed = counted_stamp(place, reading.patience)
        faults += failed
        if now != footer.stamp:
            footer, more = _remote_footer(shard, place, reading, afresh=True)
            chunks, faults = _chunks(footer, groups, columns), faults + more
            spans = _spans(chunks)
        parts, more = read_ranges(place, spans, reading.patience)
        if cache:
            cache.put(b"".join(parts), shard.content, *spans)
        return Fetched(footer, chunks, Held(footer.size, spans, [memoryview(part) for part in parts]), faults + more)
    ends = np.cumsum([stop - start for start, stop in spans]).tolist()
    parts = [memoryview(kept)[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return Fetched(footer, chunks, Held(footer.size, spans, parts), faults)


def _remote_footer(shard: Shard, place: UPath, reading: Reading, *, afresh: bool = False) -> tuple[Footer, int]:
    """The shard's footer, remembered, cached or from the store, and how many requests failed before it came."""
    known = None if afresh else _footers.get(shard)
    if known:
        return _remember(shard, known), 0
    cache = reading.cache if shard.content else None
    kept = cache.get(shard.content, "footer") if cache and not afresh else None
    if kept:
        tag, _, tail = kept.partition(b"\n")
        return _remember(shard, Footer(_parsed(tail), shard.bytes, Stamp(shard.bytes, tag.decode()), None)), 0
    now, faults = counted_stamp(place, reading.patience)
    (tail,), more = read_ranges(place, [(max(0, now.size - (shard.footer or FOOTER)), now.size)], reading.patience)
    faults += more
    if (needed := _footer_length(tail)) > len(tail):
        (tail,), more = read_ranges(place, [(max(0, now.size - needed), now.size)], reading.patience)
        faults += more
    footer = Footer(_parsed(tail), now.size, now, None)
    _require_same(shard, footer)
    if cache:
        cache.put(now.tag.encode() + b"\n" + tail, shard.content, "footer")
    return _remember(shard, footer), faults


def _footer_length(tail: bytes | memoryview) -> int:
    """Bytes of the footer and what follows it, as the end of a Parquet file tells; 0 for other files."""
    return int.from_bytes(tail[-TAIL:-4], "little") + TAIL if bytes(tail[-4:]) == b"PAR1" else 0


def _parsed(tail: bytes | memoryview) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(tail))


class Held:
    """A file of which some ranges are held in memory, for a Parquet reader that asks for nothing else."""

    def __init__(self, size: int, spans: Sequence[tuple[int, int]], parts: Sequence[memoryview]) -> None:
        self.size, self.spans, self.parts = size, spans, parts
        self.position, self.closed = 0, False

    def part(self, start: int, stop: int) -> memoryview:
        """Bytes start..stop-1.  Raises OSError if they are not held."""
        for (first, last), part in zip(self.spans, self.parts, strict=True):
            if first <= start and stop <= last:
                return part[start - first : stop - first]
        raise OSError(f"bytes {start} to {stop} were not read")

    def read(self, length: int = -1) -> memoryview:
        start = self.position
        self.position = self.size if length < 0 else min(self.size, start + length)
        return self.part(start, self.position)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {SEEK_CUR: self.position, SEEK_END: self.size}.get(whence, 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
