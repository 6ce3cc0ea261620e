"""Pages: what pyarrow writes comes back, whatever the layout of the file; what is damaged or foreign is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmearth_ray.stream.pages import read_labels, read_strings, read_values

ROWS = 50
RNG = np.random.default_rng(0)
MAPS = RNG.integers(0, 50, (ROWS, 4, 4)).astype("<u2")
COLUMNS: dict[str, tuple[pa.Array, np.ndarray]] = {
    "maps": (pa.array([m.tobytes() for m in MAPS], pa.binary(32)), MAPS),
    "flags": (pa.array(RNG.random(ROWS) < 0.5), None),  # type: ignore[dict-item]
    "numbers": (pa.array(RNG.random(ROWS).astype(np.float32)), None),  # type: ignore[dict-item]
}
DTYPES = {"maps": np.dtype(("<u2", (4, 4))), "flags": np.dtype(bool), "numbers": np.dtype("<f4")}


def written(path: Path, **options: Any) -> tuple[bytes, pq.FileMetaData]:
    fields = [pa.field(name, array.type, nullable=options.get("nullable", False)) for name, (array, _) in COLUMNS.items()]
    options = {"use_dictionary": False, "write_page_checksum": True, "compression": "zstd"} | options
    options.pop("nullable", None)
    pq.write_table(pa.table([array for array, _ in COLUMNS.values()], pa.schema(fields)), path, **options)
    return path.read_bytes(), pq.read_metadata(path)


def chunk_of(data: bytes, metadata: pq.FileMetaData, name: str) -> tuple[memoryview, str]:
    chunk = metadata.row_group(0).column(list(COLUMNS).index(name))
    return memoryview(data)[chunk.data_page_offset :][: chunk.total_compressed_size], chunk.compression


@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
@pytest.mark.parametrize("page_size", [64, 700, 1 << 20])
@pytest.mark.parametrize("checksum", [True, False])
def test_values_come_back_in_any_number_of_pages(compression: str, page_size: int, checksum: bool, tmp_path: Path) -> None:
    options = {"compression": compression, "data_page_size": page_size, "write_page_checksum": checksum, "write_batch_size": 4}
    data, metadata = written(tmp_path / "f.parquet", **options)
    for name, (array, values) in COLUMNS.items():
        expected = array.to_numpy(zero_copy_only=False) if values is None else values
        found = read_values(*chunk_of(data, metadata, name), ROWS, DTYPES[name])
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected), name


def test_a_chunk_of_one_page_without_compression_is_not_copied(tmp_path: Path) -> None:
    data, metadata = written(tmp_path / "f.parquet", compression="none")
    chunk, compression = chunk_of(data, metadata, "maps")
    found = read_values(chunk, compression, ROWS, DTYPES["maps"])
    assert np.shares_memory(found, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(("options", "compression", "reason"), [
    ({"compression": "gzip"}, None, "compression GZIP is not one of UNCOMPRESSED, ZSTD, LZ4"),
    ({"use_dictionary": True}, None, "is not of maps"),
    ({"data_page_version": "2.0"}, None, "a page of type 3"),
    ({}, "LZ4", "a page cannot be read|a page of .* bytes where"),
])  # fmt: skip
def test_what_this_projects_writer_would_not_write_is_refused(
    options: dict[str, Any], compression: str | None, reason: str, tmp_path: Path
) -> None:
    data, metadata = written(tmp_path / "f.parquet", **options)
    chunk, found = chunk_of(data, metadata, "maps")
    with pytest.raises(ValueError, match=reason):
        read_values(chunk, compression or found, ROWS, DTYPES["maps"])


def test_another_number_of_values_is_refused(tmp_path: Path) -> None:
    chunk, compression = chunk_of(*written(tmp_path / "f.parquet"), "numbers")
    with pytest.raises(ValueError, match=f"{ROWS} values where there should be {ROWS + 1}"):
        read_values(chunk, compression, ROWS + 1, DTYPES["numbers"])
    with pytest.raises(ValueError):
        read_values(chunk[:-2], compression, ROWS, DTYPES["numbers"])
    with pytest.raises(ValueError):
        read_values(chunk[:3], compression, ROWS, DTYPES["numbers"])


@pytest.mark.parametrize("nulls", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("rows", [1, 7, 64, 5000])
@pytest.mark.parametrize("page_size", [100, 1 << 20])
def test_texts_and_labels_come_back(nulls: float, rows: int, page_size: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(rows)
    labels = np.where(rng.random(rows) < nulls, -1, rng.integers(0, 30_000, rows)).astype(np.int16)
    texts = ["é" * int(n) for n in rng.integers(0, 9, rows)]
    table = pa.table(
        {"texts": pa.array(texts), "labels": pa.array(labels, mask=labels < 0)},
        pa.schema([pa.field("texts", pa.string(), nullable=False), pa.field("labels", pa.int16())]),
    )
    path = tmp_path / "f.parquet"
    pq.write_table(table, path, use_dictionary=False, data_page_size=page_size, compression="lz4", row_group_size=rows)
    data, group = path.read_bytes(), pq.read_metadata(path).row_group(0)
    chunks = [(memoryview(data)[c.data_page_offset :][: c.total_compressed_size], c.compression)
              for c in (group.column(i) for i in range(2))]  # fmt: skip
    assert read_strings(*chunks[0], rows) == texts
    found = read_labels(*chunks[1], rows)
    assert found.dtype == np.int16
    assert np.array_equal(found, labels)
    for read, chunk in ((read_strings, chunks[0]), (read_labels, chunks[1])):
        with pytest.raises(ValueError, match=f"{rows} (texts|labels) where there should be {rows + 1}"):
            read(*chunk, rows + 1)


@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
def test_no_flipped_byte_goes_unnoticed(compression: str, tmp_path: Path) -> None:
    """Each byte of a chunk in turn, header and values: an error, or the true values where the byte means nothing."""
    data, metadata = written(tmp_path / "f.parquet", compression=compression)
    chunk, name = chunk_of(data, metadata, "maps")
    refused = 0
    for place in range(0, len(chunk), max(1, len(chunk) // 300)):
        damaged = bytearray(chunk)
        damaged[place] ^= 0x15
        try:
            found = read_values(memoryview(bytes(damaged)), name, ROWS, DTYPES["maps"])
        except ValueError:
            refused += 1
        else:
            assert np.array_equal(found, MAPS), place
    assert refused > 250
