"""The table: its rows against the published facts, raw validity, labels, selection, the hash."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmearth_ray.modalities import (
    DEFAULT_INPUT,
    PRODUCTS,
    TABLE,
    Kind,
    Level,
    Modality,
    Role,
    get,
    table_hash,
    tasks,
)

# The order of the published training code, which its twelve uncertainty weights follow.
TASKS = (
    "sentinel2", "sentinel1", "aster", "era5", "dynamic_world", "canopy_height_eth",
    "lat", "lon", "biome", "eco_region", "month", "esa_worldcover",
)  # fmt: skip
QUALITY = ("sentinel2_cloudmask", "sentinel2_cloudprod", "sentinel2_scl")

# name: (bands in the release's order, dtype, level, kind, outputs of a head for all bands)
ROWS: dict[str, tuple[str, str, str, str, int]] = {
    "sentinel2": ("B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B10 B11 B12", "uint16", "pixel", "continuous", 13),
    "sentinel1": ("asc_VV asc_VH asc_HH asc_HV desc_VV desc_VH desc_HH desc_HV", "float32", "pixel", "continuous", 8),
    "aster": ("elevation slope", "int16", "pixel", "continuous", 2),
    "era5": (
        "prev_month_avg_temp prev_month_min_temp prev_month_max_temp prev_month_total_precip "
        "curr_month_avg_temp curr_month_min_temp curr_month_max_temp curr_month_total_precip "
        "year_avg_temp year_min_temp year_max_temp year_total_precip",
        "float32", "image", "continuous", 12,
    ),
    "dynamic_world": ("landcover", "uint8", "pixel", "categorical", 9),
    "canopy_height_eth": ("height std", "int8", "pixel", "continuous", 2),
    "lat": ("sin cos", "float32", "image", "continuous", 2),
    "lon": ("sin cos", "float32", "image", "continuous", 2),
    "biome": ("biome", "int16", "image", "categorical", 14),
    "eco_region": ("eco_region", "int16", "image", "categorical", 846),
    "month": ("sin_month cos_month", "float32", "image", "continuous", 2),
    "esa_worldcover": ("map", "uint8", "pixel", "categorical", 11),
    "sentinel2_cloudmask": ("QA60", "uint16", "pixel", "flags", 1),
    "sentinel2_cloudprod": ("MSK_CLDPRB", "uint16", "pixel", "continuous", 1),
    "sentinel2_scl": ("SCL", "uint8", "pixel", "categorical", 11),
}  # fmt: skip

# Raw values that are no data, beside the non-finite ones of floating-point layers.
FILLERS: dict[str, set[int]] = {
    "sentinel2": {0}, "aster": {-32768}, "dynamic_world": {0}, "canopy_height_eth": {127, -128}, "esa_worldcover": {0},
    "sentinel2_cloudmask": {65535}, "sentinel2_cloudprod": {65535}, "sentinel2_scl": {255},
}  # fmt: skip
PROBES = (float("nan"), float("inf"), -float("inf"), 0, 1, 5, -1, 126, 127, -127, -128, 255, 32767, -32768, 65534, 65535)
NAMES = [m.name for m in TABLE]


def test_the_table_has_the_twelve_tasks_in_published_order_and_three_quality_rows() -> None:
    assert tuple(m.name for m in TABLE if m.role is Role.TASK) == TASKS
    assert tuple(m.name for m in TABLE if m.role is Role.QUALITY) == QUALITY
    assert tuple(m.name for m in tasks()) == TASKS
    assert set(ROWS) == set(NAMES)
    assert DEFAULT_INPUT == "sentinel2"
    assert PRODUCTS == ("l1c", "l2a")


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_bands_and_type_of_the_release(name: str) -> None:
    row, (bands, dtype, level, kind, width) = get(name), ROWS[name]
    assert row.bands == tuple(bands.split())
    assert (row.dtype, row.level, row.kind, row.width) == (dtype, level, kind, width)
    assert row.trainable == (kind != "flags")
    assert len(row.units) in (0, len(row.bands))
    assert len(row.bounds) in (0, len(row.bands))
    if row.kind is Kind.CONTINUOUS:
        assert row.units
        assert row.bounds


@pytest.mark.parametrize("name", NAMES)
def test_a_column_is_named_after_modality_and_band(name: str) -> None:
    row = get(name)
    if row.level is Level.IMAGE and row.kind is Kind.CATEGORICAL:
        assert row.columns == (name,)
    else:
        assert row.columns == tuple(f"{name}.{band}" for band in ROWS[name][0].split())
    assert row.present_column == f"{name}.present"


def test_no_two_columns_of_the_table_share_a_name() -> None:
    columns = [column for m in TABLE for column in (*m.columns, m.present_column)]
    assert len(set(columns)) == len(columns)


def test_only_sentinel2_and_its_cloud_probability_differ_by_product() -> None:
    assert [m.name for m in TABLE if m.by_product] == ["sentinel2", "sentinel2_cloudprod"]


def test_experiments_use_all_bands_by_default_but_sentinel2_b10() -> None:
    for row in tasks():
        all_bands = ROWS[row.name][0].split()
        assert list(row.bands) == [b for b in all_bands if (row.name, b) != ("sentinel2", "B10")]
        assert len(row.units) in (0, len(row.bands))
        assert row.default_bands() == row


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, lambda a: torch.from_numpy(a).float()])
def test_valid_tells_data_from_filler_on_arrays_and_tensors_alike(name: str, convert: Any) -> None:
    row = get(name)
    dtype = np.dtype(row.dtype)
    floating = dtype.kind == "f"
    fit = [p for p in PROBES if floating or (np.isfinite(p) and np.iinfo(dtype).min <= p <= np.iinfo(dtype).max)]
    raw = np.array(fit, dtype).reshape(1, -1)
    expected = [bool(np.isfinite(p)) and p not in FILLERS.get(name, set()) for p in fit]
    assert any(expected)
    given = convert(raw)
    found = row.valid(given)
    assert found.shape == raw.shape
    assert found.tolist() == [expected]
    assert np.array_equal(np.asarray(given), raw, equal_nan=floating)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("esa_worldcover", {10: 0, 20: 1, 30: 2, 40: 3, 50: 4, 60: 5, 70: 6, 80: 7, 90: 8, 95: 9, 100: 10}),
        ("dynamic_world", {code: code - 1 for code in range(1, 10)}),
        ("sentinel2_scl", {code: code - 1 for code in range(1, 12)}),
        ("biome", {code: code for code in range(14)}),
    ],
)
def test_a_label_table_maps_every_code_to_its_label_and_all_others_to_missing(name: str, labels: dict[int, int]) -> None:
    table = get(name).label_table()
    assert table.shape == (256,)
    assert table.dtype == np.int16
    assert table.tolist() == [labels.get(code, -1) for code in range(256)]


def test_classes_bear_the_published_names() -> None:
    worldcover = [entry.name for entry in get("esa_worldcover").classes]
    assert worldcover == ["tree cover", "shrubland", "grassland", "cropland", "built-up", "bare or sparse", "snow and ice",
                          "permanent water", "herbaceous wetland", "mangroves", "moss and lichen"]  # fmt: skip
    land = [entry.name for entry in get("dynamic_world").classes]
    assert land == [
        "water",
        "trees",
        "grass",
        "flooded vegetation",
        "crops",
        "shrub and scrub",
        "built",
        "bare",
        "snow and ice",
    ]
    biomes = [entry.name for entry in get("biome").classes]
    assert [biomes[i] for i in (0, 3, 5, 9, 13)] == [
        "Tundra", "Deserts & Xeric Shrublands", "Boreal Forests/Taiga", "Mangroves",
        "Tropical & Subtropical Coniferous Forests",
    ]  # fmt: skip
    assert [entry.code for entry in get("eco_region").classes] == list(range(846))
    assert {entry.code: entry.name for entry in get("sentinel2_cloudmask").classes} == {1024: "opaque cloud", 2048: "cirrus"}


def test_selected_bands_keep_their_units_and_bounds_in_the_order_asked_for() -> None:
    era5 = get("era5").select(["year_total_precip", "prev_month_avg_temp"])
    assert era5.bands == ("year_total_precip", "prev_month_avg_temp")
    assert era5.units == ("m", "K")
    assert era5.bounds == ((-0.01, 100), (150, 350))
    assert era5.width == 2
    colour = get("sentinel2").select(["B2", "B3", "B4", "B10"])
    assert colour.display == ("B4", "B3", "B2")
    assert colour.columns == ("sentinel2.B2", "sentinel2.B3", "sentinel2.B4", "sentinel2.B10")
    assert colour.default_bands() == colour  # a band that was asked for is not dropped again
    assert get("sentinel2").select(["B11", "B4"]).display == ("B11",)


@pytest.mark.parametrize("bands", [[], ["B2", "B2"], ["B2", "VV"], ["b2"]])
def test_select_refuses_unknown_repeated_or_no_bands_and_lists_those_there_are(bands: list[str]) -> None:
    with pytest.raises(ValueError, match=r"bands of sentinel2 must be distinct and among B1, B2, .*B12; got \["):
        get("sentinel2").select(bands)


def test_an_unknown_modality_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"no modality 'sentinel3'; the table has sentinel2, sentinel1, .*sentinel2_scl"):
        get("sentinel3")


def _changed(row: Modality) -> list[Modality]:
    return [
        replace(row, name="other"),
        replace(row, dtype="float64"),
        replace(row, missing=(*row.missing, 9)),
        replace(row, bands=tuple(reversed(row.bands)) if len(row.bands) > 1 else ("other",)),
        replace(row, by_product=not row.by_product),
    ]


@pytest.mark.parametrize("place", range(len(TABLE)))
def test_the_hash_changes_with_any_row_and_with_their_order(place: int) -> None:
    hashes = {table_hash(), table_hash(TABLE[:place] + TABLE[place + 1 :]), table_hash(TABLE[place:] + TABLE[:place])}
    hashes |= {table_hash((*TABLE[:place], row, *TABLE[place + 1 :])) for row in _changed(TABLE[place])}
    assert len(hashes) == (7 if place == 0 else 8)  # turning by 0 places changes nothing
    assert table_hash() == table_hash(tuple(replace(m) for m in TABLE))
