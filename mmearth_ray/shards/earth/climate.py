"""The globe: continents, mountains, weather through the year, and the biome and ecoregion that follow from them.

Everything here is a pure function of (seed, latitude, longitude), vectorised over K places.  The relations are simple fits to
textbook climatology, good to a few kelvin: enough for place, height, season and plants to explain each other.
"""

from dataclasses import dataclass, fields

import numpy as np

from mmearth_ray.shards.earth.noise import EARTH_RADIUS, hashed, key_of, sphere_fractal, unit_vectors

LAPSE_RATE = 6.5e-3
"""K per metre: the International Standard Atmosphere (ISO 2533)."""
ZERO_CELSIUS = 273.15
ECO_REGION_START = (0, 51, 281, 321, 423, 471, 497, 544, 627, 673, 692, 717, 775, 831, 846)
"""First ecoregion label of each biome: RESOLVE Ecoregions 2017 numbered biome by biome, so a biome is one block."""
BLOCK_DEGREES = 0.25
"""Height of a place block, the unit of the spatial hold-out; blocks are about as wide (in km) as high."""


@dataclass(frozen=True)
class Climate:
    """What is known of K places; every field is an array (K,), or a number for one place (`at`).

    latitude, longitude in degrees; block: integer of the place block; elevation in m (sea below 0); relief: standard
    deviation of height within some kilometres, m; temperature: annual mean, K; swing: half of the yearly range of monthly
    means, K; precipitation: m per year; rain_phase: month of most rain; rain_swing 0..1; wetness (water on the ground) and
    people: about standard normal; soil: 0 brown .. 1 pale sand; biome and eco_region: labels of the table.
    """

    latitude: np.ndarray
    longitude: np.ndarray
    block: np.ndarray
    elevation: np.ndarray
    relief: np.ndarray
    temperature: np.ndarray
    swing: np.ndarray
    precipitation: np.ndarray
    rain_phase: np.ndarray
    rain_swing: np.ndarray
    wetness: np.ndarray
    people: np.ndarray
    soil: np.ndarray
    biome: np.ndarray
    eco_region: np.ndarray

    def at(self, index: int) -> "Climate":
        """One place."""
        return Climate(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def monthly_temperature(self, month: float) -> np.ndarray:
        """Mean 2 m temperature of a month (1..12, fractions allowed), K: warmest in mid July, January in the south."""
        warmest = np.where(self.latitude >= 0, 7.2, 1.2)
        return self.temperature + self.swing * np.cos(2 * np.pi * (month - warmest) / 12)

    def monthly_precipitation(self, month: float) -> np.ndarray:
        """Precipitation of a month, m."""
        wave = 1 + self.rain_swing * np.cos(2 * np.pi * (month - self.rain_phase) / 12)
        return self.precipitation / 12 * wave


def block_of(latitude: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(block number, latitude and longitude of the block's south-west corner) of each place."""
    row = np.clip(np.floor((latitude + 90) / BLOCK_DEGREES), 0, 180 / BLOCK_DEGREES - 1)
    south = row * BLOCK_DEGREES - 90
    columns = columns_of(south)
    column = np.clip(np.floor((longitude + 180) / 360 * columns), 0, columns - 1)
    return (row * 10_000 + column).astype(np.int64), south, column / columns * 360 - 180


def columns_of(south: np.ndarray) -> np.ndarray:
    """Number of blocks round the parallel of a row of blocks, whose southern edge is given."""
    return np.maximum(1, np.round(360 / BLOCK_DEGREES * np.cos(np.radians(south + BLOCK_DEGREES / 2))))


def climate_at(seed: int, latitude: np.ndarray, longitude: np.ndarray) -> Climate:
    """The climate of K places, from degrees."""
    points = unit_vectors(latitude, longitude)
    height, relief = _height(seed, points)
    north = np.abs(latitude)
    temperature = 28 - 42 * np.abs(np.sin(np.radians(north))) ** 2.2 + 2.5 * sphere_fractal((seed, "warm"), points, (3000, 900))
    temperature = temperature - LAPSE_RATE * np.maximum(height, 0)
    inland = np.clip(height / 400, 0, 1)
    swing = 1.5 + 20 * np.sin(np.radians(north)) ** 1.2 * (0.55 + 0.45 * inland)
    wet = sphere_fractal((seed, "rain"), points, (3500, 1200, 400))
    zonal = 2.1 * np.exp(-((latitude / 13) ** 2)) + 0.95 * np.exp(-(((north - 50) / 15) ** 2)) + 0.22
    precipitation = np.clip(zonal * np.exp(0.7 * wet), 0.01, 6)
    dry_summer = (north > 27) & (north < 46) & (sphere_fractal((seed, "west"), points, (4000,)) > 0.1)
    summer_month = np.where(latitude >= 0, 7.5, 1.5)
    wetness = sphere_fractal((seed, "ground water"), points, (700, 150))
    soil = np.clip(0.5 - 0.35 * wet + 0.2 * sphere_fractal((seed, "soil"), points, (500, 60)), 0, 1)
    biome = _biome(north, height, temperature, swing, precipitation, dry_summer, wetness)
    return Climate(
        latitude=latitude,
        longitude=longitude,
        block=block_of(latitude, longitude)[0],
        elevation=height,
        relief=relief,
        temperature=temperature + ZERO_CELSIUS,
        swing=swing,
        precipitation=precipitation,
        rain_phase=np.where(dry_summer, (summer_month + 5) % 12 + 1, summer_month),
        rain_swing=np.clip(0.85 - 0.012 * north, 0.15, 0.85),
        wetness=wetness,
        people=sphere_fractal((seed, "people"), points, (900, 200, 50)),
        soil=soil,
        biome=biome,
        eco_region=_eco_region(seed, latitude, longitude, points, biome),
    )


def _height(seed: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Elevation (m, negative in the sea) and relief (m) at unit vectors (3, K)."""
    continent = sphere_fractal((seed, "continent"), points, (5000, 1600, 500, 150)) + 0.25
    belt = np.abs(sphere_fractal((seed, "belt"), points, (4500, 1500, 500)))
    mountains = np.clip(1 - 2.1 * belt, 0, 1) ** 1.3 * np.clip(continent * 2.5, 0, 1)
    rough = np.clip(0.5 + 0.35 * sphere_fractal((seed, "rough"), points, (600, 120)), 0.02, 1.5)
    meso = sphere_fractal((seed, "meso"), points, (90, 30))
    height = np.where(continent > 0, 240 * continent + 500 * np.maximum(continent - 0.5, 0) ** 1.5, 400 * continent)
    relief = (2 + 26 * rough * np.clip(continent * 4, 0.1, 1)) + 260 * mountains * (0.5 + rough)
    return height + 2700 * mountains + np.clip(continent * 5, 0, 1) * relief * 0.9 * meso, relief


def elevation_plane(seed: int, latitude: float, longitude: float) -> tuple[float, float]:
    """Slope of the globe's elevation at a place, in m per m towards the east and the north, from points 1 km away."""
    step = np.degrees(1 / EARTH_RADIUS)
    wide = step / max(np.cos(np.radians(latitude)), 0.05)
    latitudes = latitude + np.array([0, 0, -step, step])
    longitudes = longitude + np.array([-wide, wide, 0, 0])
    height, _ = _height(seed, unit_vectors(latitudes, longitudes))
    return float(height[1] - height[0]) / 2000, float(height[3] - height[2]) / 2000


def _biome(
    north: np.ndarray,
    height: np.ndarray,
    mean: np.ndarray,
    swing: np.ndarray,
    rain: np.ndarray,
    dry_summer: np.ndarray,
    wetness: np.ndarray,
) -> np.ndarray:
    """Biome label (K,) by a cascade of climatic limits; temperatures in degrees Celsius, rain in m per year.

    Limits after Whittaker (1975): 10 degrees in the warmest month bounds the trees; dryness weighs rain against warmth.
    """
    summer = mean + swing
    tropical = (mean > 18) | ((north < 23.5) & (mean > 14))
    rules = [
        (tropical & (height < 35) & (rain > 0.7) & (mean > 20), 9),
        ((height > 2200) & (north < 50) & (summer > 4), 8),
        (summer < 10.5, 0),
        (rain < 0.12 + 0.011 * np.maximum(mean, 0), 3),
        ((wetness > 0.9) & (height < 450) & (mean > 9), 10),
        (mean < 2.5, 5),
        (tropical & (height > 650) & (rain > 0.6) & (rain < 1.7), 13),
        (tropical & (rain > 1.55), 1),
        (tropical & (rain > 1.0), 12),
        (tropical, 11),
        (dry_summer & (mean > 8), 2),
        (rain < 0.52, 4),
        ((height > 650) | (rain > 1.5), 6),
    ]
    return np.select([rule for rule, _ in rules], [label for _, label in rules], default=7).astype(np.int16)


def _eco_region(seed: int, latitude: np.ndarray, longitude: np.ndarray, points: np.ndarray, biome: np.ndarray) -> np.ndarray:
    """Ecoregion label (K,): each cell of a warped graticule of 15 by 30 degrees has one for each biome."""
    warp = sphere_fractal((seed, "region"), points, (1500, 400))
    row, column = np.floor((latitude + 3 * warp) / 15), np.floor((longitude + 4 * warp) / 30)
    start = np.array(ECO_REGION_START)
    first, count = start[biome], start[biome + 1] - start[biome]
    return (first + np.floor(hashed(key_of(seed, "eco region"), biome, row, column) * count)).astype(np.int16)
