"""The procedural Earth as a data set: a world without downloads, with every layer, product and gap that a release has.

Tile i is a function of (seed, i, size) alone: which place, which day, what the sensors see.  So any part can be made anywhere,
by any number of workers, and two runs with the same options write the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np

from mmearth_ray import settings
from mmearth_ray.modalities import TABLE
from mmearth_ray.shards.build import build, rows_per_group, rows_per_shard
from mmearth_ray.shards.earth import maps, optics, radar
from mmearth_ray.shards.earth.climate import BLOCK_DEGREES, Climate, block_of, climate_at, columns_of
from mmearth_ray.shards.earth.landscape import METRES_PER_DEGREE, ground_at
from mmearth_ray.shards.earth.noise import generator, hashed, key_of
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.schema import TileBlock, has_value
from mmearth_ray.shards.write import COMPRESSIONS
from mmearth_ray.storage import Location

NAME = "procedural-earth"
GENERATOR = 1
"""Raised whenever the same options would give other bytes."""
_CANDIDATES = 192
_NEIGHBOURS = 0.3
"""Share of tiles that lie within a few kilometres of an earlier one."""
_MARGIN = 0.06
"""Part of a place block along its edges without tile centres: 1.6 km, so that no tile of up to 256 px reaches over."""
_WINDOWS = {
    2017: (date(2017, 1, 1), date(2017, 12, 31)),
    2018: (date(2018, 1, 1), date(2018, 11, 30)),
    2019: (date(2018, 12, 1), date(2019, 12, 31)),
    2020: (date(2020, 1, 1), date(2020, 12, 31)),
}
"""First day and day after the last of each year's Sentinel-2 scenes, as in the release."""
_L2A_GLOBAL = date(2018, 12, 1)
"""Surface reflectance is available everywhere from here on, and for a part of the world before."""
_LOWEST_SUN = 14.0


@dataclass(frozen=True)
class SynthesiseOptions:
    """Settings of `synthesise`."""

    tiles: int = settings.key(256, "number of tiles", at_least=1)
    size: int = settings.key(64, "tile size in pixels of 10 m", at_least=16, at_most=256)
    seed: int = settings.key(0, "the world: another seed is another Earth", at_least=0)
    holdout: float = settings.key(0.125, "share of place blocks (28 km) whose tiles go to split val", at_least=0, below=1)
    compression: str = settings.key(
        "auto", "of the shards; auto: lz4 in a directory, zstd in a store", among=("auto", *COMPRESSIONS)
    )
    shard_mb: int = settings.key(64, "uncompressed megabytes per shard", at_least=1)
    workers: int = settings.key(1, "processes that write shards", at_least=1)


def synthesise(out: Location, options: SynthesiseOptions) -> Manifest:
    """Write `options.tiles` tiles of the procedural Earth into `out`; an interrupted call is continued by the same call.

    Raises UsageError for an option out of bounds, DataError if `out` holds anything else or the disk or store does not take it.
    """
    settings.check(options)
    return build(
        out,
        ProceduralEarth(options.seed, options.size, options.holdout),
        name=NAME,
        tiles=options.tiles,
        tile_size=options.size,
        shard_rows=rows_per_shard(options.size, options.shard_mb),
        origin={"kind": NAME, "generator": GENERATOR, "seed": options.seed, "holdout": options.holdout},
        compression=options.compression,
        workers=options.workers,
    )


@dataclass(frozen=True)
class ProceduralEarth:
    """A source of tiles for `build`: the world of `seed`, in tiles of `size` x `size` px."""

    seed: int
    size: int
    holdout: float = 0.125

    def blocks(self, start: int, stop: int) -> Iterator[TileBlock]:
        """Tiles start..stop-1, in blocks of at most a row group."""
        rows = rows_per_group(self.size)
        for first in range(start, stop, rows):
            yield _gather([self.tile(i) for i in range(first, min(first + rows, stop))])

    def tile(self, index: int) -> dict[str, Any]:
        """One tile: its place, day and product, and `layers` in the stored dtype, maps (bands, H, W), vectors (bands,)."""
        place = place_of(self.seed, index)
        day, product = _occasion(self.seed, index, place)
        held_out = hashed(key_of(self.seed, "holdout"), np.array([place.block]))[0] < self.holdout
        layers = _drop(self.seed, index, product, _observe(self.seed, index, self.size, place, day, product))
        return {
            "id": str(index),
            "latitude": float(place.latitude),
            "longitude": float(place.longitude),
            "date": day,
            "product": product,
            "crs": _utm(float(place.latitude), float(place.longitude)),
            "split": "val" if held_out else "train",
            "source": NAME,
            "layers": layers,
        }


def place_of(seed: int, index: int) -> Climate:
    """The place of a tile: near an earlier tile's for some, else on land, all biomes alike as far as they can be found."""
    move, near = _first_step(seed, index)
    if near is None:
        return _search(seed, move)
    anchor_move = move
    while near is not None:  # a neighbour of a neighbour lies near the tile that found its place by itself
        anchor_move, near = _first_step(seed, near)
    anchor = _search(seed, anchor_move)
    north, east = np.clip(1500 * move.standard_normal(2), -4000, 4000) / METRES_PER_DEGREE
    _, south, west = block_of(np.array([anchor.latitude]), np.array([anchor.longitude]))
    wide = 360 / columns_of(south)
    inside = (_MARGIN, 1 - _MARGIN)
    latitude = south + BLOCK_DEGREES * np.clip((anchor.latitude + north - south) / BLOCK_DEGREES, *inside)
    east = east / np.cos(np.radians(anchor.latitude))
    longitude = west + wide * np.clip((anchor.longitude + east - west) / wide, *inside)
    return climate_at(seed, latitude, longitude).at(0)


def _first_step(seed: int, index: int) -> tuple[np.random.Generator, int | None]:
    """The tile's generator after its first choice, and the earlier tile that it is to lie near, if any."""
    move = generator(seed, "place", index)
    alone = move.random() >= _NEIGHBOURS or index == 0
    return move, None if alone else int(move.integers(index))


def _search(seed: int, move: np.random.Generator) -> Climate:
    """Among random points of the globe, one on land in a biome drawn evenly of all; the first on land if there is none."""
    wanted = move.integers(14)
    latitude = np.degrees(np.arcsin(move.uniform(np.sin(np.radians(-58)), np.sin(np.radians(80)), _CANDIDATES)))
    longitude = move.uniform(-180, 180, _CANDIDATES)
    # Keep away from the edges of the place block.
    _, south, west = block_of(latitude, longitude)
    wide = 360 / columns_of(south)
    shrink = 1 - 2 * _MARGIN
    latitude = south + _MARGIN * BLOCK_DEGREES + (latitude - south) * shrink
    longitude = west + _MARGIN * wide + (longitude - west) * shrink
    climate = climate_at(seed, latitude, longitude)
    land = climate.elevation > 0
    for rule in (land & (climate.biome == wanted), land, np.ones(_CANDIDATES, bool)):
        if rule.any():
            return climate.at(int(np.argmax(rule)))
    raise AssertionError("the last rule accepts every place")


def _occasion(seed: int, index: int, place: Climate) -> tuple[date, str]:
    """Day and product of the Sentinel-2 scene: an even year, a day with enough sun, a fair coin where both products exist."""
    random = generator(seed, "occasion", index)
    first, end = _WINDOWS[2017 + int(random.integers(4))]
    days = [first + timedelta(int(n)) for n in random.integers((end - first).days, size=12)]
    heights = [optics.sun_at(float(place.latitude), day)[0] for day in days]
    bright = [day for day, height in zip(days, heights, strict=True) if height > _LOWEST_SUN]
    day = bright[0] if bright else days[int(np.argmax(heights))]
    surface = 0.5 if day >= _L2A_GLOBAL else 0.25
    return day, "l2a" if random.random() < surface else "l1c"


def _observe(seed: int, index: int, size: int, place: Climate, day: date, product: str) -> dict[str, np.ndarray]:
    """All layers of the table, before whole layers go missing."""
    ground = ground_at(seed, place, size)
    sun = optics.sun_at(float(place.latitude), day)
    sky = optics.sky_over(seed, index, ground, sun)
    number = optics.sentinel2(
        seed, index, place, ground, sky, optics.surface_reflectance(seed, place, ground, day, sun), product
    )
    quality = optics.quality(seed, index, ground, sky, number, product)
    latitude, longitude, month = np.radians(place.latitude), np.radians(place.longitude), 2 * np.pi * day.month / 12
    return {
        "sentinel2": number,
        "sentinel1": radar.sentinel1(seed, index, place, ground, day.month),
        "aster": maps.aster(seed, index, ground),
        "era5": maps.weather(seed, index, place, day),
        "dynamic_world": maps.dynamic_world(seed, index, ground),
        "canopy_height_eth": maps.canopy_height(seed, index, ground),
        "lat": np.array([np.sin(latitude), np.cos(latitude)], np.float32),
        "lon": np.array([np.sin(longitude), np.cos(longitude)], np.float32),
        "biome": np.asarray(place.biome, np.int16),
        "eco_region": np.asarray(place.eco_region, np.int16),
        "month": np.array([np.sin(month), np.cos(month)], np.float32),
        "esa_worldcover": maps.worldcover(ground),
        "sentinel2_cloudmask": quality["QA60"],
        "sentinel2_cloudprod": quality["MSK_CLDPRB"],
        "sentinel2_scl": quality["SCL"],
    }


def _drop(seed: int, index: int, product: str, layers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whole layers that are missing: no Dynamic World scene, no weather (or none of one period), no QA60, and L2A scenes
    without a cloud probability, whose layers after Sentinel-2 the release stores shifted and so are not to be trusted."""
    random = generator(seed, "gaps", index)
    world, era, mask, shifted = random.random(4)
    fill: dict[str, Any] = {}
    if world < 0.03:
        fill["dynamic_world"] = 0
    if era < 0.02:
        fill["era5"] = np.nan
    elif era < 0.03:
        layers["era5"][4 * int(random.integers(3)) :][:4] = np.nan
    if mask < 0.02:
        fill["sentinel2_cloudmask"] = 65535
    if product == "l2a" and shifted < 0.04:
        fill |= {
            "sentinel2_cloudprod": 65535, "sentinel1": -np.inf, "aster": maps.ASTER_GAP, "dynamic_world": 0,
            "canopy_height_eth": maps.CANOPY_GAP, "esa_worldcover": 0,
        }  # fmt: skip
    return layers | {name: np.full_like(layers[name], value) for name, value in fill.items()}


def _gather(tiles: list[dict[str, Any]]) -> TileBlock:
    """Tiles as one block; a layer is present where it holds at least one valid value."""
    layers = {m.name: np.stack([tile["layers"][m.name] for tile in tiles]) for m in TABLE}
    return TileBlock(
        **{key: [tile[key] for tile in tiles] for key in ("id", "date", "product", "crs", "split", "source")},
        latitude=np.array([tile["latitude"] for tile in tiles]),
        longitude=np.array([tile["longitude"] for tile in tiles]),
        layers=layers,
        present={m.name: has_value(layers[m.name], m) for m in TABLE},
    )


def _utm(latitude: float, longitude: float) -> str:
    """EPSG code of the UTM zone of a place (exceptions round Norway and Svalbard left out)."""
    zone = min(60, int((longitude + 180) // 6) + 1)
    return f"EPSG:{32600 + zone if latitude >= 0 else 32700 + zone}"
