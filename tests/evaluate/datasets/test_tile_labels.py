"""Labels of tiles against plain loops over their pixels."""

from collections import Counter

import numpy as np
import pytest

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.datasets.tile_labels import middle, tile_label
from mmearth_ray.modalities import TABLE
from mmearth_ray.stream.reader import RowGroup

TILES, SIDE = 6, 8


def label(name: str, band: str = "", mask: bool = False):  # type: ignore[no-untyped-def]
    return tile_label(name, band, TABLE, mask=mask, given="sentinel2")


def group(**columns: np.ndarray) -> RowGroup:
    present = {name.partition(".")[0]: np.arange(TILES) != 4 for name in columns}
    return RowGroup([str(i) for i in range(TILES)], np.zeros(TILES, np.int8), columns, present, SIDE)


def worldcover() -> np.ndarray:
    """Codes of three classes; tile 1 is mostly gaps, tile 2 nothing but an unknown code, tile 5 half crops and half gaps."""
    codes = np.random.default_rng(0).choice(np.array([10, 40, 100], np.uint8), (TILES, SIDE, SIDE))
    codes[1, :5], codes[2] = 0, 11
    codes[5, :4], codes[5, 4:] = 0, 40
    return codes


@pytest.mark.parametrize("size", [8, 5, 4])
def test_the_dominant_class_is_that_of_most_known_pixels_of_the_middle(size: int) -> None:
    codes, rows = worldcover(), np.array([5, 0, 1, 2, 3, 4])
    asked = label("esa_worldcover")
    found = asked.values(group(**{"esa_worldcover.map": codes}), rows, size)
    known = {10: 0, 40: 3, 100: 10}
    for value, row in zip(found.tolist(), rows.tolist(), strict=True):
        start = (SIDE - size) // 2
        window = codes[row, start : start + size, start : start + size].ravel().tolist()
        count = Counter(known[code] for code in window if code in known)
        if row == 4 or sum(count.values()) * 2 < size * size:
            assert np.isnan(value)
        else:
            assert count[int(value)] == max(count.values())
    assert asked.names[3] == "cropland"
    assert asked.goal is Goal.SINGLE


def test_maps_and_which_classes_they_hold() -> None:
    codes, rows = worldcover(), np.array([0, 1, 2, 4])
    asked, held = label("esa_worldcover", mask=True), group(**{"esa_worldcover.map": worldcover()})
    maps = asked.maps(held, rows, SIDE)
    assert (asked.goal, maps.shape) == (Goal.SEGMENTATION, (4, SIDE, SIDE))
    for k, entry in enumerate(asked.modality.classes):
        np.testing.assert_array_equal(maps == k, codes[rows] == entry.code)
    assert ((maps == -1) == np.isin(codes[rows], [0, 11])).all()
    occurs = asked.occurs(held, rows, SIDE)
    assert [np.flatnonzero(row).tolist() for row in occurs] == [[0, 3, 10], [0, 3, 10], [], []]


def test_the_mean_is_that_of_valid_pixels_if_half_are() -> None:
    heights = np.random.default_rng(1).integers(0, 40, (TILES, SIDE, SIDE)).astype(np.int8)
    heights[1, :4], heights[2, :5], heights[3, 0] = 127, -128, 127
    asked = label("canopy_height_eth", "height")
    found = asked.values(group(**{"canopy_height_eth.height": heights}), np.arange(TILES), SIDE)
    expected = [heights[0].mean(), heights[1, 4:].mean(), np.nan, heights[3, 1:].mean(), np.nan, heights[5].mean()]
    np.testing.assert_allclose(found, expected)
    assert asked.names == ("canopy_height_eth height (m)",)
    assert asked.goal is Goal.REGRESSION


def test_values_of_whole_tiles() -> None:
    labels = np.array([3, -1, 0, 13, 2, 1], np.int16)
    np.testing.assert_array_equal(
        label("biome").values(group(biome=labels), np.arange(TILES), 4), [3, np.nan, 0, 13, np.nan, 1]
    )
    rain = np.array([1.5, np.nan, -np.inf, 2, 3, 4], np.float32)
    found = label("era5", "year_total_precip").values(group(**{"era5.year_total_precip": rain}), np.arange(TILES), 4)
    np.testing.assert_array_equal(found, [1.5, np.nan, np.nan, 2, np.nan, 4])


def test_the_middle_is_the_middle() -> None:
    maps = np.arange(2 * 7 * 7).reshape(2, 7, 7)
    np.testing.assert_array_equal(middle(maps, 3), maps[:, 2:5, 2:5])
    np.testing.assert_array_equal(middle(maps, 4), maps[:, 1:5, 1:5])
    np.testing.assert_array_equal(middle(maps, 7), maps)


@pytest.mark.parametrize(
    ("name", "band", "mask", "message"),
    [("biomes", "", False, "label=biomes: there is no modality 'biomes'"),
     ("sentinel2", "B2", False, "is what encoders are given"),
     ("sentinel2_cloudmask", "", False, "holds flags"), ("biome", "", True, "one class for a whole tile"),
     ("biome", "biome", False, "has classes, which need no band"), ("canopy_height_eth", "height", True, "is a quantity"),
     ("canopy_height_eth", "", False, "choose one of height, std"),
     ("aster", "height", False, "choose one of elevation, slope")],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(name: str, band: str, mask: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        label(name, band, mask)
