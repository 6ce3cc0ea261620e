"""Which band is which: the published names, their known errors, and what the published evaluation makes of them."""

import pytest
from geobench_fixture import EUROSAT, KILN, NAMES, SETS, TRUE

from mmearth_ray.evaluate.datasets.geobench_bands import (
    FED,
    PUBLISHED,
    SLOTS,
    UNKNOWN,
    as_published,
    corrected,
    identity,
    number_of,
    published_set,
)

S2 = [(name, "Sentinel2") for name in NAMES]
NO_CIRRUS = [pair for pair in S2 if number_of(pair[0]) != "10"]


def test_the_slots_are_those_of_the_published_encoders() -> None:
    assert SLOTS == ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B11", "B12")
    assert FED == ("01", "02", "03", "04", "05", "06", "07", "08", "08A", "09", "11", "12")


def test_names_that_are_right_are_themselves() -> None:
    assert [identity(name, "Sentinel2", UNKNOWN) for name in NAMES] == list(TRUE)
    for name in ("m-bigearthnet", "m-cashew-plant", "m-SA-crop-type", "m-so2sat"):
        assert [identity(band, "Sentinel2", published_set(name)) for band in NAMES] == list(TRUE)


def test_names_that_are_wrong_are_corrected() -> None:
    assert [identity(name, "Sentinel2", published_set("m-eurosat")) for name in NAMES] == list(EUROSAT)
    kiln = [identity(name, "Sentinel2", published_set("m-brick-kiln")) for name in NAMES]
    assert kiln == [f"other.{band}" if band.startswith("TCI") else band for band in KILN]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [("02 - Blue", "Landsat8", "other.Blue"), ("02 - VH.Imaginary", "Sentinel1", "other.VH.Imaginary"),
     ("Red", "SpectralBand", "other.Red"),
     ("Cloud Probability", "CloudProbability", None), ("Cloud Probability", "", None), ("02 - Blue", "", "B2"),
     ("05 - NIR", "", "other.NIR")],
)  # fmt: skip
def test_bands_of_other_sensors_are_never_taken_for_sentinel_2(name: str, kind: str, expected: str | None) -> None:
    assert identity(name, kind, UNKNOWN) == expected


def fed(name: str, bands: list[tuple[str, str]]) -> list[str]:
    """The true band in each slot when the published evaluation reads that set."""
    true = {published: band for published, band in SETS[name].bands if band != "radar"}
    return [true[band] for band in as_published(bands, published_set(name)).values()]


def test_what_the_published_evaluation_feeds_its_slots() -> None:
    """Facts of MMEarth-train at commit 1f368b3: its list of names against the sets' true order."""
    assert fed("m-eurosat", S2) == ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B9", "B10", "B12", "B8A"]
    assert fed("m-brick-kiln", S2) == ["B1", "B2", "B3", "B4", "B5", "B7", "B8A", "B8", "B11", "B12", "TCI_G", "TCI_B"]
    swapped = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12"]
    assert fed("m-bigearthnet", NO_CIRRUS) == swapped
    so2sat = [(name, kind) for name, kind in NO_CIRRUS if number_of(name) not in ("01", "09")]
    assert fed("m-so2sat", so2sat) == ["B2", *swapped[1:9], "B8A", *swapped[10:]]
    assert list(as_published(S2, published_set("m-eurosat"))) == list(SLOTS)


def test_a_band_that_the_published_evaluation_needs_is_named() -> None:
    with pytest.raises(LookupError, match="09"):
        as_published([pair for pair in S2 if number_of(pair[0]) != "09"], published_set("m-eurosat"))
    with pytest.raises(LookupError, match="01"):
        as_published([(name, "Landsat8") for name in NAMES], UNKNOWN)


def test_what_is_kept_is_sentinel_2_in_the_tables_order_unless_others_are_asked_for() -> None:
    known = published_set("m-brick-kiln")
    assert list(corrected(S2, known, others=False)) == ["B1", "B2", "B3", "B4", "B5", "B7", "B8A", "B8", "B11", "B12"]
    assert list(corrected(S2, known, others=True))[10:] == ["other.TCI_R", "other.TCI_G", "other.TCI_B"]
    assert list(corrected([("Red", ""), ("Green", "")], UNKNOWN, others=False)) == ["other.Red", "other.Green"]
    with pytest.raises(LookupError, match=r"'02 - Blue' and '03 - Blue' are both other\.Blue"):
        corrected([("02 - Blue", "Landsat8"), ("03 - Blue", "Landsat8")], UNKNOWN, others=True)


def test_sets_go_by_their_folder_first() -> None:
    assert published_set("m-eurosat", "so2sat").names[0] == "m-eurosat"
    assert published_set("renamed", "so2sat").names[0] == "m-so2sat"
    assert published_set("renamed", "mine") is UNKNOWN
    assert {known.names[0]: (known.product, known.scale) for known in PUBLISHED} == {
        "m-eurosat": ("l1c", 1), "m-brick-kiln": ("l2a", 1), "m-so2sat": ("l1c", 10000), "m-bigearthnet": ("l2a", 1),
        "m-cashew-plant": ("l2a", 1), "m-SA-crop-type": (None, 1),
    }  # fmt: skip
