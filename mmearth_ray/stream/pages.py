"""Pages of a column chunk, straight from the bytes of a shard: checked, decompressed, and not copied once more.

The writer stores columns without dictionary, so that a data page is its values one after the other (Parquet format, "Data
Pages", encoding PLAIN), after levels that tell the nulls of a column that may have some.  Reading them here instead of through
a table takes between two thirds and a fifth of the time, and leaves arrays that crops are taken from directly.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from isal import isal_zlib

CODECS: dict[str, pa.Codec | None] = {"UNCOMPRESSED": None, "ZSTD": pa.Codec("zstd"), "LZ4": pa.Codec("lz4_raw")}
"""By the name in the footer, what decompresses a page.  Parquet's LZ4 of today is its LZ4_RAW."""

DATA_PAGE, PLAIN = 0, 0
"""PageType and Encoding (parquet.thrift)."""

TYPE, UNCOMPRESSED_SIZE, COMPRESSED_SIZE, CHECKSUM, DATA_PAGE_HEADER = 1, 2, 3, 4, 5
NUM_VALUES, ENCODING = 1, 2
"""Fields of PageHeader and DataPageHeader (parquet.thrift)."""


LENGTH = 4
"""Bytes before a text, and before the levels of a page, that tell how many bytes they take (little-endian)."""

HEADER = 4096
"""Bytes that the header of a page has room in; those of maps take 30."""


class Page(NamedTuple):
    """Values of a page, as bytes; how many."""

    values: pa.Buffer | memoryview
    number: int


def read_values(chunk: memoryview, compression: str, rows: int, dtype: np.dtype) -> np.ndarray:
    """(rows,) values of a chunk of a column that is never null, a view where it is one page; booleans (rows,).

    Raises ValueError for bytes that are damaged or that this project's writer would not have written.
    """
    parts = [_array(page, dtype) for page in _pages(chunk, compression)]
    if sum(len(part) for part in parts) != rows:
        raise ValueError(f"{sum(len(part) for part in parts)} values where there should be {rows}")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_strings(chunk: memoryview, compression: str, rows: int) -> list[str]:
    """The texts of a chunk of a column that is never null.  Raises ValueError as `read_values` does."""
    found: list[str] = []
    for page in _pages(chunk, compression):
        data, at = bytes(page.values), 0
        while at < len(data):
            stop = at + LENGTH + int.from_bytes(data[at : at + LENGTH], "little")
            found.append(data[at + LENGTH : stop].decode())
            at = stop
    if len(found) != rows:
        raise ValueError(f"{len(found)} texts where there should be {rows}")
    return found


def read_labels(chunk: memoryview, compression: str, rows: int) -> np.ndarray:
    """int16 (rows,) values of a chunk of a column that may be null; null is -1.  Raises ValueError as `read_values` does."""
    found = [np.zeros(0, np.int16)]
    for page in _pages(chunk, compression):
        data = bytes(page.values)
        size = int.from_bytes(data[:LENGTH], "little")
        known = _levels(data[LENGTH : LENGTH + size], page.number)
        values = np.full(page.number, -1, np.int16)
        values[known] = np.frombuffer(data, "<i4", int(known.sum()), LENGTH + size)  # Parquet has no smaller integers
        found.append(values)
    joined = np.concatenate(found)
    if len(joined) != rows:
        raise ValueError(f"{len(joined)} labels where there should be {rows}")
    return joined


def _levels(data: bytes, count: int) -> np.ndarray:
    """bool (count,): definition levels of 0 or 1 (Parquet format, "RLE/Bit-packing hybrid", bit width 1)."""
    parts, at, held = [], 0, 0
    while held < count:
        if at >= len(data):
            raise ValueError(f"levels of {held} values where there should be {count}")
        head, at = _varint(data, at)
        if head & 1:  # that many groups of eight bits
            part = np.unpackbits(np.frombuffer(data, np.uint8, head >> 1, at), bitorder="little").view(bool)
            at += head >> 1
        else:  # one value so many times
            part = np.full(head >> 1, data[at], bool)
            at += 1
        parts.append(part)
        held += len(part)
    return np.concatenate(parts)[:count]


def _array(page: Page, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":  # eight to a byte, lowest bit first
        return np.unpackbits(np.frombuffer(page.values, np.uint8), count=page.number, bitorder="little").view(bool)
    return np.frombuffer(page.values, dtype, page.number)


def _pages(chunk: memoryview, compression: str) -> Iterator[Page]:
    if compression not in CODECS:
        raise ValueError(f"compression {compression} is not one of {', '.join(CODECS)}")
    codec, at = CODECS[compression], 0
    while at < len(chunk):
        try:
            header, length = _struct(bytes(chunk[at : at + HEADER]), 0)
            at += length
            kind, size, full = header[TYPE], header[COMPRESSED_SIZE], header[UNCOMPRESSED_SIZE]
            data = header.get(DATA_PAGE_HEADER, {})
            body = chunk[at : at + size]
            if kind != DATA_PAGE or data[ENCODING] != PLAIN or len(body) != size:
                raise ValueError(f"a page of type {kind} and {len(body)} of {size} bytes is not of maps")
            if CHECKSUM in header and isal_zlib.crc32(body) != header[CHECKSUM] & 0xFFFFFFFF:
                raise ValueError("CRC checksum verification failed")
            values = body if codec is None else codec.decompress(body, full)
            if len(values) != full:
                raise ValueError(f"a page of {len(values)} bytes where there should be {full}")
            yield Page(values, data[NUM_VALUES])
        except (IndexError, KeyError, TypeError, pa.ArrowException, OSError) as error:
            raise ValueError(f"a page cannot be read ({type(error).__name__}: {error})") from error
        at += size


BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12
"""Types of a field in Thrift's compact protocol (thrift-compact-protocol.md, "Struct encoding")."""


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol as {field: value}, and where it ends."""
    found: dict[int, Any] = {}
    field = 0
    while head := data[at]:
        at += 1
        kind, step = head & 15, head >> 4
        if step:
            field += step
        else:
            number, at = _varint(data, at)
            field = _signed(number)
        if kind in BOOLEANS:
            found[field] = kind == BOOLEANS[0]
        elif kind in INTEGERS:
            number, at = _varint(data, at)
            found[field] = _signed(number)
        elif kind == BINARY:
            length, at = _varint(data, at)
            found[field], at = data[at : at + length], at + length
        elif kind == STRUCT:
            found[field], at = _struct(data, at)
        elif kind in (BYTE, DOUBLE):
            width = 1 if kind == BYTE else 8
            found[field], at = data[at : at + width], at + width
        else:
            raise ValueError(f"a page header with a field of type {kind}")
    return found, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number in groups of seven bits, lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _signed(number: int) -> int:
    """The number that zigzag encoding made unsigned."""
    return (number >> 1) ^ -(number & 1)
