"""A small release in exactly the published form, for tests: values are invented, layout and quirks are not.

Chunked gzip HDF5 with the release's dtypes and fillers, a `metadata` compound, JSON with bare NaN and Infinity, both
products, absent Sentinel-1 orbits, null ERA5, biomes that agree with the ecoregion blocks.  Row i is L2A where i is even;
which rows lack what is said by the functions below, so that a test can ask for a row with some trait.
"""

import json
import math
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np

STEM = "data_fixture_v001"
S2_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12")
# first ecoregion of each biome: RESOLVE Ecoregions 2017 as the release numbers them, biome by biome
ECO_STARTS = (0, 51, 281, 321, 423, 471, 497, 544, 627, 673, 692, 717, 775, 831, 846)
WORLDCOVER = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)
MAPS = {
    "sentinel2": (13, "u2"), "sentinel2_cloudmask": (1, "u2"), "sentinel2_cloudprod": (1, "u2"), "sentinel2_scl": (1, "u1"),
    "sentinel1": (8, "f4"), "aster": (2, "i2"), "dynamic_world": (1, "u1"), "canopy_height_eth": (2, "i1"),
    "esa_worldcover": (1, "u1"),
}  # fmt: skip
VECTORS = {
    "era5": (12, "f4"),
    "lat": (2, "f4"),
    "lon": (2, "f4"),
    "month": (2, "f4"),
    "biome": (14, "u1"),
    "eco_region": (846, "u2"),
}
METADATA = np.dtype([("tile_id", "S100"), ("S2_type", "S10")])


def is_l2a(row: int) -> bool:
    return row % 2 == 0


def is_shifted(row: int) -> bool:
    """An L2A scene without MSK_CLDPRB: its later layers are one band off."""
    return row % 10 == 6


def has_ascending(row: int) -> bool:
    return row % 3 != 0


def has_descending(row: int) -> bool:
    return row % 4 != 3


def has_era5(row: int) -> bool:
    return row % 5 != 4


def place(row: int) -> tuple[float, float]:
    """Latitude and longitude in degrees."""
    return -60.0 + (row * 37.3) % 130, -180.0 + (row * 101.7) % 360


def day(row: int) -> date:
    return date(2017, 1, 1) + timedelta(days=(row * 97) % 1400)


def region(row: int) -> tuple[int, int]:
    """Biome and an ecoregion of its block."""
    biome = (row * 5) % 14
    return biome, ECO_STARTS[biome] + (row * 11) % (ECO_STARTS[biome + 1] - ECO_STARTS[biome])


def write_release(directory: Path, *, tiles: int = 24, size: int = 16, seed: int = 0, stem: str = STEM) -> Path:
    """Write `directory/<stem>.h5` and its three JSON files, and return `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    layers = [tile_layers(row, size, seed) for row in range(tiles)]
    with h5py.File(directory / f"{stem}.h5", "w") as file:
        for name, (bands, _) in {**MAPS, **VECTORS}.items():
            shape = (bands, size, size) if name in MAPS else (bands,)
            values = np.stack([layer[name] for layer in layers])
            file.create_dataset(name, data=values, chunks=(1, *shape), compression="gzip")
        metadata = np.array([(str(row).encode(), b"l2a" if is_l2a(row) else b"l1c") for row in range(tiles)], METADATA)
        file.create_dataset("metadata", data=metadata, chunks=(1,), compression="gzip")
    order = np.random.default_rng(seed).permutation(tiles).tolist()
    write_part(directory, "splits", {"train": order, "val": [], "test": []}, stem)
    write_part(directory, "band_stats", band_statistics(layers), stem)
    write_part(directory, "tile_info", {str(row): tile_info(row) for row in range(tiles)}, stem)
    return directory


def write_part(directory: Path, part: str, value: Any, stem: str = STEM) -> None:
    (directory / f"{stem}_{part}.json").write_text(json.dumps(value), encoding="utf-8")


def read_part(directory: Path, part: str, stem: str = STEM) -> Any:
    return json.loads((directory / f"{stem}_{part}.json").read_text(encoding="utf-8"))


def tile_layers(row: int, size: int, seed: int) -> dict[str, np.ndarray]:
    """The layers of one row as the release stores them."""
    rng = np.random.default_rng((seed, row))
    one = (1, size, size)
    s2 = rng.integers(1, 9000, (13, size, size))
    s2[:, 0, :2] = 0  # a gap at the scene's edge
    if is_l2a(row):
        s2[10] = 0
    s1 = rng.normal(-12, 4, (8, size, size)).astype(np.float32)
    s1[[2, 3, 6, 7]] = -np.inf
    s1[0:4] = s1[0:4] if has_ascending(row) else -np.inf
    s1[4:8] = s1[4:8] if has_descending(row) else -np.inf
    aster = np.stack([rng.integers(-50, 4000, one[1:]), rng.integers(0, 60, one[1:])])
    canopy = rng.integers(0, 40, (2, size, size))
    canopy[:, 1, :3] = 127
    biome, eco_region = region(row)
    latitude, longitude = (math.radians(v) for v in place(row))
    month = 2 * math.pi * day(row).month / 12
    era5 = np.array([280, 270, 290, 0.1, 282, 271, 291, 0.2, 281, 260, 300, 1.5]) + rng.normal(0, 0.01, 12)
    layers = {
        "sentinel2": s2,
        "sentinel2_cloudmask": rng.choice([0, 1024, 2048], one),
        "sentinel2_cloudprod": rng.integers(0, 101, one) if is_l2a(row) and not is_shifted(row) else np.full(one, 65535),
        "sentinel2_scl": rng.integers(1, 12, one) if is_l2a(row) else np.full(one, 255),
        "sentinel1": s1,
        "aster": aster,
        "dynamic_world": rng.integers(0, 10, one) if row % 7 != 5 else np.zeros(one),
        "canopy_height_eth": canopy,
        "esa_worldcover": rng.choice([0, *WORLDCOVER], one),
        "era5": era5 if has_era5(row) else np.full(12, np.nan),
        "lat": np.array([math.sin(latitude), math.cos(latitude)]),
        "lon": np.array([math.sin(longitude), math.cos(longitude)]),
        "month": np.array([math.sin(month), math.cos(month)]),
        "biome": np.eye(14)[biome],
        "eco_region": np.eye(846)[eco_region],
    }
    return {name: layer.astype({**MAPS, **VECTORS}[name][1]) for name, layer in layers.items()}


def tile_info(row: int) -> dict[str, Any]:
    """The entry of one row in tile_info."""
    if is_l2a(row):
        s2 = [b for b in S2_BANDS if b != "B10"] + ([] if is_shifted(row) else ["MSK_CLDPRB"]) + ["SCL", "QA60"]
    else:
        s2 = [*S2_BANDS, "QA60"]
    latitude, longitude = place(row)
    biome, eco_region = region(row)
    weather = [280.0, 270.0, 290.0, 0.1] if has_era5(row) else None
    return {
        "S2_DATE": day(row).isoformat(), "S2_type": "l2a" if is_l2a(row) else "l1c",
        "CRS": f"EPSG:{(32600 if latitude >= 0 else 32700) + int((longitude + 180) // 6) % 60 + 1}",
        "lat": latitude, "lon": longitude, "biome": biome, "eco_region": eco_region, "NO_DATA": False,
        "BANDS": {
            "sentinel2": s2, "sentinel1_asc": ["VV", "VH"] if has_ascending(row) else None,
            "sentinel1_desc": ["VV", "VH"] if has_descending(row) else None, "aster": ["b1", "slope"],
            "era5": ["0_temperature_2m_mean"], "dynamic_world": ["label"], "canopy_height_eth": ["height", "std"],
            "esa_worldcover": ["Map"],
        },
        "era5": {"month1": weather, "month2": weather, "year": weather},
    }  # fmt: skip


def band_statistics(layers: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Statistics over all rows, with the release's bare NaN and Infinity where a band has no value."""
    missing = {
        "sentinel2": 0,
        "sentinel2_cloudmask": 65535,
        "sentinel2_cloudprod": 65535,
        "aster": -32768,
        "canopy_height_eth": 127,
    }
    result = {}
    for name in ("sentinel2", "sentinel2_cloudmask", "sentinel2_cloudprod", "sentinel1", "aster", "canopy_height_eth",
                 "era5", "lat", "lon", "month"):  # fmt: skip
        for product in ("l2a", "l1c") if name.startswith("sentinel2") else ("",):
            chosen = [x[name] for row, x in enumerate(layers) if not product or is_l2a(row) == (product == "l2a")]
            bands = np.stack(chosen, axis=1).astype(np.float64) if chosen else np.zeros((len(layers[0][name]), 0))
            columns = [_summary(b[np.isfinite(b) & (b != missing.get(name, np.inf))]) for b in bands]
            result[f"{name}_{product}" if product else name] = {
                what: [column[place] for column in columns] for place, what in enumerate(("mean", "std", "min", "max"))
            }
    return result


def _summary(values: np.ndarray) -> tuple[float, float, float, float]:
    if not values.size:
        return math.nan, math.nan, math.inf, -math.inf
    return float(values.mean()), float(values.std()), float(values.min()), float(values.max())


# ---- ways to change a release ----


def edit_hdf5(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        with h5py.File(directory / f"{STEM}.h5", "r+") as file:
            change(file)

    return run


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def run(file: Any) -> None:
        values = change(file[name][:])
        del file[name]
        file[name] = values

    return edit_hdf5(run)


def edit_json(part: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        value = read_part(directory, part)
        write_part(directory, part, change(value) or value)

    return run


def hot(name: str, row: int, value: list[int]) -> Callable[[Path], None]:
    def change(file: Any) -> None:
        file[name][row] = value + [0] * (file[name].shape[1] - len(value))

    return edit_hdf5(change)


def damage_chunk(directory: Path) -> None:
    with h5py.File(directory / f"{STEM}.h5") as file:
        chunk: Any = file["aster"].id.get_chunk_info(11)  # type: ignore[union-attr]
    with (directory / f"{STEM}.h5").open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)
