"""The procedural Earth: same bytes every time, every layer as in a release, and a world in which one layer explains another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from mmearth_ray.errors import UsageError
from mmearth_ray.modalities import TABLE, Kind, Level, get, tasks
from mmearth_ray.shards.earth.climate import ECO_REGION_START, block_of, climate_at
from mmearth_ray.shards.earth.landscape import METRES_PER_DEGREE, ground_at
from mmearth_ray.shards.earth.noise import coarsened, hashed, key_of, plane_noise
from mmearth_ray.shards.manifest import MANIFEST, load_manifest
from mmearth_ray.shards.schema import TileBlock
from mmearth_ray.shards.synthesise import NAME, ProceduralEarth, SynthesiseOptions, place_of, synthesise

SIZE, TILES = 32, 192


@pytest.fixture(scope="module")
def block() -> TileBlock:
    """192 tiles of 32 px as one block."""
    parts = list(ProceduralEarth(0, SIZE).blocks(0, TILES))
    join = np.concatenate
    return TileBlock(
        **{k: [v for p in parts for v in getattr(p, k)] for k in ("id", "date", "product", "crs", "split", "source")},
        latitude=join([p.latitude for p in parts]),
        longitude=join([p.longitude for p in parts]),
        layers={m.name: join([p.layers[m.name] for p in parts]) for m in TABLE},
        present={m.name: join([p.present[m.name] for p in parts]) for m in TABLE},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written data set of three shards of a row group each."""
    out = tmp_path_factory.mktemp("earth") / "set"
    synthesise(out, SynthesiseOptions(tiles=96, size=SIZE, shard_mb=1, holdout=0.25))
    return out


def _files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def test_same_options_give_the_same_bytes_with_any_number_of_workers(written: Path, tmp_path: Path) -> None:
    try:
        synthesise(tmp_path / "again", SynthesiseOptions(tiles=96, size=SIZE, shard_mb=1, holdout=0.25, workers=2))
    finally:
        ray.shutdown()
    assert _files(tmp_path / "again") == _files(written)
    assert len(_files(written)) == 5  # three shards, their metadata and the manifest


def test_a_tile_does_not_depend_on_its_block_and_the_seed_makes_the_world(block: TileBlock) -> None:
    alone = ProceduralEarth(0, SIZE).tile(70)
    for m in TABLE:
        np.testing.assert_array_equal(alone["layers"][m.name], block.layers[m.name][70], err_msg=m.name)
    other = ProceduralEarth(1, SIZE).tile(70)
    assert other["latitude"] != alone["latitude"]


def test_overlapping_tiles_show_the_same_land() -> None:
    place = place_of(0, 13)
    there = replace(place, latitude=place.latitude - 80 / METRES_PER_DEGREE)  # 8 pixels to the south, all else the same
    here, shifted = ground_at(0, place, 48), ground_at(0, there, 48)
    for name in ("cover", "near", "parcel"):
        same = getattr(here, name)[10:-2, 2:-2] == getattr(shifted, name)[2:-10, 2:-2]
        assert same.mean() > 0.97, name  # the globe's own slope is taken at the tile's centre


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tiles=0"):
        synthesise(tmp_path / "x", SynthesiseOptions(tiles=0))
    assert not (tmp_path / "x").exists()


def test_a_small_tile_shows_the_middle_of_the_same_land() -> None:
    place = place_of(0, 12)
    small, large = ground_at(0, place, 32), ground_at(0, place, 64)
    assert np.mean(small.cover[2:-2, 2:-2] == large.cover[18:-18, 18:-18]) > 0.99
    np.testing.assert_allclose(small.elevation[2:-2, 2:-2], large.elevation[18:-18, 18:-18], atol=0.5)


@pytest.mark.parametrize("name", [m.name for m in TABLE])
def test_layers_have_the_dtype_shape_and_bounds_of_the_table(block: TileBlock, name: str) -> None:
    m = get(name)
    layer, present = block.layers[name], block.present[name]
    label = m.level is Level.IMAGE and m.kind is Kind.CATEGORICAL
    inner = () if label else (len(m.bands), SIZE, SIZE) if m.level is Level.PIXEL else (len(m.bands),)
    assert layer.dtype == np.dtype(m.dtype)
    assert layer.shape == (TILES, *inner)
    if m.kind is Kind.CONTINUOUS:
        valid = m.valid(layer)
        for band, (low, high) in enumerate(m.bounds):
            values = layer[:, band][valid[:, band]]
            assert values.size == 0 or (values.min() >= low and values.max() <= high), m.columns[band]
    elif m.kind is Kind.FLAGS:
        valid = m.valid(layer)
        assert set(np.unique(layer)) <= {0, 1024, 2048, 65535}
    else:
        valid = layer >= 0 if label else m.label_table()[layer] >= 0
        assert label or set(np.unique(layer[~valid])) <= set(m.missing)
    np.testing.assert_array_equal(present, valid.reshape(TILES, -1).any(axis=1))


def test_every_band_and_every_gap_occurs(block: TileBlock) -> None:
    radar = np.asarray(np.isfinite(block.layers["sentinel1"]).any(axis=(2, 3)))
    asc, desc = radar[:, :4].any(axis=1), radar[:, 4:].any(axis=1)
    assert (asc & desc).sum() > 100
    assert (asc & ~desc).any()
    assert (desc & ~asc).any()
    assert (~asc & ~desc).any()
    assert radar[:, [2, 3, 6, 7]].any(axis=0).all()
    assert radar[:, 0].mean() > 0.6 > 0.2 > radar[:, [2, 3, 6, 7]].mean()
    for name, gap in (("aster", -32768), ("canopy_height_eth", 127), ("dynamic_world", 0), ("sentinel2_cloudmask", 65535)):
        assert (block.layers[name] == gap).any(), name
    assert np.isnan(block.layers["era5"]).any()
    assert not block.present["dynamic_world"].all()
    assert block.present["sentinel2"].all()
    empty = (block.layers["sentinel2"][:, 0] == 0).mean(axis=(1, 2))
    assert ((empty > 0) & (empty < 1)).any()


def test_products_differ_as_in_the_release(block: TileBlock) -> None:
    l2a = np.array(block.product) == "l2a"
    s2 = block.layers["sentinel2"]
    assert 20 < l2a.sum() < TILES - 20
    assert not s2[l2a, 10].any()
    assert np.median(s2[~l2a, 10][s2[~l2a, 10] > 0]) < 100
    assert (block.layers["sentinel2_scl"][~l2a] == 255).all()
    assert (block.layers["sentinel2_cloudprod"][~l2a] == 65535).all()
    assert (block.layers["sentinel2_scl"][l2a] != 255).mean() > 0.95
    assert np.median(s2[~l2a, 0]) > np.median(s2[l2a, 0]) + 300  # blue air is left in L1C
    assert np.median(s2[~l2a, 9]) < 0.6 * np.median(s2[l2a, 9])  # and water vapour


def test_cloud_layers_agree(block: TileBlock) -> None:
    chance, scl = block.layers["sentinel2_cloudprod"], block.layers["sentinel2_scl"]
    thick = (chance > 80) & (chance <= 100)
    assert thick.any()
    assert np.isin(scl[thick], (9, 255)).all()
    blue = block.layers["sentinel2"][:, 1:2]
    assert np.median(blue[thick]) > 3000


def test_places_days_and_labels_fit(block: TileBlock) -> None:
    biome, region = block.layers["biome"].astype(int), block.layers["eco_region"].astype(int)
    start = np.array(ECO_REGION_START)
    assert ((region >= start[biome]) & (region < start[biome + 1])).all()
    assert len(np.unique(biome)) >= 12
    assert block.id == [str(i) for i in range(TILES)]
    for day, product, latitude, crs in zip(block.date, block.product, block.latitude, block.crs, strict=True):
        assert day is not None
        assert 2017 <= day.year <= 2020
        assert product in ("l1c", "l2a")
        assert crs is not None
        assert crs.startswith("EPSG:326" if latitude >= 0 else "EPSG:327")
    month = np.array([2 * np.pi * day.month / 12 for day in block.date if day])
    np.testing.assert_allclose(block.layers["month"], np.stack([np.sin(month), np.cos(month)], 1), atol=1e-6)
    north = np.radians(block.latitude)
    np.testing.assert_allclose(block.layers["lat"], np.stack([np.sin(north), np.cos(north)], 1), atol=1e-6)


def test_land_cover_shows_in_the_spectra(block: TileBlock) -> None:
    """The nearest class mean of 12 bands, fitted on even tiles, tells the cover of odd tiles far better than guessing."""
    s2, scl = block.layers["sentinel2"], block.layers["sentinel2_scl"]
    usable = (np.array(block.product) == "l2a") & block.present["dynamic_world"]
    bands = [b for b in range(13) if b != 10]
    pixels = np.moveaxis(s2[usable][:, bands], 1, -1).astype(np.float64)
    label = block.layers["dynamic_world"][usable][:, 0]
    clear = (label > 0) & np.isin(scl[usable][:, 0], (2, 4, 5, 6))
    pixels = np.log(pixels + 100)
    fit = np.arange(len(label)) % 2 == 0
    classes = [c for c in range(1, 9) if (clear & (label == c))[fit].sum() > 200]
    means = np.array([pixels[fit][(clear & (label == c))[fit]].mean(axis=0) for c in classes])
    test = pixels[~fit][(clear & np.isin(label, classes))[~fit]]
    truth = label[~fit][(clear & np.isin(label, classes))[~fit]]
    guess = np.array(classes)[((test[:, None] - means) ** 2).sum(-1).argmin(1)]
    recall = np.mean([(guess[truth == c] == c).mean() for c in classes if (truth == c).any()])
    assert recall > 2.5 / len(classes)


def test_two_land_cover_maps_agree_mostly_but_not_always(block: TileBlock) -> None:
    both = block.present["dynamic_world"] & block.present["esa_worldcover"]
    world, esa = block.layers["dynamic_world"][both], block.layers["esa_worldcover"][both]
    same = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100]), np.array([2, 6, 3, 5, 7, 8, 9, 1, 4, 2, 6])
    table = np.zeros(256, np.uint8)
    table[same[0]] = same[1]
    seen = world > 0
    assert 0.8 < (table[esa] == world)[seen].mean() < 0.99


def test_warmth_follows_latitude_and_height(block: TileBlock) -> None:
    year = block.layers["era5"][:, 8]
    known = np.isfinite(year)
    elevation = np.array([place_of(0, i).elevation for i in range(TILES)])
    away = np.sin(np.radians(np.abs(block.latitude))) ** 2.2
    design = np.stack([np.ones(TILES), away, elevation], 1)[known]
    weights, *_ = np.linalg.lstsq(design, year[known], rcond=None)
    assert np.corrcoef(year[known], design @ weights)[0, 1] > 0.9
    assert -48 < weights[1] < -30
    assert -9e-3 < weights[2] < -4e-3


def test_slopes_face_the_light(block: TileBlock) -> None:
    """Steep open tiles in clear air: elevation can be told from shading, as slopes to the sun are brighter."""
    found = []
    for i in np.flatnonzero(block.layers["aster"][:, 1].mean(axis=(1, 2)) > 12):
        z = block.layers["aster"][i, 0].astype(float)
        if z.min() < -1000 or abs(block.latitude[i]) < 25:
            continue
        light = np.log(block.layers["sentinel2"][i, 8].astype(float) + 1)
        down, across = np.gradient(z)
        towards = (-down if block.latitude[i] > 0 else down) - across  # the sun stands in the south-east, or north-east
        found.append(np.corrcoef(towards.ravel(), light.ravel())[0, 1])
    assert len(found) > 5
    assert np.median(found) > 0.4


def test_validation_tiles_lie_in_other_blocks(block: TileBlock) -> None:
    number = block_of(block.latitude, block.longitude)[0]
    held = np.array(block.split) == "val"
    assert not set(number[held]) & set(number[~held])
    assert 0.03 < held.mean() < 0.3
    assert len(np.unique(number)) < 0.85 * TILES  # tiles have neighbours, so a hold-out by row would leak


def test_manifest_has_statistics_for_every_band_with_values(written: Path) -> None:
    manifest = load_manifest(written)
    assert manifest.name == NAME
    assert manifest.rows == 96
    assert set(manifest.shards[0].splits) == {"train", "val"}
    for m in tasks():
        if m.kind is not Kind.CONTINUOUS:
            continue
        for variant, bands in manifest.statistics[m.name].items():
            for band, entry in bands.items():
                if manifest.valid[variant].get(f"{m.name}.{band}", 0) and entry["count"]:
                    assert np.isfinite([entry["mean"], entry["std"]]).all(), (m.name, band)
                    assert entry["std"] > 0, (m.name, band)
    assert manifest.statistics["sentinel2"]["l2a"]["B4"]["count"] > 0
    assert manifest.statistics["sentinel1"]["all"]["asc_VV"]["count"] > 0


def test_shards_hold_what_the_source_made(written: Path) -> None:
    shard = pq.read_table(written / load_manifest(written).shards[1].file)
    assert shard["id"].to_pylist() == [str(i) for i in range(32, 64)]
    tile = ProceduralEarth(0, SIZE, 0.25).tile(32)
    assert shard["sentinel2.B4"][0].as_py() == tile["layers"]["sentinel2"][3].astype("<u2").tobytes()
    assert shard["split"][0].as_py() == tile["split"]
    assert MANIFEST in {p.name for p in written.iterdir()}


def test_noise_is_a_function_of_place() -> None:
    x, y = np.arange(0, 6000, 10.0) + 1.2e7, np.arange(0, 4000, 10.0) - 3e6
    whole = plane_noise(key_of(0, "x"), x, y, 55)
    np.testing.assert_array_equal(whole[40:60, 100:130], plane_noise(key_of(0, "x"), x[100:130], y[40:60], 55))
    assert abs(whole.mean()) < 0.1
    assert 0.85 < whole.std() < 1.15
    uniform = hashed(key_of(1), np.arange(-50_000, 50_000))
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(uniform[1:], uniform[:-1])[0, 1]) < 0.02


def test_coarse_pixels_keep_the_mean_and_constants() -> None:
    maps = np.random.default_rng(0).random((2, 32, 32)).astype(np.float32)
    assert abs(coarsened(maps, 6).mean() - maps.mean()) < 0.02
    np.testing.assert_allclose(coarsened(np.full((33, 20), 3, np.float32), 6), 3, rtol=1e-6)


def test_half_of_the_globe_is_land_and_dry_and_wet_places_exist() -> None:
    generator = np.random.default_rng(0)
    latitude = np.degrees(np.arcsin(generator.uniform(-1, 1, 4000)))
    climate = climate_at(0, latitude, generator.uniform(-180, 180, 4000))
    land = climate.elevation > 0
    assert 0.3 < land.mean() < 0.8
    assert climate.elevation.max() < 9000
    assert len(np.unique(climate.biome[land])) == 14
    assert (climate.eco_region >= 0).all()
    assert (climate.eco_region < 846).all()
