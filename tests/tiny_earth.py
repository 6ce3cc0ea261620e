"""A small data set of random but well-formed tiles, written straight into shards: for tests of everything behind them."""

from datetime import date, timedelta
from pathlib import Path

import numpy as np

from mmearth_ray.modalities import TABLE, Kind, Level, Modality
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.schema import TileBlock
from mmearth_ray.shards.write import write_shard
from mmearth_ray.stream.shard import Shard


def make_data_set(
    path: Path, tiles: int = 48, size: int = 16, row_group: int = 8, shard_rows: int = 24, held_out: int = 0, name: str = "tiny"
) -> Manifest:
    """Tile i is a function of i alone.  The last `held_out` tiles are of split `val`."""
    path.mkdir(parents=True, exist_ok=True)
    records = []
    for index, start in enumerate(range(0, tiles, shard_rows)):
        stop = min(start + shard_rows, tiles)
        blocks = [make_block(range(g, min(g + row_group, stop)), size, tiles - held_out) for g in range(start, stop, row_group)]
        records.append(write_shard(path / f"part-{index:05d}.parquet", blocks, size))
    manifest = Manifest(path, name, size, tuple(records), {"kind": "tiny", "tiles": tiles})
    manifest.save()
    return manifest


def shard_at(path: Path) -> Shard:
    """A file on its own, of which no manifest tells anything but its size."""
    return Shard(path, path.stat().st_size, "", 0)


def make_block(numbers: range, size: int, train_tiles: int) -> TileBlock:
    rngs = [np.random.default_rng([7, i]) for i in numbers]
    layers = {m.name: np.stack([_layer(m, rng, size) for rng in rngs]) for m in TABLE}
    products = [("l1c", "l2a")[i % 2] for i in numbers]
    for row, i in enumerate(numbers):
        if i % 3 == 0:
            layers["sentinel1"][row, 4:] = -np.inf  # no descending orbit
        if i % 5 == 0:
            layers["sentinel1"][row] = -np.inf
        if i % 4 == 0:
            layers["sentinel2"][row, :, :3, :4] = 0
        if i % 6 == 0:
            layers["era5"][row, 3] = np.nan
        if products[row] == "l2a":
            layers["sentinel2"][row, 10] = 0
    layers["canopy_height_eth"][:, 1] = 127  # a band without any valid value
    return TileBlock(
        id=[str(i) for i in numbers],
        latitude=np.array([i * 0.5 for i in numbers]),
        longitude=np.array([-i * 0.25 for i in numbers]),
        date=[date(2018, 1, 1) + timedelta(days=9 * i) for i in numbers],
        product=products,
        crs=["EPSG:32610" for _ in numbers],
        split=["train" if i < train_tiles else "val" for i in numbers],
        source=["even" if i % 2 == 0 else "odd" for i in numbers],
        layers=layers,
        present={m.name: _any_valid(m, layers[m.name]) for m in TABLE},
    )


def _layer(m: Modality, rng: np.random.Generator, size: int) -> np.ndarray:
    shape = (len(m.bands), size, size) if m.level is Level.PIXEL else (len(m.bands),)
    if m.kind is Kind.CONTINUOUS:
        low, high = np.array(m.bounds).T.reshape(2, len(m.bands), *([1, 1] if m.level is Level.PIXEL else []))
        values = low + (high - low) * (0.4 + 0.1 * rng.standard_normal(shape))
        return np.clip(values, low, high).astype(m.dtype)
    if m.level is Level.IMAGE:
        return np.array(rng.integers(-1, m.width), m.dtype)
    codes = np.array([c.code for c in m.classes] + list(m.missing))
    return rng.choice(codes, shape).astype(m.dtype)


def _any_valid(m: Modality, layer: np.ndarray) -> np.ndarray:
    if m.kind is Kind.CATEGORICAL:
        known = layer >= 0 if m.level is Level.IMAGE else (m.label_table()[layer] >= 0).any((1, 2, 3))
        return np.asarray(known)
    return m.valid(layer).reshape(len(layer), -1).any(1)
