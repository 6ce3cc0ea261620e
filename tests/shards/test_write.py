import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from release_fixture import tile_layers

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import TABLE, get
from mmearth_ray.shards.read import filler
from mmearth_ray.shards.schema import TileBlock, has_value
from mmearth_ray.shards.write import COMPRESSIONS, ShardRecord, count_valid, write_shard

SIZE = 16


def block(rows: range, split: str = "train") -> TileBlock:
    """Tiles with a Sentinel-2 layer and nothing else."""
    layers = {m.name: filler(m, len(rows), SIZE) for m in TABLE}
    layers["sentinel2"] = np.stack([tile_layers(row, SIZE, 0)["sentinel2"] for row in rows]).astype("uint16")
    return TileBlock(
        id=[str(r) for r in rows], latitude=np.zeros(len(rows)), longitude=np.zeros(len(rows)), date=[None] * len(rows),
        product=["l2a" if r % 2 == 0 else "l1c" for r in rows], crs=[None] * len(rows), split=[split] * len(rows),
        source=["test"] * len(rows), layers=layers, present={m.name: has_value(layers[m.name], m) for m in TABLE},
    )  # fmt: skip


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_record_describes_the_file(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "part-00000.parquet"
    record = write_shard(path, [block(range(4)), block(range(4, 6), "val")], SIZE, compression)
    assert record.bytes == path.stat().st_size
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record.row_groups == [4, 2]
    assert record.splits == {"train": 4, "val": 2}
    assert record.products == {"l2a": 3, "l1c": 3}
    assert record.dates == [None, None]
    assert record.present["sentinel2"] == 6
    assert record.present["sentinel1"] == 0
    assert record.valid["l1c"]["sentinel2.B10"] == 3 * (SIZE * SIZE - 2)
    assert record.valid["l2a"]["sentinel2.B10"] == 0
    assert record.moments["l1c"]["sentinel2.B10"][0] == 2 * (SIZE * SIZE - 2), "moments see the training split only"
    assert pq.ParquetFile(path).metadata.num_row_groups == 2
    assert ShardRecord(**record.to_json()) == record
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_equal_tiles_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_shard(tmp_path / name, [block(range(4))], SIZE).sha256 for name in ("a", "b"))
    assert first == second


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def blocks():
        yield block(range(2))
        raise DataError("row 7 cannot be read")

    with pytest.raises(DataError, match="row 7"):
        write_shard(tmp_path / "part-00000.parquet", blocks(), SIZE)
    assert not list(tmp_path.iterdir())


def test_valid_values_are_counted_by_kind() -> None:
    codes = np.array([[[[10, 0], [11, 100]]]], np.uint8)
    assert count_valid(codes, get("esa_worldcover")) == {"esa_worldcover.map": 2}
    assert count_valid(np.array([3, -1], np.int16), get("biome")) == {"biome": 1}
    assert count_valid(np.array([[0.5, np.nan]], np.float32), get("lat")) == {"lat.sin": 1, "lat.cos": 0}
