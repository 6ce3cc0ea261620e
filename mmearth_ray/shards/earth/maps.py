"""What the slower products say of the procedural Earth: terrain, canopy height, two land-cover maps, monthly weather."""

from datetime import date

import numpy as np

from mmearth_ray.shards.earth.climate import Climate
from mmearth_ray.shards.earth.landscape import BUILT, SNOW, WATER, Ground
from mmearth_ray.shards.earth.noise import coarsened, generator, plane_fractal

ASTER_GAP = -32768
CANOPY_GAP = 127
"""Stored fillers of the release: -inf as int16 and 255 as int8."""
# Both maps' codes for water broadleaf needleleaf shrub grass crop built bare snow wetland mangrove moss.
_DYNAMIC_WORLD = np.array([1, 2, 2, 6, 3, 5, 7, 8, 9, 4, 2, 6], np.uint8)
_WORLDCOVER = np.array([80, 10, 10, 20, 30, 40, 50, 60, 70, 90, 95, 100], np.uint8)
_CONFUSED = {3: 6, 6: 3, 5: 3, 4: 3}
"""Dynamic World codes that are sometimes taken for another: grass and shrub, crops and grass, flooded vegetation and grass."""


def aster(seed: int, tile: int, ground: Ground) -> np.ndarray:
    """Elevation (m) and slope (degrees, truncated) (2, H, W) int16 on a 30 m grid, with a few gaps of -32768."""
    random = generator(seed, "aster", tile)
    error = 1.3 * plane_fractal((seed, "aster error"), ground.x, ground.y, (60, 200), 0.8)
    sea = (ground.cover == WATER) & (ground.elevation <= 0)
    smooth = coarsened(np.where(sea, 0, ground.elevation + error), 3)
    # The error is left out of the slope but for a little: the global product was smoothed before its slopes were taken.
    north, east = np.gradient(coarsened(ground.elevation + 0.35 * error * ~sea, 3), 10.0)
    slope = np.degrees(np.arctan(np.hypot(north, east)))
    result = np.clip(np.stack([smooth, slope]), [[[-500]], [[0]]], [[[8900]], [[89]]]).astype(np.int16)
    if random.random() < 0.08:
        gap = plane_fractal((seed, "aster gap", tile), ground.x, ground.y, (60, 25))
        result[:, gap > 1.7 + 0.6 * random.random()] = ASTER_GAP
    return result


def canopy_height(seed: int, tile: int, ground: Ground) -> np.ndarray:
    """Height and its standard deviation (2, H, W) int8, m; 127 on water, ice and built-up land, as that map leaves them out."""
    random = generator(seed, "canopy", tile)
    noise = random.standard_normal(ground.cover.shape, np.float32)
    height = coarsened(ground.canopy, 2) * (1 + 0.05 * noise) + 0.4 * np.abs(noise)
    spread = 1.6 + 0.17 * height + 0.5 * np.abs(ground.texture)
    result = np.clip(np.stack([height, spread]), 0, 100).astype(np.int8)
    result[:, np.isin(ground.cover, (WATER, BUILT, SNOW))] = CANOPY_GAP
    return result


def dynamic_world(seed: int, tile: int, ground: Ground) -> np.ndarray:
    """Land cover codes (1, H, W) uint8, 1..9: blurred boundaries, some parcels mistaken, clouded spots 0."""
    random = generator(seed, "dynamic world", tile)
    code = _DYNAMIC_WORLD[ground.near]
    mistaken = ground.parcel * 101 % 1 < 0.10 + 0.03 * np.clip(ground.patches, -2, 2)
    table = np.arange(256, dtype=np.uint8)
    for right, wrong in _CONFUSED.items():
        table[right] = wrong
    code = np.where(mistaken, table[code], code)
    if random.random() < 0.10:
        code = np.where(plane_fractal((seed, "unseen", tile), ground.x, ground.y, (90, 30)) > 1.5, 0, code)
    return code[None]


def worldcover(ground: Ground) -> np.ndarray:
    """Land cover codes (1, H, W) uint8, 10..100; narrow roads are lost among fields."""
    code = _WORLDCOVER[ground.cover]
    moved = np.roll(code, 1, axis=1)
    ragged = np.abs(ground.texture) > 1.9
    ragged[:, 0] = False
    return np.where(ragged, moved, code)[None]


def weather(seed: int, tile: int, place: Climate, day: date) -> np.ndarray:
    """ERA5-Land monthly values (12,) float32: previous month, this month, 13 months to now.

    Each is mean, minimum and maximum temperature (K) and precipitation (m).  The 13 months are the release's own: its year
    runs from the same month of the previous year through the current month.
    """
    random = generator(seed, "weather", tile)
    months = range(day.month - 12, day.month + 1)
    mean = np.array([place.monthly_temperature(m) for m in months]) + 0.9 * random.standard_normal(13)
    rain = np.array([place.monthly_precipitation(m) for m in months]) * np.exp(0.3 * random.standard_normal(13))
    day_night = 6 + 4 * np.exp(-place.precipitation) + np.abs(random.standard_normal(13))
    low, high = mean - day_night - 0.15 * place.swing, mean + day_night + 0.1 * place.swing
    periods = [(mean[i], low[i], high[i], rain[i]) for i in (-2, -1)]
    periods.append((mean.mean(), low.min(), high.max(), rain.sum()))
    return np.array(periods, np.float32).reshape(12)
