"""Bands go to an encoder by identity, normalised as said, in whole cells."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import BANDS, tiny_encoder, tiny_statistics
from torch.nn import functional

from mmearth_ray.checkpoints.load import load_encoder
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal, TaskInfo
from mmearth_ray.evaluate.features.encoders import Subject, open_subject
from mmearth_ray.evaluate.features.feeding import Preparation, feed_of, whole_cells

RGB = ("B4", "B3", "B2")


def info_of(bands: tuple[str, ...], **more: Any) -> TaskInfo:
    """Mean 10 i + 10 and std i + 1 of the i-th band."""
    plain = TaskInfo(
        name="set", goal=Goal.SINGLE, classes=("a", "b"), bands=bands, product="l2a", dtype="uint16", height=8, width=8,
        mean=tuple(10.0 * i + 10 for i in range(len(bands))), std=tuple(i + 1.0 for i in range(len(bands))), digest="d",
    )  # fmt: skip
    return replace(plain, **more)


def subject_of(tmp_path: Path, bands: tuple[str, ...] = RGB) -> Subject:
    return open_subject(str(tiny_encoder(tmp_path / "e", bands, statistics=tiny_statistics(bands))))


def raw_of(*values: float, dtype: type = np.uint16, size: int = 8) -> torch.Tensor:
    """One image (1, C, size, size), each band of one value."""
    return torch.from_numpy(np.broadcast_to(np.array(values, dtype)[None, :, None, None], (1, len(values), size, size)).copy())


def pixels(prepared: torch.Tensor) -> list[float]:
    """Of each band its value, which must be one."""
    assert (prepared == prepared[:, :, :1, :1]).all()
    return prepared[0, :, 0, 0].tolist()


def test_bands_find_their_places_by_name_and_what_is_absent_is_the_mean(tmp_path: Path) -> None:
    subject = subject_of(tmp_path)
    feed = feed_of(subject, info_of(("B2", "other.X", "B4")), "dataset")
    assert (feed.places, feed.absent, feed.unused, feed.unknown) == ((2, None, 0), ("B3",), ("other.X",), ())
    assert (feed.mean, feed.std) == ((30.0, None, 10.0), (3.0, None, 1.0))
    assert pixels(Preparation(feed, 8)(raw_of(12, 999, 33))) == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("normalisation", ["dataset", "pretraining"])
def test_the_order_of_a_data_sets_bands_does_not_matter(tmp_path: Path, normalisation: str) -> None:
    subject, info = subject_of(tmp_path, BANDS), info_of(BANDS)
    order = np.random.default_rng(3).permutation(len(BANDS))
    pick = lambda values: tuple(values[i] for i in order)  # noqa: E731
    permuted = replace(info, bands=pick(BANDS), mean=pick(info.mean), std=pick(info.std))
    raw = torch.from_numpy(np.random.default_rng(4).integers(0, 3000, (2, 12, 8, 8)).astype(np.uint16))
    one = Preparation(feed_of(subject, info, normalisation), 8)(raw)
    other = Preparation(feed_of(subject, permuted, normalisation), 8)(torch.from_numpy(raw.numpy()[:, order]))
    assert torch.equal(one, other)
    assert one.std() > 0


def test_pretrainings_numbers_are_those_that_the_encoder_itself_uses(tmp_path: Path) -> None:
    subject = subject_of(tmp_path)
    own = load_encoder(subject.weights)
    for product in ("l2a", "l1c"):
        feed = feed_of(subject, info_of(RGB, product=product), "pretraining")
        raw = torch.from_numpy(np.random.default_rng(5).integers(0, 4, (2, 3, 8, 8)).astype(np.uint16) * 700)
        torch.testing.assert_close(Preparation(feed, 8)(raw), own.normalise(product)(raw), rtol=1e-6, atol=1e-6)
        assert (raw == 0).any(), "no data in pretraining"
        assert feed.missing == (0.0,)
        assert feed.unknown == (("B2",) if product == "l1c" else ())
        assert feed.product == product


def test_scale_brings_values_to_pretrainings_units(tmp_path: Path) -> None:
    subject = subject_of(tmp_path)
    info = info_of(RGB, scale=10000.0, dtype="float32", mean=(0.1, 0.2, 0.3), std=(0.1, 0.1, 0.1))
    plain = info_of(RGB, mean=(1000.0, 2000.0, 3000.0), std=(1000.0,) * 3)
    for normalisation in ("dataset", "pretraining"):
        one, other = feed_of(subject, info, normalisation), feed_of(subject, plain, normalisation)
        assert one.mean == pytest.approx(other.mean)
        found = pixels(Preparation(one, 8)(raw_of(0.15, 0.15, 0.45, dtype=np.float32)))
        assert found == pytest.approx(pixels(Preparation(other, 8)(raw_of(1500, 1500, 4500))), abs=1e-5)


def test_the_two_normalisations_differ_and_the_feed_says_which(tmp_path: Path) -> None:
    subject = subject_of(tmp_path)
    feeds = [feed_of(subject, info_of(RGB), name) for name in ("dataset", "pretraining")]
    assert [feed.normalisation for feed in feeds] == ["dataset", "pretraining"]
    assert feeds[1].mean == (1000.0, 1100.0, 1200.0)
    values = [pixels(Preparation(feed, 8)(raw_of(12, 22, 33))) for feed in feeds]
    assert values[0] == [2.0, 1.0, 1.0]
    assert values[1] == pytest.approx([-1.976, -1078 / 510, -1167 / 520])


def test_missing_and_infinite_values_are_the_mean_and_no_others(tmp_path: Path) -> None:
    feed = feed_of(subject_of(tmp_path), info_of(RGB, missing=(-9999.0, 7.0), dtype="float32"), "dataset")
    raw = raw_of(12, 22, 33, dtype=np.float32)
    raw[0, 0, 0, :3] = torch.tensor([-9999.0, float("nan"), float("-inf")])
    raw[0, 1, 2, 2] = 7.0
    raw[0, 2, 3, 3] = 0.0
    prepared = Preparation(feed, 8)(raw)
    assert prepared[0, 0, 0].tolist() == [0.0, 0.0, 0.0] + [2.0] * 5
    assert prepared[0, 1, 2, 2] == 0
    assert prepared[0, 2, 3, 3] == -10


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 15), (5, 8), (3, 20), (1, 1), (17, 31)])
def test_sides_become_whole_cells_on_the_right_and_at_the_bottom(tmp_path: Path, height: int, width: int) -> None:
    image = torch.arange(3.0 * height * width).reshape(1, 3, height, width)
    padded = whole_cells(image, 8)
    assert padded.shape == (1, 3, -(-height // 8) * 8, -(-width // 8) * 8)
    assert torch.equal(padded[:, :, :height, :width], image)
    more = -width % 8
    if more and more < width:
        assert torch.equal(padded[:, :, :height, width:], image.flip(3)[:, :, :, 1 : 1 + more])
    elif more:
        assert torch.equal(padded[:, :, :height, width:], image[:, :, :, -1:].expand(-1, -1, -1, more))
    columns = functional.pad(image, (0, -width % 8, 0, 0), mode="reflect" if more < width else "replicate")
    assert torch.equal(padded[:, :, :height], columns)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_any_type_of_numbers_is_taken(tmp_path: Path, dtype: type) -> None:
    feed = feed_of(subject_of(tmp_path), info_of(RGB), "dataset")
    prepared = Preparation(feed, 8)(raw_of(12, 22, 33, dtype=dtype, size=5))
    assert prepared.dtype == torch.float32
    assert pixels(prepared) == [2.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\); got \(1, 2, 5, 5\)"):
        Preparation(feed, 8)(raw_of(1, 2, size=5))


def test_statistics_take_all_bands_by_name_and_the_data_sets_moments() -> None:
    for normalisation in ("dataset", "pretraining"):
        feed = feed_of(open_subject("statistics"), info_of(("other.Z", "B2", "sentinel1.asc_VV")), normalisation)
        assert (feed.bands, feed.normalisation) == (("B2", "other.Z", "sentinel1.asc_VV"), "dataset")
        assert (feed.places, feed.mean, feed.unused) == ((1, 0, 2), (20.0, 10.0, 30.0), ())


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    subject, random = subject_of(tmp_path), open_subject("random:atto/8")
    for wrong, info, normalisation, message in [
        (subject, info_of(RGB), "imagenet", "normalisation=imagenet must be one of dataset, pretraining"),
        (subject, info_of(("B8", "sentinel1.asc_VV")), "dataset", "takes B4, B3, B2; set has B8, sentinel1.asc_VV: no band"),
        (random, info_of(RGB), "pretraining", "'random-atto-8' has no statistics .* use normalisation=dataset"),
        (subject, info_of(RGB, product=None), "pretraining", "does not say which product"),
        (subject, info_of(RGB, product="l3"), "pretraining", "has statistics of l2a, l1c, set is l3"),
        (subject, info_of(("B2", "other.X"), product="l1c"), "pretraining", "input would be 0; use normalisation=dataset"),
        (subject, info_of(("B2", "other.X"), mean=(None, 1.0), std=(None, 1.0)), "dataset", "every input would be 0"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            feed_of(wrong, info, normalisation)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="names a band twice"):
        feed_of(subject, info_of(("B2", "B2")), "dataset")
