"""Noise that needs no memory: every value is an integer hash of (key, lattice point), so any place can be asked on its own.

Only element-wise arithmetic is used (no matrix products), so a value does not depend on threads or on what is computed with it.
Suffixes: H, W rows (north to south) and columns (west to east) of a tile; K places.
"""

import hashlib
from functools import lru_cache

import numpy as np

EARTH_RADIUS = 6371.0
"""Mean radius in km (IUGG)."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SPLINE_STD = 0.277
"""Standard deviation of a cubic B-spline over a lattice of uniform(-1, 1) values: sqrt(1/3) times 0.4794 of both axes."""
_VALUE_STD = 0.37
"""The same for three-dimensional smoothstep interpolation: sqrt(1/3 * 0.743^3)."""


@lru_cache(maxsize=4096)
def key_of(*labels: int | str) -> int:
    """A 64-bit key of its own for each list of labels, such as (seed, "river", 3)."""
    text = "/".join(map(str, labels)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def hashed(key: int, *indices: np.ndarray) -> np.ndarray:
    """Uniform values in [0, 1), float64, one for each point of the integer lattice (arrays that broadcast together).

    The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    mixed = np.array([key], np.uint64)
    for index in indices:
        mixed = mixed ^ (np.atleast_1d(index).astype(np.int64).view(np.uint64) * _GOLDEN)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
        mixed = (mixed ^ (mixed >> np.uint64(31))) + _GOLDEN
    return (mixed >> np.uint64(11)) * 2.0**-53


def generator(*labels: int | str) -> np.random.Generator:
    """A counter-based random generator of its own for each list of labels."""
    return np.random.Generator(np.random.Philox(key=key_of(*labels)))


def plane_noise(key: int, x: np.ndarray, y: np.ndarray, spacing: float) -> np.ndarray:
    """Smooth noise (H, W), about standard normal, at columns x (W,) and rows y (H,) in metres.

    A cubic B-spline over lattice points `spacing` metres apart: features are two to four times as wide.
    """
    column, weight_x = _spline(x, spacing)
    row, weight_y = _spline(y, spacing)
    columns = np.arange(column.min(), column.max() + 4)
    rows = np.arange(row.min(), row.max() + 4)
    lattice = ((hashed(key, rows[:, None], columns[None]) * 2 - 1) / _SPLINE_STD).astype(np.float32)
    row, column = row - rows[0], column - columns[0]
    tall = sum(weight_y[k][:, None] * lattice[row + k] for k in range(4))
    wide = np.ascontiguousarray(np.asarray(tall).T)
    return np.asarray(sum(weight_x[k][:, None] * wide[column + k] for k in range(4))).T


def _spline(position: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """First lattice index and the four weights (4, n) of a uniform cubic B-spline."""
    scaled = position / spacing
    whole = np.floor(scaled)
    f = (scaled - whole).astype(np.float32)
    g = 1 - f
    weights = np.stack([g**3, 3 * f**3 - 6 * f**2 + 4, 3 * g**3 - 6 * g**2 + 4, f**3]) / np.float32(6)
    return whole.astype(np.int64), weights


def plane_fractal(
    labels: tuple[int | str, ...], x: np.ndarray, y: np.ndarray, spacings: tuple[float, ...], gain: float = 0.5
) -> np.ndarray:
    """Several octaves of `plane_noise` (H, W), scaled to about unit variance; each is `gain` times the one before."""
    total = np.zeros((len(y), len(x)), np.float32)
    for octave, spacing in enumerate(spacings):
        total += np.float32(gain**octave) * plane_noise(key_of(*labels, octave), x, y, spacing)
    return total / np.float32(sum(gain ** (2 * octave) for octave in range(len(spacings))) ** 0.5)


def sphere_fractal(
    labels: tuple[int | str, ...], points: np.ndarray, wavelengths: tuple[float, ...], gain: float = 0.5
) -> np.ndarray:
    """Noise of unit variance on the globe, float64 (K,), at unit vectors `points` (3, K); wavelengths in km."""
    total = np.zeros(points.shape[1])
    for octave, wavelength in enumerate(wavelengths):
        scaled = points * (2 * EARTH_RADIUS / wavelength)
        whole = np.floor(scaled)
        f = scaled - whole
        s = f * f * (3 - 2 * f)
        corners = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
        base = whole.astype(np.int64)[None] + corners[:, :, None]  # (8, 3, K)
        value = hashed(key_of(*labels, octave), base[:, 0], base[:, 1], base[:, 2]) * 2 - 1
        weight = np.where(corners[:, :, None] == 1, s[None], 1 - s[None]).prod(axis=1)
        total += gain**octave * (value * weight).sum(axis=0) / _VALUE_STD
    return total / sum(gain ** (2 * octave) for octave in range(len(wavelengths))) ** 0.5


def unit_vectors(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Points of the unit sphere (3, K) from degrees."""
    phi, lam = np.radians(latitude), np.radians(longitude)
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])


def coarsened(maps: np.ndarray, factor: int) -> np.ndarray:
    """Maps (..., H, W) as a sensor with pixels `factor` times as wide sees them, resampled bilinearly to the same grid."""
    if factor == 1:
        return maps
    height, width = maps.shape[-2:]
    rows, columns = -(-height // factor), -(-width // factor)
    within_y, within_x = (np.minimum(np.arange(n * factor), end - 1) for n, end in ((rows, height), (columns, width)))
    full = maps[..., within_y, :][..., within_x].reshape(*maps.shape[:-2], rows, factor, columns, factor)
    small = full.mean(axis=(-3, -1), dtype=np.float32)
    i, wi = _between(height, rows, factor)
    j, wj = _between(width, columns, factor)
    tall = small[..., i, :] + wi[:, None] * (small[..., np.minimum(i + 1, rows - 1), :] - small[..., i, :])
    return tall[..., j] + wj * (tall[..., np.minimum(j + 1, columns - 1)] - tall[..., j])


def _between(fine: int, coarse: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    position = np.clip((np.arange(fine) + 0.5) / factor - 0.5, 0, coarse - 1)
    whole = np.floor(position).astype(np.int64)
    return whole, (position - whole).astype(np.float32)


def blurred(maps: np.ndarray) -> np.ndarray:
    """Maps (..., H, W) under a 3 x 3 point spread function (1 2 1, edges repeated)."""
    wide = np.concatenate([maps[..., :1], maps, maps[..., -1:]], axis=-1)
    wide = (wide[..., :-2] + 2 * wide[..., 1:-1] + wide[..., 2:]) * np.float32(0.25)
    tall = np.concatenate([wide[..., :1, :], wide, wide[..., -1:, :]], axis=-2)
    return (tall[..., :-2, :] + 2 * tall[..., 1:-1, :] + tall[..., 2:, :]) * np.float32(0.25)


def logistic(value: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-value)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * value))
