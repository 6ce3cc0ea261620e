import json
from dataclasses import replace
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmearth_ray.modalities import TABLE, Kind, Level, get, table_hash
from mmearth_ray.shards.read import filler, read_block
from mmearth_ray.shards.schema import TileBlock, arrow_schema, has_value, to_record_batch, wkb_points

SIZE = 8


def random_block(tiles: int, seed: int = 0) -> TileBlock:
    """Any bytes at all in every map, and unknown places, dates and labels among the tiles."""
    rng = np.random.default_rng(seed)
    layers = {}
    for m in TABLE:
        like = filler(m, tiles, SIZE)
        if m.level is Level.IMAGE and m.kind is Kind.CATEGORICAL:
            layers[m.name] = rng.integers(-1, len(m.classes), tiles).astype(m.dtype)
        elif m.dtype == "float32":
            layers[m.name] = rng.normal(size=like.shape).astype("float32")
        else:
            layers[m.name] = rng.integers(0, 256, like.nbytes, np.uint8).view(m.dtype).reshape(like.shape)
    latitude = rng.uniform(-90, 90, tiles)
    latitude[0] = np.nan
    return TileBlock(
        id=[f"t{seed}-{i}" for i in range(tiles)], latitude=latitude, longitude=rng.uniform(-180, 180, tiles),
        date=[date(2019, 2, 1 + i) if i else None for i in range(tiles)], product=["l1c", "l2a"] * (tiles // 2),
        crs=["EPSG:32610" if i else None for i in range(tiles)], split=["train"] * tiles, source=["here"] * tiles,
        layers=layers, present={m.name: has_value(layers[m.name], m) for m in TABLE},
    )  # fmt: skip


def test_one_column_per_band_of_exactly_its_bytes() -> None:
    schema = arrow_schema(SIZE)
    for m in TABLE:
        for column in m.columns:
            if m.level is Level.PIXEL:
                assert schema.field(column).type == pa.binary(SIZE * SIZE * np.dtype(m.dtype).itemsize)
                assert not schema.field(column).nullable
        assert schema.field(m.present_column).type == pa.bool_()
    assert schema.metadata[b"mmearth_ray.table_hash"] == table_hash().encode()
    assert json.loads(schema.metadata[b"geo"])["primary_column"] == "geometry"


def test_every_value_survives_the_file(tmp_path) -> None:
    block = random_block(6)
    with pq.ParquetWriter(tmp_path / "a.parquet", arrow_schema(SIZE)) as writer:
        writer.write_batch(to_record_batch(block, SIZE))
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert file.schema_arrow.equals(arrow_schema(SIZE), check_metadata=True)
        back = read_block(file, 0, SIZE)
    for m in TABLE:
        assert back.layers[m.name].dtype == np.dtype(m.dtype)
        assert back.layers[m.name].tobytes() == block.layers[m.name].tobytes(), m.name
        np.testing.assert_array_equal(back.present[m.name], block.present[m.name])
    np.testing.assert_array_equal(back.latitude, block.latitude)
    assert (back.id, back.date, back.crs, back.product) == (block.id, block.date, block.crs, block.product)


def test_maps_are_little_endian_and_row_major() -> None:
    block = random_block(2)
    batch = to_record_batch(block, SIZE)
    stored = np.frombuffer(batch.column("sentinel2.B8A")[1].as_py(), "<u2").reshape(SIZE, SIZE)
    np.testing.assert_array_equal(stored, block.layers["sentinel2"][1, get("sentinel2").bands.index("B8A")])


def test_a_layer_of_another_type_is_refused() -> None:
    block = random_block(2)
    wrong = replace(block, layers={**block.layers, "aster": block.layers["aster"].astype("int32")})
    with pytest.raises(ValueError, match="aster must be int16, got int32"):
        to_record_batch(wrong, SIZE)


def test_points_are_well_known_binary_or_null() -> None:
    known, unknown = wkb_points(np.array([-121.75, 0.0]), np.array([38.5, np.nan]))
    assert known == bytes.fromhex("0101000000" + np.array([-121.75, 38.5], "<f8").tobytes().hex())
    assert unknown is None
