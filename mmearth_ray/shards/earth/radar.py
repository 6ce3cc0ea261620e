"""Sentinel-1 over the procedural Earth: backscatter by cover, moisture and slope towards each orbit's view, with speckle."""

import numpy as np

from mmearth_ray.shards.earth.climate import Climate
from mmearth_ray.shards.earth.landscape import BUILT, CROP, WATER, Ground
from mmearth_ray.shards.earth.noise import blurred, generator

_BACKSCATTER = np.array([  # dB: VV VH HH HV, typical C-band values by cover, drawn up for this generator
    [-21.0, -29.0, -22.0, -30.0],
    [-8.6, -14.2, -8.4, -14.5],
    [-9.4, -15.4, -9.2, -15.8],
    [-11.2, -17.6, -11.0, -18.0],
    [-12.2, -19.6, -12.0, -20.0],
    [-11.0, -17.8, -10.8, -18.4],
    [-4.8, -12.0, -4.2, -12.4],
    [-15.5, -25.0, -15.0, -25.5],
    [-13.5, -22.0, -12.5, -22.5],
    [-10.0, -18.2, -9.5, -18.8],
    [-8.0, -13.6, -7.6, -14.0],
    [-13.2, -20.8, -12.8, -21.2],
], np.float32)  # fmt: skip
_MOISTURE = np.array([0, 0.6, 0.4, 1.5, 2.2, 3.2, 0.2, 4.0, 2.5, 0.8, 0.3, 2.0], np.float32)
"""How many dB a cover gains from dry to wet ground."""
_LOOKS = 4.4
"""Equivalent number of looks of an IW ground-range product (Sentinel-1 product definition, 10 m, about 4.4)."""
_INCIDENCE = 38.5
"""Mid-swath incidence angle of the IW mode, degrees."""
_LOOK_EAST = (0.97, -0.97)
"""Eastward part of the horizontal look direction: ascending passes look east, descending ones west."""
DUAL_VV, DUAL_HH, SINGLE_VV = (0, 1), (2, 3), (0,)


def sentinel1(seed: int, tile: int, place: Climate, ground: Ground, month: int) -> np.ndarray:
    """Backscatter in dB (8, H, W) float32: asc VV VH HH HV, desc the same; -inf where there is none."""
    random = generator(seed, "sentinel1", tile)
    size = ground.cover.shape
    result = np.full((8, *size), -np.inf, np.float32)
    rain = float(np.clip(place.monthly_precipitation(month) / 0.12, 0, 1))
    fate, polar, wind = random.random(3)
    orbits = [] if fate < 0.02 else [0] if fate < 0.20 else [1] if fate < 0.36 else [0, 1]
    for orbit in orbits:
        kind, horizontal = random.random(), 0.3 if abs(place.latitude) > 62 else 0.03
        bands = DUAL_HH if kind < horizontal else SINGLE_VV if kind > 0.97 else DUAL_VV
        wet = np.clip(rain + 0.3 * random.standard_normal(), 0, 1) + 0.5 - ground.exposure
        decibel = _mean_backscatter(ground, wet, orbit, np.float32(4 * wind)) + np.float32(0.35 * random.standard_normal())
        for band in bands:
            power = 10 ** (decibel[band] / 10)
            power *= random.standard_gamma(_LOOKS, size, np.float32) / _LOOKS
            result[4 * orbit + band] = 10 * np.log10(np.maximum(0.5 * (power + blurred(power)), 1e-6))
    if orbits and polar < 0.05:  # the edge of a scene
        hidden = ground.x - ground.x.mean() > (polar / 0.05 - 0.5) * (ground.x[-1] - ground.x[0])
        result[4 * orbits[-1] : 4 * orbits[-1] + 4, :, hidden] = -np.inf
    return result


def _mean_backscatter(ground: Ground, wet: np.ndarray, orbit: int, wind: np.float32) -> np.ndarray:
    """dB without speckle (4, H, W), VV VH HH HV."""
    decibel = _BACKSCATTER.T[:, ground.cover]
    decibel += _MOISTURE[ground.cover] * (np.clip(wet, 0, 1) - 0.5)
    # A slope of angle a towards the radar is seen at incidence minus a: brighter, and shadowed on the other side.
    towards = np.degrees(np.arctan(ground.east * _LOOK_EAST[orbit]))
    local = np.clip(_INCIDENCE - towards, 8, 84)
    slope = 10 * np.log10(np.cos(np.radians(local)) / np.cos(np.radians(_INCIDENCE)) * _stretch(local))
    decibel += slope
    decibel += np.where(ground.cover == WATER, wind, 0)
    decibel += np.where(ground.cover == BUILT, 9 * (ground.parcel * 11 % 1) ** 2 - 3, 0)
    decibel += np.where(ground.cover == CROP, 4 * (ground.parcel * 5 % 1 - 0.5), 0)
    decibel += np.clip(0.05 * (ground.canopy - 12), -0.6, 0.8) * (ground.canopy > 4) + 0.25 * ground.patches
    return decibel.astype(np.float32)


def _stretch(local: np.ndarray) -> np.ndarray:
    """Foreshortening: ground area per slant-range cell, against flat ground."""
    return np.sin(np.radians(_INCIDENCE)) / np.sin(np.radians(local))
