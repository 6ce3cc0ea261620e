"""Indices of shards: as small as is said, and they find what the footer tells."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_earth import make_data_set, shard_at

from mmearth_ray.modalities import TABLE
from mmearth_ray.storage import Stamp, merged
from mmearth_ray.stream.footer import GAP, Index, footer_length, parsed
from mmearth_ray.stream.reader import used_columns
from mmearth_ray.stream.shard import fetch


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of three row groups of 8, 8 and 5 tiles."""
    folder = tmp_path_factory.mktemp("footer")
    (record,) = make_data_set(folder, tiles=21, size=32).shards
    return folder / record.file


def index_of(path: Path) -> tuple[pq.FileMetaData, Index]:
    footer = pq.read_metadata(path)
    return footer, Index.of(footer, Stamp(path.stat().st_size, ""))


def test_an_index_takes_four_bytes_a_chunk_and_shares_what_all_shards_have(path: Path) -> None:
    footer, index = index_of(path)
    assert index.edges.nbytes == 4 * 3 * (footer.num_columns + 1)
    assert index.rows.tolist() == [8, 8, 5]
    assert index.columns is index_of(path)[1].columns
    schema = pq.read_schema(path)
    assert index.columns.types == dict(zip(schema.names, schema.types, strict=True))


def test_it_finds_the_bytes_that_the_footer_tells(path: Path) -> None:
    footer, _ = index_of(path)
    data, names = path.read_bytes(), used_columns(TABLE)
    places = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
    for groups in ([1], [2, 0]):
        fetched = fetch(shard_at(path), groups, names)
        assert fetched.types == index_of(path)[1].columns.types
        for group in groups:
            assert fetched.rows(group) == footer.row_group(group).num_rows
            for name in names:
                chunk = footer.row_group(group).column(places[name])
                found, compression = fetched.chunk(group, name)
                assert bytes(found) == data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size]
                assert compression == chunk.compression


def test_chunks_are_read_together_unless_much_lies_between(path: Path) -> None:
    footer, index = index_of(path)
    everything = [footer.schema.column(i).path for i in range(footer.num_columns)]
    few = ["biome", "id", "product"]
    for columns in (everything, everything[::-1], few):
        for groups in ([0], [0, 1], [1, 0], [0, 2]):
            spans, places = index.find(groups, columns)
            chunks = [footer.row_group(group).column(everything.index(name)) for group in groups for name in columns]
            edges = [(c.data_page_offset, c.data_page_offset + c.total_compressed_size) for c in chunks]
            assert spans == merged(edges, GAP)
            assert places.numbers == {name: number for number, name in enumerate(columns)}
            assert [(spans[s][0] + begin, spans[s][0] + end) for s, begin, end in zip(*places[1:], strict=True)] == edges
    assert len(index.find([0], everything)[0]) == 1
    assert len(index.find([0], few)[0]) == 2


def test_a_wrong_row_group_or_column_is_named(path: Path) -> None:
    _, index = index_of(path)
    for group in (3, -1):
        with pytest.raises(LookupError, match=r"^it has 3 row groups$"):
            index.find([0, group], ["id"])
    with pytest.raises(LookupError, match=r"^it has no column salinity$"):
        index.find([0], ["id", "salinity"])


def test_chunks_that_are_not_compressed_alike_are_refused(tmp_path: Path) -> None:
    given: Any = {"a": "zstd", "b": "none"}
    pq.write_table(pa.table({"a": [1, 2], "b": [3, 4]}), tmp_path / "mixed.parquet", compression=given)
    with pytest.raises(OSError, match=r"^its column chunks are not compressed alike, or do not lie one after the other$"):
        index_of(tmp_path / "mixed.parquet")


def test_a_dictionary_belongs_to_its_chunk(tmp_path: Path) -> None:
    path = tmp_path / "dictionary.parquet"
    pq.write_table(pa.table({"a": [1, 2], "b": [3, 4]}), path)
    footer, index = index_of(path)
    chunk = footer.row_group(0).column(1)
    assert chunk.has_dictionary_page
    begin = chunk.dictionary_page_offset
    assert index.find([0], ["b"])[0] == [(begin, begin + chunk.total_compressed_size)]


def test_the_end_of_a_file_tells_how_long_its_footer_is(path: Path) -> None:
    data = path.read_bytes()
    length = footer_length(data)
    assert parsed(data[-length:]) == pq.read_metadata(path)
    assert footer_length(b"not one") == 0
    with pytest.raises(pa.ArrowInvalid):
        parsed(data[1 - length :])
