"""Features of images: pooled, as maps, of bands alone; and those that are no numbers."""

import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from tiny_encoder import BANDS, DIMS, tiny_encoder
from tiny_task import tiny_task

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.features.encoders import CELL, ImageEncoder, build, open_subject
from mmearth_ray.evaluate.features.extraction import band_statistics, extractor, features_of, torch_threads
from mmearth_ray.evaluate.features.feeding import Preparation, feed_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [16, 19])
def test_an_encoders_features_are_those_of_the_module_on_prepared_images(tmp_path: Path, size: int) -> None:
    task = tiny_task(tmp_path / "t", images=5, size=size)
    subject = open_subject(str(tiny_encoder(tmp_path / "e")))
    feed, raw = feed_of(subject, task.info, "dataset"), task.images(range(5))
    with torch.no_grad():
        image, encoder = Preparation(feed, 8)(torch.from_numpy(raw)), cast(ImageEncoder, build(subject))
        assert np.array_equal(extractor(subject, feed, Goal.SINGLE, CPU)(raw), encoder(image).numpy())
        maps = extractor(subject, feed, Goal.SEGMENTATION, CPU)(raw)
        assert maps.shape == (5, -(-size // 8), -(-size // 8), DIMS[-1])
        assert np.array_equal(maps, encoder.forward_features(image).permute(0, 2, 3, 1).numpy())


def test_statistics_of_bands_are_those_of_valid_pixels_by_name(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "t", images=5)
    info = replace(task.info, scale=0.5, missing=(0.0, 9.0), dtype="float64")
    feed = feed_of(open_subject("statistics"), info, "dataset")
    raw = task.images(range(5)).astype(np.float64)
    raw[0, 2] = 0
    raw[1, 3, :4], raw[1, 3, 4], raw[1, 4, 0, 0] = 9, np.nan, np.inf
    found = band_statistics(raw, feed)
    assert found.shape == (5, 24)
    assert found.dtype == np.float32
    names = sorted(BANDS)
    for i in range(5):
        for place, name in enumerate(names):
            values = raw[i, BANDS.index(name)].ravel()
            values = 0.5 * values[np.isfinite(values) & (values != 0) & (values != 9)]
            expected = (values.mean(), values.std()) if len(values) else (0, 0)
            assert found[i, [place, 12 + place]] == pytest.approx(expected, rel=1e-6)
    order = np.random.default_rng(1).permutation(12)
    other = replace(info, bands=tuple(BANDS[i] for i in order), mean=info.mean, std=info.std)
    assert np.array_equal(band_statistics(raw[:, order], feed_of(open_subject("statistics"), other, "dataset")), found)


def test_maps_of_bands_are_means_of_normalised_pixels_in_cells(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "t", Goal.SEGMENTATION, images=5, size=20)
    subject = open_subject("statistics")
    feed, raw = feed_of(subject, task.info, "dataset"), task.images(range(5))
    found = extractor(subject, feed, task.info.goal, CPU)(raw)
    assert found.shape == (5, 3, 3, 12)
    place = BANDS.index(feed.bands[7])
    mean, std = task.info.mean[place], task.info.std[place]
    assert mean is not None
    assert std is not None
    cell = (raw[2, place, CELL : 2 * CELL, :CELL].astype(np.float64) - mean) / std
    assert found[2, 1, 0, 7] == pytest.approx(cell.mean(), abs=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_every_image_has_its_features_in_any_batch(tmp_path: Path, batch: int) -> None:
    task = tiny_task(tmp_path / "t", images=10)
    subject = open_subject(str(tiny_encoder(tmp_path / "e")))
    extract = extractor(subject, feed_of(subject, task.info, "dataset"), Goal.SINGLE, CPU)
    found, seconds = features_of(task, range(2, 9), extract, "e", batch=batch, dtype="float32", clock=time.process_time)
    expected = np.concatenate([extract(task.images([i])) for i in range(2, 9)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert seconds > 0


@pytest.mark.parametrize(
    ("value", "dtype", "folds", "message"),
    [
        (np.nan, "float32", 0, r"image-008 \(tiny-single-label, split 'valid'\) that are not finite; look at"),
        (-np.inf, "float16", 0, "that are not finite"),
        (1e5, "float16", 0, "that are too large for float16"),
        (np.nan, "float32", 2, r"image-008 \(tiny-single-label, fold 1\)"),
    ],
)
def test_features_that_are_no_numbers_are_refused_by_encoder_image_and_split(
    tmp_path: Path, value: float, dtype: str, folds: int, message: str
) -> None:
    def extract(pixels_NCHW: np.ndarray) -> np.ndarray:
        found = np.ones((len(pixels_NCHW), 2, 2, 3), np.float32)
        found[2, 1, 1, 2] = value
        return found

    task = tiny_task(tmp_path / "t", images=10, folds=folds)
    with pytest.raises(DataError, match=f"^encoder 'mine' gives features of image .*{message}") as caught:
        features_of(task, range(6, 10), extract, "mine", batch=4, dtype=dtype, clock=time.process_time)
    assert "\n" not in str(caught.value)


def test_threads_are_as_they_were_afterwards() -> None:
    before = torch.get_num_threads()
    with torch_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
