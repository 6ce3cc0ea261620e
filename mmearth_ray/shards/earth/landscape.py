"""The land of one tile at 10 m: terrain, water, parcels, towns and the cover that all sensors see.

Maps are (H, W), row 0 in the north.  Nothing here depends on the tile, only on (seed, place of the pixel): overlapping tiles
agree up to the slow fields, which are taken at the tile's centre.
"""

from dataclasses import dataclass, replace

import numpy as np

from mmearth_ray.shards.earth.climate import BLOCK_DEGREES, LAPSE_RATE, ZERO_CELSIUS, Climate, elevation_plane
from mmearth_ray.shards.earth.noise import hashed, key_of, logistic, plane_fractal, plane_noise

PIXEL = 10.0
"""Ground sampling distance, m."""
METRES_PER_DEGREE = 111_194.9
"""One degree of a great circle on a sphere of 6371 km."""

COVERS = (
    "water", "broadleaf", "needleleaf", "shrub", "grass", "crop", "built", "bare", "snow", "wetland", "mangrove", "moss",
)  # fmt: skip
WATER, BROADLEAF, NEEDLELEAF, SHRUB, GRASS, CROP, BUILT, BARE, SNOW, WETLAND, MANGROVE, MOSS = range(len(COVERS))

_ORDER = (MANGROVE, WETLAND, BROADLEAF, NEEDLELEAF, SHRUB, GRASS, MOSS, BARE)
"""Natural covers from the wettest place to the most exposed one."""
_NATURAL = np.array([
    # mangrove wetland broad needle shrub grass moss bare: shares of the natural land, by biome; plausible, not measured
    [0.00, 0.08, 0.01, 0.02, 0.15, 0.21, 0.31, 0.22],
    [0.00, 0.02, 0.84, 0.00, 0.05, 0.07, 0.00, 0.02],
    [0.00, 0.01, 0.16, 0.12, 0.36, 0.25, 0.00, 0.10],
    [0.00, 0.00, 0.00, 0.00, 0.12, 0.08, 0.00, 0.80],
    [0.00, 0.02, 0.06, 0.02, 0.12, 0.70, 0.00, 0.08],
    [0.00, 0.10, 0.15, 0.53, 0.08, 0.07, 0.05, 0.02],
    [0.00, 0.01, 0.10, 0.58, 0.10, 0.15, 0.01, 0.05],
    [0.00, 0.02, 0.54, 0.10, 0.08, 0.24, 0.00, 0.02],
    [0.00, 0.02, 0.02, 0.03, 0.16, 0.52, 0.03, 0.22],
    [0.55, 0.10, 0.17, 0.00, 0.03, 0.10, 0.00, 0.05],
    [0.00, 0.42, 0.08, 0.00, 0.08, 0.40, 0.00, 0.02],
    [0.00, 0.02, 0.22, 0.00, 0.20, 0.51, 0.00, 0.05],
    [0.00, 0.01, 0.58, 0.00, 0.16, 0.20, 0.00, 0.05],
    [0.00, 0.01, 0.20, 0.50, 0.10, 0.16, 0.00, 0.03],
])  # fmt: skip
_TREE_HEIGHT = np.array([6, 32, 12, 6, 12, 15, 27, 23, 10, 14, 14, 13, 19, 22], np.float32)
"""Height of the canopy where it is dense, m, by biome."""
_SCATTER = np.array([0.4, 0.15, 0.6, 0.5, 0.3, 0.4, 0.35, 0.25, 0.35, 0.3, 0.35, 0.75, 0.45, 0.4], np.float32)
"""How far single trees and shrubs mix with what lies beside them, by biome."""


@dataclass(frozen=True)
class Ground:
    """One tile's land, each (H, W) float32 unless said otherwise.

    x, y (W,), (H,): position in m on the sheet of the tile's row of blocks.  elevation in m; east, north: its gradient;
    cover: uint8 index into COVERS; near: the cover that the pixel would have with slightly other noise (what another
    mapper might see); parcel: 0..1 constant within a parcel; texture and patches: noise of unit variance at tens and
    hundreds of metres; exposure: 0 (wet hollow) to 1 (dry crest); canopy: height of plants in m; shore: m from water's edge.
    """

    x: np.ndarray
    y: np.ndarray
    elevation: np.ndarray
    east: np.ndarray
    north: np.ndarray
    cover: np.ndarray
    near: np.ndarray
    parcel: np.ndarray
    texture: np.ndarray
    patches: np.ndarray
    exposure: np.ndarray
    canopy: np.ndarray
    shore: np.ndarray


@dataclass(frozen=True)
class _Parcels:
    """identity: 0..1 per parcel; edge: m to the nearest boundary; road: on a country road; block: 0..1 per town block;
    street: m to the nearest street."""

    identity: np.ndarray
    edge: np.ndarray
    road: np.ndarray
    block: np.ndarray
    street: np.ndarray


@dataclass(frozen=True)
class _Site:
    """What decides the cover: position, elevation z (m), slope (m per m), distance to water, noise and parcels."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    slope: np.ndarray
    shore: np.ndarray
    exposure: np.ndarray
    patches: np.ndarray
    texture: np.ndarray
    parcels: _Parcels


def ground_at(seed: int, place: Climate, size: int) -> Ground:
    """The land of a tile of `size` x `size` pixels centred on a place."""
    # Every row of place blocks is a map sheet of its own, with the parallel through the block's middle at true length.
    parallel = (np.floor(place.latitude / BLOCK_DEGREES) + 0.5) * BLOCK_DEGREES
    offset = (np.arange(size) - (size - 1) / 2) * PIXEL
    x = place.longitude * METRES_PER_DEGREE * np.cos(np.radians(parallel)) + offset
    y = place.latitude * METRES_PER_DEGREE - offset
    river, width = _river(seed, place, x, y)
    lake = plane_fractal((seed, "lake"), x, y, (500, 170, 60), 0.45)
    level = 2.9 - 0.75 * place.wetness + place.relief / 60
    lake_shore = (level - lake) * 180  # about metres, as the noise rises by one within two lattice spacings
    z = _terrain(seed, place, x, y, offset, river, lake_shore)
    coast = np.where(place.elevation < 60, z * 40, 1e4)  # a beach that falls 1 m in 40
    shore = np.minimum(np.minimum(river - width, lake_shore), coast).astype(np.float32)
    z = np.where(place.elevation < 60, np.maximum(z, 0), z).astype(np.float32)
    south, east = (np.asarray(gradient, np.float32) for gradient in np.gradient(z, PIXEL))
    site = _Site(
        x, y, z, np.hypot(south, east), shore, _exposure(seed, place, x, y, z, shore),
        plane_fractal((seed, "patches"), x, y, (260, 110, 45), 0.6), plane_fractal((seed, "texture"), x, y, (14, 30), 0.8),
        _parcels(seed, place, x, y),
    )  # fmt: skip
    cover = _cover(seed, place, site)
    doubt = 0.10 * plane_noise(key_of(seed, "doubt"), x, y, 22)
    near = _cover(seed, place, replace(site, patches=site.patches + doubt, shore=shore + 9 * doubt))
    return Ground(
        x, y, z, east, -south, cover, near, site.parcels.identity, site.texture, site.patches, site.exposure,
        _canopy(seed, place, site, cover), shore,
    )  # fmt: skip


def _river(seed: int, place: Climate, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Metres from the middle of the nearest river (H, W), and half the width of rivers here, m."""
    field = plane_fractal((seed, "river"), x, y, (900, 330, 120), 0.4)
    down, across = np.gradient(field, PIXEL)
    distance = np.abs(field) / (np.hypot(down, across) + 8e-4)
    luck = float(hashed(key_of(seed, "river width"), place.block)[0])
    rain = min(1.0, place.precipitation / 0.9)
    return distance.astype(np.float32), float((6 + 55 * luck**3) * rain - 4)


def _terrain(
    seed: int, place: Climate, x: np.ndarray, y: np.ndarray, offset: np.ndarray, river: np.ndarray, lake: np.ndarray
) -> np.ndarray:
    """Elevation (H, W) in m: the globe's slope, fractal hills (sharper crests in mountains), valleys, flat lakes."""
    east, north = elevation_plane(seed, float(place.latitude), float(place.longitude))
    plane = place.elevation + east * offset[None] - north * offset[:, None]
    broad = plane_fractal((seed, "hills"), x, y, (2600, 1250), 0.55)
    fine = plane_fractal((seed, "slopes"), x, y, (600, 300, 150, 75), 0.5)
    crest = 1 - 1.6 * np.abs(plane_noise(key_of(seed, "crest"), x, y, 900))
    sharp = min(1.0, place.relief / 200)
    hills = 0.8 * broad + 0.5 * sharp * crest
    calm = np.clip(np.minimum(river, np.maximum(lake, 0)) / 160, 0, 1)
    valley = 0.35 * np.exp(-((river / 260) ** 2))
    sea = 1.0 if place.elevation > 60 else 0.4
    return plane + place.relief * sea * (hills - valley + 0.27 * calm * fine)


def _exposure(seed: int, place: Climate, x: np.ndarray, y: np.ndarray, z: np.ndarray, shore: np.ndarray) -> np.ndarray:
    """0 (wet hollow, river bank) to 1 (dry crest), about uniform: noise, height within the tile's relief, distance to water."""
    rise = np.clip((z - place.elevation) / (place.relief + 4), -2, 2)
    bank = np.exp(-np.maximum(shore, 0) / 70)
    drift = plane_fractal((seed, "exposure"), x, y, (800, 280, 90), 0.65)
    return logistic(1.7 * (0.8 * drift + 0.5 * rise - 1.1 * bank + 0.15)).astype(np.float32)


def _parcels(seed: int, place: Climate, x: np.ndarray, y: np.ndarray) -> _Parcels:
    """A country of rectangular fields and, finer, of town blocks, turned by an angle of the place block's own."""
    keys = [key_of(seed, "parcels", int(place.block), i) for i in range(6)]
    angle, spread, shape = hashed(keys[0], np.arange(3))
    length = 170 + 430 * spread**2
    breadth = length * (0.35 + 0.6 * shape)
    bend, sway = (22 * plane_noise(key_of(seed, name), x, y, 240) for name in ("bend", "sway"))
    turn = np.pi * angle
    u = x[None] * np.cos(turn) + y[:, None] * np.sin(turn) + bend
    v = y[:, None] * np.cos(turn) - x[None] * np.sin(turn) + sway
    column, along = np.divmod(u, length)
    row, across = np.divmod(v + breadth * hashed(keys[1], column), breadth)
    split = hashed(keys[2], column, row) < 0.4
    strip = np.where(split, across > breadth / 2, 0)
    across = np.where(split, across % (breadth / 2), across)
    broad = np.where(split, breadth / 2, breadth)
    edge = np.minimum(np.minimum(along, length - along), np.minimum(across, broad - across))
    road = (np.minimum(along, length - along) < 6) & (hashed(keys[3], np.floor(u / length + 0.5)) < 0.3)
    block_u, in_u = np.divmod(u, 95)
    block_v, in_v = np.divmod(v, 62)
    street = np.minimum(np.minimum(in_u, 95 - in_u), np.minimum(in_v, 62 - in_v))
    house_u, house_v = np.floor(in_u / 24), np.floor(in_v / 21)
    block = hashed(keys[4], block_u * 4 + house_u, block_v * 3 + house_v)
    f32 = np.float32
    return _Parcels(
        hashed(keys[5], column, row, strip).astype(f32), edge.astype(f32), road, block.astype(f32), street.astype(f32)
    )


def _cover(seed: int, place: Climate, site: _Site) -> np.ndarray:
    """Index into COVERS (H, W) uint8: natural plants, then fields, towns, water and lasting snow over them."""
    local_mean = place.temperature - ZERO_CELSIUS - LAPSE_RATE * (site.z - place.elevation)
    cold = np.maximum(0, 9 - (local_mean + place.swing)) * 0.09  # above the tree line only low plants and rock
    steep = np.maximum(0, site.slope - 0.75)
    rank = site.exposure + 0.06 * site.patches + 0.10 * _SCATTER[place.biome] * site.texture + cold + steep
    limits = np.cumsum(_NATURAL[place.biome])
    cover = np.array(_ORDER, np.uint8)[np.minimum(np.searchsorted(limits, np.clip(rank, 0, 0.999)), len(_ORDER) - 1)]
    cover = _settled(seed, place, site, _farmed(place, site, cover))
    cover = np.where(site.shore > 0, cover, WATER)
    lasting = (local_mean < -9 + site.patches) & (site.slope < 0.9)
    lasting &= (place.precipitation > 0.15) | (local_mean < -16)
    return np.where(lasting, SNOW, cover).astype(np.uint8)


def _farmed(place: Climate, site: _Site, cover: np.ndarray) -> np.ndarray:
    """Fields where it is warm, watered, flat and peopled, with hedges and pastures between them."""
    parcels = site.parcels
    summer = place.temperature - ZERO_CELSIUS + place.swing
    fit = np.clip((summer - 11) / 6, 0, 1) * np.clip(place.precipitation / 0.5 - 0.3, 0.02, 1)
    share = float(fit * np.clip(0.36 + 0.33 * place.people, 0, 0.93))
    arable = (site.slope < 0.13) & (site.exposure > 0.12)
    crop = arable & (parcels.identity < share)
    pasture = arable & ~crop & (parcels.identity < 1.35 * share) & (cover != WETLAND)
    cover = np.where(crop, CROP, np.where(pasture, GRASS, cover))
    hedge = (crop | pasture) & (parcels.edge < 7) & (parcels.identity * 37 % 1 < 0.35)
    return np.where(hedge, NEEDLELEAF if _NATURAL[place.biome, 3] > _NATURAL[place.biome, 2] else BROADLEAF, cover)


def _settled(seed: int, place: Climate, site: _Site, cover: np.ndarray) -> np.ndarray:
    """Towns of blocks, gardens and streets; country roads along parcel boundaries."""
    if place.temperature - ZERO_CELSIUS + place.swing < 8 or place.people < -0.6:
        return cover
    parcels = site.parcels
    town = plane_fractal((seed, "town"), site.x, site.y, (650, 240), 0.5) + 0.12 * site.patches
    inside = (town > 2.25 - 0.8 * place.people) & (site.slope < 0.25)
    paved = (parcels.street < 6) | (parcels.block < 0.62)
    garden = np.where(parcels.block > 0.83, BROADLEAF, GRASS)
    cover = np.where(inside, np.where(paved, BUILT, garden), cover)
    return np.where(parcels.road & (site.slope < 0.2) & (place.people > -0.2), BUILT, cover)


def _canopy(seed: int, place: Climate, site: _Site, cover: np.ndarray) -> np.ndarray:
    """Height of plants (H, W), m: stands of different age under trees, a metre or two elsewhere."""
    stand = 0.8 + 0.22 * plane_noise(key_of(seed, "stand"), site.x, site.y, 150) + 0.1 * site.patches
    tall = _TREE_HEIGHT[place.biome] * np.clip(stand, 0.15, 1.5) * (1 + 0.12 * site.texture)
    low = np.array([0, 0, 0, 2.2, 0.5, 0.9, 0, 0.1, 0, 1.2, 0, 0.1], np.float32)[cover] * (1 + 0.3 * site.texture)
    tree = np.isin(cover, (BROADLEAF, NEEDLELEAF, MANGROVE))
    return np.clip(np.where(tree, tall, low), 0, 60).astype(np.float32)
