"""The reader: what was written comes back bit for bit, only used columns are touched, damage is told."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_earth import make_block, make_data_set, shard_at

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import PRODUCTS, TABLE, Level, get, tasks
from mmearth_ray.shards.schema import METADATA_FIELDS
from mmearth_ray.stream.reader import read_group, used_columns
from mmearth_ray.stream.shard import Shard

SIZE = 8


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 tiles in row groups of 8 and 8."""
    path = tmp_path_factory.mktemp("shards")
    return path / make_data_set(path, tiles=16, size=SIZE).shards[0].file


@pytest.mark.parametrize("group", [0, 1])
def test_every_layer_comes_back_bit_for_bit(group: int, shard: Path) -> None:
    written = make_block(range(group * 8, group * 8 + 8), SIZE, 16)
    found = read_group(shard_at(shard), group, SIZE, TABLE)
    assert found.id == written.id
    assert [PRODUCTS[p] for p in found.product.tolist()] == written.product
    for m in TABLE:
        assert found.present[m.name].tolist() == written.present[m.name].tolist()
        layer = written.layers[m.name]
        for band, name in enumerate(m.columns):
            expected = layer if layer.ndim == 1 else layer[:, band]
            column = found.columns[name]
            assert column.dtype == np.dtype(m.dtype)
            assert column.shape == ((8, SIZE, SIZE) if m.level is Level.PIXEL else (8,))
            assert column.tobytes() == expected.tobytes()


def test_an_unknown_label_is_stored_as_null_and_read_as_minus_one(shard: Path) -> None:
    labels = read_group(shard_at(shard), 0, SIZE, (get("biome"),)).columns["biome"]
    stored = pq.ParquetFile(shard).read_row_group(0, columns=["biome"])["biome"].to_pylist()
    assert labels.tolist() == [-1 if label is None else label for label in stored]


def test_used_columns_are_those_of_the_modalities_and_no_other() -> None:
    assert used_columns((get("sentinel2").select(["B3", "B2"]), get("biome"))) == [
        "id", "product", "sentinel2.B3", "sentinel2.B2", "sentinel2.present", "biome", "biome.present",
    ]  # fmt: skip
    everything = used_columns(TABLE)
    assert len(set(everything)) == len(everything)


def test_columns_that_are_not_used_are_not_read(tmp_path: Path) -> None:
    """Every other column is made unreadable: overwriting its pages does no harm until it is asked for."""
    manifest = make_data_set(tmp_path, tiles=8, size=SIZE)
    shard = tmp_path / manifest.shards[0].file
    wanted = (get("aster").select(["slope"]), get("month"), get("biome"))
    before = read_group(shard_at(shard), 0, SIZE, wanted)
    used = set(used_columns(wanted))
    data = bytearray(shard.read_bytes())
    garbled = 0
    group = pq.ParquetFile(shard).metadata.row_group(0)
    for chunk in (group.column(i) for i in range(group.num_columns)):
        if chunk.path_in_schema not in used:
            start, size = chunk.data_page_offset, chunk.total_compressed_size
            data[start : start + size] = b"\xa5" * size
            garbled += 1
    assert garbled > len(METADATA_FIELDS)
    copy = tmp_path / "garbled.parquet"
    copy.write_bytes(data)
    after = read_group(shard_at(copy), 0, SIZE, wanted)
    assert after.id == before.id
    for name in before.columns:
        assert np.array_equal(after.columns[name], before.columns[name])
    with pytest.raises(DataError, match="cannot read row group 0 of"):
        read_group(shard_at(copy), 0, SIZE, (get("aster"),))


@pytest.mark.parametrize("name", ["sentinel2.B4", "esa_worldcover.map", "era5.year_avg_temp", "id"])
def test_one_flipped_byte_of_a_page_is_noticed(name: str, shard: Path, tmp_path: Path) -> None:
    group = pq.ParquetFile(shard).metadata.row_group(1)
    chunk = next(c for c in (group.column(i) for i in range(group.num_columns)) if c.path_in_schema == name)
    data = bytearray(shard.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 0x10
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(data)
    assert len(read_group(shard_at(damaged), 0, SIZE, tasks()).id) == 8
    with pytest.raises(DataError) as caught:
        read_group(shard_at(damaged), 1, SIZE, tasks())
    message = str(caught.value)
    assert message.startswith(f"cannot read row group 1 of {damaged} (")
    assert "CRC checksum verification failed" in message
    assert message.endswith("`shards verify` tells more")


def test_a_missing_shard_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "part-7.parquet"
    with pytest.raises(DataError, match=f"the shard {path} is missing; restore it, or build the data set again"):
        read_group(Shard(path, 100, "", 0), 0, SIZE, tasks())


def test_a_file_of_another_schema_is_refused(shard: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"id": ["1"], "product": ["l1c"]}), other)
    with pytest.raises(DataError, match=f"cannot read row group 0 of {other}"):
        read_group(shard_at(other), 0, SIZE, (get("month"),))
    nonsense = tmp_path / "nonsense.parquet"
    nonsense.write_bytes(b"not a shard")
    with pytest.raises(DataError, match=rf"the shard {nonsense} is damaged \("):
        read_group(shard_at(nonsense), 0, SIZE, (get("month"),))
    with pytest.raises(DataError, match="cannot read row group 5 of"):
        read_group(shard_at(shard), 5, SIZE, (get("month"),))


@pytest.mark.parametrize("size", [SIZE // 2, SIZE * 2])
def test_tiles_of_another_size_are_refused_rather_than_misread(size: int, shard: Path) -> None:
    with pytest.raises(DataError, match=r"sentinel2.B1 is fixed_size_binary\[128\], not fixed_size_binary"):
        read_group(shard_at(shard), 0, size, (get("sentinel2"),))


def test_a_product_that_is_unknown_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.parquet"
    m = get("month")
    columns = {"id": ["1"], "product": ["l3"], m.present_column: [True]}
    pq.write_table(pa.table(columns | {name: np.zeros(1, np.float32) for name in m.columns}), path)
    with pytest.raises(DataError, match="cannot read row group 0 of"):
        read_group(shard_at(path), 0, SIZE, (m,))
