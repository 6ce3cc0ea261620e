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
from io import SEEK_CUR, SEEK_END
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from mmearth_ray.errors import DataError, one_line
from mmearth_ray.patience import note
from mmearth_ray.shards.write import CONTENT, ShardRecord
from mmearth_ray.storage import Absent, Location, Patience, Stamp, counted_stamp, read_ranges
from mmearth_ray.stream import arrays
from mmearth_ray.stream.cache import Cache
from mmearth_ray.stream.footer import Index, Places, footer_length, parsed

OPEN_FILES = 64
"""Local shards that a process keeps open, of the 1,024 files that it may have by default (ulimit -n)."""

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


class Fetched(NamedTuple):
    """Column chunks of some row groups in memory; `faults`: how many requests to a store had failed before they came.

    `footer`: the whole of it, where it was not known from before.
    """

    chunks: Index
    groups: list[int]
    spans: list[tuple[int, int]]
    places: Places
    parts: list[memoryview]
    faults: int
    footer: pq.FileMetaData | None

    def rows(self, group: int) -> int:
        """Rows of a row group."""
        return int(self.chunks.rows[group])

    @property
    def types(self) -> dict[str, pa.DataType]:
        """The type of each column of the shard; the same object for all shards of a table."""
        return self.chunks.columns.types

    def chunk(self, group: int, column: str) -> tuple[memoryview, str]:
        """The bytes of a column chunk, and their compression as the footer names it."""
        numbers, span, begin, end = self.places
        i = self.groups.index(group) * len(numbers) + numbers[column]
        return self.parts[span[i]][begin[i] : end[i]], self.chunks.compression


def fetch(shard: Shard, groups: Sequence[int], columns: Sequence[str], reading: Reading = LOCAL) -> Fetched:
    """Those columns' chunks of those row groups.

    Raises DataError if the shard is missing, is not the one that the manifest describes, or the store does not answer;
    LookupError if it has no such row group or column.
    """
    return _fetch(shard, groups, columns, reading, _indices)


def fetch_file(shard: Shard, groups: Sequence[int], columns: Sequence[str], reading: Reading = LOCAL) -> pq.ParquetFile:
    """The same as a Parquet file, of which nothing else can be read; where its chunks are is not remembered."""
    found = _fetch(shard, groups, columns, reading, {})
    note(found.faults)
    held = pa.PythonFile(Held(found.chunks.stamp.size, found.spans, found.parts), mode="r")
    return pq.ParquetFile(held, metadata=found.footer, pre_buffer=False, page_checksum_verification=True)


Indices = dict[Shard, Index]

_indices: Indices = {}
_files: dict[Shard, "OpenFile"] = {}  # the longest unused first
_lock = threading.Lock()


def _fetch(shard: Shard, groups: Sequence[int], columns: Sequence[str], reading: Reading, known: Indices) -> Fetched:
    try:
        if isinstance(shard.place, Path):
            return _local(shard, shard.place, groups, columns, known)
        return _remote(shard, shard.place, groups, columns, reading, known)
    except (Absent, FileNotFoundError) as error:
        raise DataError(f"the shard {shard.place} is missing; restore it, or build the data set again") from error
    except PermissionError as error:
        raise DataError(f"the shard {shard.place} cannot be read (permission denied); change its permissions") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"the shard {shard.place} is damaged ({one_line(error)}); `shards verify` tells more") from error


def _index(shard: Shard, footer: pq.FileMetaData, stamp: Stamp, known: Indices) -> Index:
    known[shard] = index = Index.of(footer, stamp)
    return index


def _require_same(shard: Shard, footer: pq.FileMetaData, size: int) -> None:
    found = (footer.metadata or {}).get(CONTENT.encode(), b"").decode()
    if size != shard.bytes or (shard.content and found != shard.content):
        raise DataError(f"the shard {shard.place} is not the one that the manifest describes (its digest differs): it was "
                        "replaced after the data set was built; restore it, or build the data set again")  # fmt: skip


# ---- of a local file ----


class OpenFile:
    """A file that is open as long as someone holds this, and stays the one that was opened whatever takes its name."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.number)

    def stamp(self) -> Stamp:
        """What changes when the file is written to in place, and is another in every other file."""
        status = os.fstat(self.number)
        return Stamp(status.st_size, f"{status.st_ino}.{status.st_mtime_ns}")

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes start..stop-1.  Raises OSError if the file is shorter."""
        buffer = arrays.empty((stop - start,), np.uint8).data
        done = 0
        while done < len(buffer):
            count = os.preadv(self.number, [buffer[done:]], start + done)
            if count == 0:
                raise OSError(f"it ends {len(buffer) - done} bytes too early")
            done += count
        return buffer


def _local(shard: Shard, path: Path, groups: Sequence[int], columns: Sequence[str], known: Indices) -> Fetched:
    file, index, footer = _files.get(shard), known.get(shard), None
    if file is None or index is None or file.stamp() != index.stamp:
        file = OpenFile(path)
        stamp = file.stamp()
        if index is None or index.stamp != stamp:
            footer = _file_footer(shard, file, stamp.size)
            index = _index(shard, footer, stamp, known)
    with _lock:
        _files.pop(shard, None)
        while len(_files) >= OPEN_FILES:
            _files.pop(next(iter(_files)))
        _files[shard] = file
    spans, places = index.find(groups, columns)
    return Fetched(index, list(groups), spans, places, [file.read(*span) for span in spans], 0, footer)


def _file_footer(shard: Shard, file: OpenFile, size: int) -> pq.FileMetaData:
    tail = file.read(max(0, size - (shard.footer or FOOTER)), size)
    if (needed := footer_length(tail)) > len(tail):
        tail = file.read(max(0, size - needed), size)
    footer = parsed(tail)
    _require_same(shard, footer, size)
    return footer


# ---- of an object in a store ----


def _remote(
    shard: Shard, place: UPath, groups: Sequence[int], columns: Sequence[str], reading: Reading, known: Indices
) -> Fetched:
    index, footer, now, faults = known.get(shard), None, None, 0
    if index is None and (kept := _kept_footer(shard, reading)):
        footer, stamp = kept
        index = _index(shard, footer, stamp, known)
    if index is None:
        now, faults = counted_stamp(place, reading.patience)
        footer, more = _object_footer(shard, place, now, reading)
        index, faults = _index(shard, footer, now, known), faults + more
    spans, places = index.find(groups, columns)
    cache = reading.cache if shard.content else None
    if cache and (parts := _divided(cache.get(shard.content, *spans), spans)):
        return Fetched(index, list(groups), spans, places, parts, faults, footer)
    if now is None:
        now, more = counted_stamp(place, reading.patience)
        faults += more
        if now != index.stamp:
            footer, more = _object_footer(shard, place, now, reading)
            index, faults = _index(shard, footer, now, known), faults + more
            spans, places = index.find(groups, columns)
    read, more = read_ranges(place, spans, reading.patience)
    if cache:
        cache.put(b"".join(read), shard.content, *spans)
    return Fetched(index, list(groups), spans, places, list(map(memoryview, read)), faults + more, footer)


def _divided(data: bytes | None, spans: list[tuple[int, int]]) -> list[memoryview] | None:
    """The bytes of each span out of those of all; None if they are not as many."""
    ends = np.cumsum([stop - start for start, stop in spans], dtype=np.int64).tolist()
    if data is None or len(data) != ends[-1]:
        return None
    return [memoryview(data)[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _kept_footer(shard: Shard, reading: Reading) -> tuple[pq.FileMetaData, Stamp] | None:
    """The footer that the cache holds, and the stamp of the object that it was read from."""
    kept = reading.cache.get(shard.content, "footer") if reading.cache and shard.content else None
    if not kept:
        return None
    tag, _, tail = kept.partition(b"\n")
    return parsed(tail), Stamp(shard.bytes, tag.decode())


def _object_footer(shard: Shard, place: UPath, now: Stamp, reading: Reading) -> tuple[pq.FileMetaData, int]:
    """The footer from the store, which the cache then holds, and how many requests failed before it came."""
    (tail,), faults = read_ranges(place, [(max(0, now.size - (shard.footer or FOOTER)), now.size)], reading.patience)
    if (needed := footer_length(tail)) > len(tail):
        (tail,), more = read_ranges(place, [(max(0, now.size - needed), now.size)], reading.patience)
        faults += more
    footer = parsed(tail)
    _require_same(shard, footer, now.size)
    if reading.cache and shard.content:
        reading.cache.put(now.tag.encode() + b"\n" + tail, shard.content, "footer")
    return footer, faults


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
