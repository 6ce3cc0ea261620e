"""Sentinel-2 over the procedural Earth: reflectance of covers through the seasons, sunlight on slopes, air, clouds, noise.

Bands are in the table's order, B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B10 B11 B12.  Reflectances are 0..1 until they are stored
x 10000.  Spectra are rounded typical values of their kind, drawn up for this generator, not measurements.
"""

from dataclasses import dataclass
from datetime import date

import numpy as np

from mmearth_ray.shards.earth import landscape
from mmearth_ray.shards.earth.climate import LAPSE_RATE, ZERO_CELSIUS, Climate
from mmearth_ray.shards.earth.landscape import Ground
from mmearth_ray.shards.earth.noise import blurred, coarsened, generator, key_of, logistic, plane_fractal, plane_noise

B10 = 10
GRID = (6, 1, 1, 1, 2, 2, 2, 2, 1, 6, 6, 2, 2)
"""Native pixel width of each band in pixels of 10 m (Sentinel-2 User Handbook: 10, 20 or 60 m)."""
_NOISE = np.array([12, 18, 20, 20, 20, 22, 24, 26, 30, 14, 2, 18, 16], np.float32) / 10_000

_GREEN = np.array([  # x 10000: each cover with its leaves on (or, for what has none, as it is)
    [420, 380, 320, 190, 150, 120, 110, 90, 100, 90, 5, 50, 30],
    [200, 250, 560, 300, 950, 2700, 3350, 3700, 3550, 3750, 8, 1700, 780],
    [160, 190, 350, 230, 600, 1600, 1950, 2150, 2050, 2200, 8, 950, 430],
    [300, 380, 640, 500, 1050, 2100, 2500, 2750, 2600, 2850, 8, 1950, 1100],
    [320, 420, 830, 520, 1250, 2900, 3550, 3900, 3750, 4000, 8, 2350, 1250],
    [280, 350, 780, 380, 1080, 3350, 4300, 4700, 4500, 4750, 8, 2000, 950],
    [1150, 1300, 1480, 1600, 1720, 1850, 1960, 2080, 2050, 2150, 10, 2300, 2100],
    [700, 900, 1250, 1600, 1800, 1900, 2050, 2200, 2100, 2300, 12, 2900, 2500],
    [8700, 8900, 8900, 8800, 8700, 8500, 8200, 7500, 8100, 7300, 15, 850, 650],
    [240, 320, 620, 400, 860, 2050, 2500, 2750, 2650, 2850, 8, 1250, 580],
    [200, 240, 470, 270, 750, 2300, 2850, 3100, 3000, 3150, 8, 1100, 450],
    [480, 580, 880, 920, 1250, 1900, 2250, 2500, 2350, 2600, 8, 2250, 1350],
], np.float32) / 10_000  # fmt: skip
_LITTER = np.array([600, 780, 1120, 1480, 1850, 2150, 2350, 2600, 2500, 2700, 10, 3250, 2350], np.float32) / 10_000
_TWIGS = np.array([420, 520, 700, 860, 1080, 1500, 1750, 1950, 1850, 2050, 10, 2050, 1350], np.float32) / 10_000
_BROWN = np.array([520, 660, 920, 1200, 1420, 1580, 1750, 1950, 1850, 2050, 10, 2600, 2250], np.float32) / 10_000
_SAND = np.array([1250, 1600, 2350, 3100, 3400, 3550, 3750, 3950, 3850, 4050, 15, 4900, 4400], np.float32) / 10_000
_SILT = np.array([850, 1000, 1350, 1300, 1250, 650, 600, 430, 500, 400, 8, 150, 100], np.float32) / 10_000
_CLOUD = np.array([6400, 6600, 6500, 6500, 6600, 6700, 6800, 6900, 6800, 6300, 250, 4600, 3500], np.float32) / 10_000
# A clear sky: path reflectance, falling with wavelength (Rayleigh), and two-way transmission, low in water vapour (B9, B10).
_PATH = np.array([960, 640, 370, 210, 165, 125, 110, 80, 95, 55, 4, 12, 6], np.float32) / 10_000
_THROUGH = np.array([0.78, 0.84, 0.89, 0.92, 0.93, 0.94, 0.95, 0.96, 0.95, 0.30, 0.02, 0.96, 0.95], np.float32)
_HAZE = np.array([1, 0.9, 0.75, 0.6, 0.5, 0.42, 0.36, 0.3, 0.32, 0.15, 0.01, 0.1, 0.06], np.float32) * 0.05


@dataclass(frozen=True)
class Sky:
    """Clouds over a tile: thickness and shadow (H, W) 0..1, cirrus (H, W) 0..1, haze: a number, 0 clear to 1 thick."""

    thickness: np.ndarray
    shadow: np.ndarray
    cirrus: np.ndarray
    haze: float


def sun_at(latitude: float, day: date) -> tuple[float, float]:
    """Height of the sun and its azimuth (clockwise from north), degrees, at 10:30 local solar time.

    Declination after Cooper (1969).
    """
    declination = np.radians(23.45 * np.sin(2 * np.pi * (284 + day.timetuple().tm_yday) / 365))
    phi, hour = np.radians(latitude), np.radians(-22.5)
    up = np.sin(phi) * np.sin(declination) + np.cos(phi) * np.cos(declination) * np.cos(hour)
    east = -np.cos(declination) * np.sin(hour)
    north = np.cos(phi) * np.sin(declination) - np.sin(phi) * np.cos(declination) * np.cos(hour)
    return float(np.degrees(np.arcsin(up))), float(np.degrees(np.arctan2(east, north)) % 360)


def sky_over(seed: int, tile: int, ground: Ground, sun: tuple[float, float]) -> Sky:
    """The tile's own sky: clear for most, scattered clouds with shadows for some, cirrus for a few."""
    random = generator(seed, "sky", tile)
    kind, amount, thin, hazy = random.random(4)
    shape = ground.elevation.shape
    zero = np.zeros(shape, np.float32)
    haze = float(0.1 + 0.9 * hazy**2.5)
    cirrus = zero
    if thin < 0.07:
        cirrus = np.clip(0.25 + 0.2 * plane_fractal((seed, "cirrus", tile), ground.x, ground.y, (900, 250)), 0, 0.6)
    if kind > 0.15:
        return Sky(zero, zero, cirrus, haze)
    height, azimuth = 600 + 900 * random.random(), np.radians(sun[1])
    reach = height / np.tan(np.radians(max(sun[0], 12)))
    level = 1.9 - 2.2 * amount**2

    def cover(dx: float, dy: float) -> np.ndarray:
        field = plane_fractal((seed, "cloud", tile), ground.x + dx, ground.y + dy, (260, 110, 45, 20), 0.55)
        return np.clip((field - level) / 0.7, 0, 1).astype(np.float32)

    # A shadow lies away from the sun: the pixel's cloud stands `reach` metres towards it.
    shadow = cover(reach * np.sin(azimuth), reach * np.cos(azimuth))
    return Sky(cover(0, 0), shadow, cirrus, haze)


def surface_reflectance(seed: int, place: Climate, ground: Ground, day: date, sun: tuple[float, float]) -> np.ndarray:
    """Reflectance (13, H, W) of the lit ground without air: leaves and soil by season, snow, water, slopes in the sun."""
    month = day.month + (day.day - 15) / 30
    cover = ground.cover
    leaves = _greenness(place, ground, month)
    soil = (_BROWN + float(place.soil) * (_SAND - _BROWN)) * (1 - 0.1 * min(1.0, float(place.precipitation)))
    rest = np.stack([
        _GREEN[0], _TWIGS, _GREEN[2], 0.5 * (_TWIGS + soil), 0.75 * _LITTER + 0.25 * soil, soil, _GREEN[6], soil, _GREEN[8],
        0.6 * _TWIGS + 0.1 * _LITTER, _TWIGS, _GREEN[11],
    ]).astype(np.float32)  # fmt: skip
    light = rest.T[:, cover]
    light += leaves * (_GREEN.T[:, cover] - light)
    light *= _brightness(ground)
    water = cover == landscape.WATER
    if water.any():
        deep = np.clip(-ground.shore / 90, 0, 1) * (0.3 + 0.7 * (place.elevation < 60))
        muddy = np.clip(0.65 - 0.22 * place.wetness - 0.6 * deep + 0.1 * ground.patches, 0.02, 1)
        light = np.where(water, _GREEN[0][:, None, None] + muddy * (_SILT - _GREEN[0])[:, None, None], light)
    local = place.monthly_temperature(month) - ZERO_CELSIUS - LAPSE_RATE * (ground.elevation - place.elevation)
    white = logistic(-(local + 3 + 0.8 * ground.patches) / 0.8) * min(1.0, float(place.precipitation) / 0.25)
    white = (white * np.array([0.55, 0.7, 0.3, 0.75, 0.98, 0.98, 0.5, 0.92, 1, 0.95, 0.3, 0.95])[cover]).astype(np.float32)
    light += white * (_GREEN[landscape.SNOW][:, None, None] * (1 + 0.03 * ground.texture) - light)
    return light * _illumination(ground, sun, water)


def _greenness(place: Climate, ground: Ground, month: float) -> np.ndarray:
    """Share of a pixel (H, W) that is green leaves: by warmth, by rain of late, by each field's own calendar."""
    warm = float(logistic(np.asarray((place.monthly_temperature(month) - ZERO_CELSIUS - 7) / 2.2)))
    rain = 0.5 * (place.monthly_precipitation(month) + place.monthly_precipitation(month - 1))
    moist = float(np.clip(rain / 0.055, 0.04, 1))
    alive = warm * moist
    evergreen = place.biome in (1, 9)
    by_cover = np.array([
        1, 0.92 if evergreen else 0.1 + 0.85 * warm * moist**0.5, 0.85 + 0.15 * warm, 0.15 + 0.6 * warm * moist**0.6,
        0.08 + 0.85 * alive, 1, 1, 0, 1, 0.2 + 0.75 * warm, 0.95, 0.4 + 0.6 * warm,
    ], np.float32)  # fmt: skip
    leaves = by_cover[ground.cover] * (1 + 0.08 * ground.patches + 0.12 * (0.5 - ground.exposure))
    leaves = np.where(ground.cover == landscape.GRASS, leaves * (0.75 + 0.5 * ground.parcel), leaves)
    # A field is sown and harvested at its own time: green around the warm month, earlier or later by up to three months.
    peak = (6.6 if place.latitude >= 0 else 0.6) + 6 * (ground.parcel * 13 % 1 - 0.5)
    season = np.cos(2 * np.pi * (month - peak) / 12)
    crop = warm * (0.35 + 0.65 * moist) * logistic(5 * (season - 0.25))
    leaves = np.where(ground.cover == landscape.CROP, crop * (0.85 + 0.05 * ground.patches), leaves)
    still = np.isin(ground.cover, (landscape.WATER, landscape.BUILT, landscape.SNOW))
    return np.where(still, 1, np.clip(leaves, 0, 1)).astype(np.float32)


def _brightness(ground: Ground) -> np.ndarray:
    """Factor (H, W) about 1: crowns and their shadows, roofs, moist hollows, parcels."""
    rough = np.array([0, 0.11, 0.15, 0.10, 0.05, 0.03, 0.22, 0.05, 0.03, 0.08, 0.08, 0.05], np.float32)[ground.cover]
    field = np.array([0, 0.02, 0.02, 0.04, 0.10, 0.28, 0.5, 0.0, 0, 0.05, 0, 0], np.float32)[ground.cover]
    dry = np.array([0, 0.08, 0.08, 0.2, 0.2, 0.25, 0, 0.35, 0, 0.2, 0, 0.2], np.float32)[ground.cover]
    factor = 1 + rough * ground.texture + field * (ground.parcel * 7 % 1 - 0.5) + dry * (ground.exposure - 0.5)
    return np.clip(factor + 0.03 * ground.patches, 0.3, 1.8).astype(np.float32)


def _illumination(ground: Ground, sun: tuple[float, float], water: np.ndarray) -> np.ndarray:
    """Factor (H, W) about 1: direct light by the cosine of incidence, a fifth of it diffuse; flat on water."""
    up, azimuth = np.sin(np.radians(sun[0])), np.radians(sun[1])
    flat = np.cos(np.radians(sun[0]))
    facing = up - flat * (ground.east * np.sin(azimuth) + ground.north * np.cos(azimuth))
    cosine = facing / np.sqrt(1 + ground.east**2 + ground.north**2)
    return np.where(water, 1, np.clip(0.2 + 0.8 * cosine / max(up, 0.3), 0.12, 1.7)).astype(np.float32)


def sentinel2(seed: int, tile: int, place: Climate, ground: Ground, sky: Sky, surface: np.ndarray, product: str) -> np.ndarray:
    """Digital numbers (13, H, W) uint16, reflectance x 10000, of product l1c (top of atmosphere) or l2a (surface, B10 = 0)."""
    random = generator(seed, "sentinel2", tile)
    calibration = (1 + 0.015 * random.standard_normal(13)).astype(np.float32)[:, None, None]
    lit = surface * (1 - 0.62 * sky.shadow)
    if product == "l1c":
        thin = np.float32(np.exp(-max(float(place.elevation), 0) / 8400))  # air above the place, of that above the sea
        air = 1 + (_THROUGH - 1) * (0.35 + 0.65 * thin)
        path = _PATH * thin + (0.2 + sky.haze) * _HAZE
        seen = path[:, None, None] + air[:, None, None] * lit
    else:  # the correction leaves some haze and its own errors behind
        left = 0.12 * sky.haze * _HAZE + 0.0015 * random.standard_normal(13).astype(np.float32)
        seen = lit + left[:, None, None]
    veil = np.maximum(sky.thickness, 0)[None] * 0.97 + 0.35 * sky.cirrus[None]
    cloud = _CLOUD[:, None, None] * (1 if product == "l2a" else 0.5 + 0.5 * _THROUGH[:, None, None] ** 0.3)
    seen = seen + np.minimum(veil, 1) * (cloud * (1 + 0.05 * ground.patches) - seen)
    seen[B10] += 0.06 * sky.cirrus
    seen = blurred(seen * calibration)
    for factor in (2, 6):
        bands = [band for band, width in enumerate(GRID) if width == factor]
        seen[bands] = coarsened(seen[bands], factor)
    noise = random.standard_normal(seen.shape, np.float32) * _NOISE[:, None, None]
    number = np.clip(np.floor((seen + noise) * 10_000), 1, 18_000).astype(np.uint16)
    if product == "l2a":
        number[B10] = 0
    if random.random() < 0.05:  # a corner where the scene has no data
        far = ground.x[None] - ground.x.mean() + (ground.y[:, None] - ground.y.mean()) * (2 * random.random() - 1)
        number[:, far > np.quantile(far, 0.85 + 0.14 * random.random())] = 0
    return number


def quality(seed: int, tile: int, ground: Ground, sky: Sky, number: np.ndarray, product: str) -> dict[str, np.ndarray]:
    """QA60 (uint16), cloud probability in % (uint16) and SCL (uint8), each (1, H, W), as that product carries them."""
    shape = ground.cover.shape
    opaque, cirrus = coarsened(sky.thickness, 6) > 0.45, coarsened(sky.cirrus, 6) > 0.3
    qa60 = np.where(opaque, 1024, np.where(cirrus, 2048, 0)).astype(np.uint16)
    if product == "l1c":
        return {
            "QA60": qa60[None],
            "MSK_CLDPRB": np.full((1, *shape), 65535, np.uint16),
            "SCL": np.full((1, *shape), 255, np.uint8),
        }
    doubt = 4 * np.abs(plane_noise(key_of(seed, "cloud doubt", tile), ground.x, ground.y, 40))
    chance = np.clip(100 * np.minimum(1.4 * sky.thickness, 1) + 25 * sky.cirrus + np.where(opaque, 0, doubt), 0, 100)
    red, near, swir = (number[band].astype(np.float32) for band in (3, 8, 11))
    green = number[2].astype(np.float32)
    ndvi = (near - red) / np.maximum(near + red, 1)
    snow = ((green - swir) / np.maximum(green + swir, 1) > 0.42) & (near > 2500)
    rules = [
        (number[3] == 0, 255), (chance > 80, 9), (chance > 45, 8), (sky.cirrus > 0.3, 10), (sky.shadow > 0.4, 3),
        (snow, 11), (ground.cover == landscape.WATER, 6), (ndvi > 0.4, 4), (near < 900, 2), (chance > 20, 7),
    ]  # fmt: skip
    scl = np.select([rule for rule, _ in rules], [code for _, code in rules], default=5).astype(np.uint8)
    return {"QA60": qa60[None], "MSK_CLDPRB": chance.astype(np.uint16)[None], "SCL": scl[None]}
