import json
import math

import numpy as np
import pytest
from release_fixture import write_release

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import TABLE, get
from mmearth_ray.shards.convert import ConvertOptions, convert
from mmearth_ray.shards.manifest import load_manifest
from mmearth_ray.shards.stats import Moments, checked, merge_tables, normalisation, require_statistics


def test_moments_merge_to_those_of_all_values() -> None:
    values = np.random.default_rng(0).normal(1e4, 3, 10_001)
    merged = Moments()
    for part in np.array_split(values, [0, 1, 700, 9000]):
        merged = merged.merge(Moments.of(part))
    summary = merged.summary()
    assert merged.count == values.size
    assert summary["mean"] == pytest.approx(values.mean(), rel=1e-13)
    assert summary["std"] == pytest.approx(values.std(), rel=1e-12)
    assert (summary["min"], summary["max"]) == (values.min(), values.max())


def test_nothing_has_null_statistics() -> None:
    assert Moments.of(np.array([])).summary() == {"count": 0, "mean": None, "std": None, "min": None, "max": None}
    assert merge_tables([]) == {}


def test_statistics_agree_with_the_release_that_the_shards_came_from(tmp_path) -> None:
    convert(write_release(tmp_path / "r", tiles=20), tmp_path / "o", ConvertOptions(workers=1))
    manifest = load_manifest(tmp_path / "o")
    published = json.loads(json.dumps(manifest.release_statistics))
    for m in (get("sentinel2"), get("era5"), get("lat")):  # layers that no shifted tile lacks
        for variant, bands in published[m.name].items():
            for band, given in bands.items():
                ours = manifest.statistics[m.name][variant][band]
                for what in ("mean", "std", "min", "max"):
                    assert ours[what] == (None if given[what] is None else pytest.approx(given[what], rel=1e-9)), (band, what)


def test_normalisation_has_a_row_per_product_and_nan_where_nothing_is_known() -> None:
    m = get("sentinel2").select(["B1", "B10"])
    statistics = {"sentinel2": {"l1c": {"B1": {"mean": 5.0, "std": 0.0}, "B10": {"mean": 2.0, "std": 4.0}},
                                "l2a": {"B1": {"mean": 7.0, "std": 3.0}, "B10": {"mean": None, "std": None}}}}  # fmt: skip
    mean, std = normalisation(statistics, m)
    np.testing.assert_array_equal(mean, np.array([[5, 2], [7, np.nan]], np.float32))
    np.testing.assert_array_equal(std, np.array([[1, 4], [3, np.nan]], np.float32))


def test_values_without_statistics_are_an_error_and_statistics_without_values_are_not() -> None:
    bands = {band: {"mean": 1.0, "std": 1.0} for band in get("aster").bands}
    require_statistics({"aster": {"all": bands}}, {}, TABLE, "here")
    bad = {**bands, "slope": {"mean": math.nan, "std": 1.0}}
    with pytest.raises(DataError, match=r"aster\.slope has 12 valid values but here has no finite mean and std"):
        require_statistics({"aster": {"all": bad}}, {"all": {"aster.slope": 12}}, [get("aster")], "here")


def test_statistics_of_the_right_form_pass_whatever_they_lack() -> None:
    for given in ({}, {"x": {}}, {"x": {"all": {"b": {}}}}, {"x": {"all": {"b": {"mean": 1, "std": None}}}},
                  {"x": {"all": {"b": {"mean": math.nan, "std": 0.5, "count": "many"}}}}):  # fmt: skip
        assert checked(given, "here") is given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "here: holds no statistics; use manifest, release or the JSON of a manifest"),
        (None, "here: holds no statistics"),
        ({"x": 5}, "here: 'x' must hold variants; use"),
        ({"aster": {"mean": [1.0]}}, "here: 'aster.mean' must hold bands; use"),
        ({"x": {"all": {"b\nc": []}}}, "here: 'x.all.b c' must hold mean and std; use"),
        ({"x": {"all": {"b": {"mean": "1"}}}}, "here: 'x.all.b.mean' must be a number or null"),
        ({"x": {"all": {"b": {"mean": 1, "std": True}}}}, "here: 'x.all.b.std' must be a number or null"),
        ({"x": {"all": {"b": {"mean": 10**400}}}}, "here: 'x.all.b.mean' must be a number or null"),
    ],
)
def test_statistics_of_another_form_are_refused_in_one_line(given: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        checked(given, "here")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
