"""Splits and folds where a data set has none: balanced, seeded, neighbours together, places apart."""

from collections import Counter

import numpy as np
import pytest

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.datasets.assigning import (
    assigned,
    blocks_of,
    check_shares,
    folds_of,
    km_to_nearest,
    neighbours,
    splits_by_block,
    splits_of,
    strata_of,
)
from mmearth_ray.shards.convert import _share


def alone(count: int) -> np.ndarray:
    return np.arange(count)


def test_folds_hold_every_class_evenly_and_every_image_once() -> None:
    labels = np.repeat(np.arange(4), [50, 21, 20, 6])
    folds = folds_of(strata_of(labels), alone(97), 5, seed=3)
    counts = np.array([[np.sum((folds == f) & (labels == k)) for f in range(5)] for k in range(4)])
    assert (counts.max(1) - counts.min(1) <= 1).all()
    assert np.ptp(counts.sum(0)) <= 1
    np.testing.assert_array_equal(folds, folds_of(strata_of(labels), alone(97), 5, seed=3))
    assert (folds != folds_of(strata_of(labels), alone(97), 5, seed=4)).any()


def test_splits_hold_their_shares_of_every_class() -> None:
    labels = np.repeat(np.arange(3), [100, 40, 20])
    splits = splits_of(strata_of(labels), alone(160), 0.1, 0.25, seed=0)
    for k, total in enumerate((100, 40, 20)):
        found = Counter(splits[labels == k].tolist())
        assert found == {"train": round(total * 0.65), "valid": round(total * 0.1), "test": round(total * 0.25)}


def test_classes_too_rare_for_a_share_do_not_all_end_in_train() -> None:
    for strata in (np.arange(100), strata_of(np.random.default_rng(0).integers(0, 2, (100, 20)))):
        found = Counter(splits_of(strata, alone(100), 0.1, 0.2, seed=0).tolist())
        assert found == {"train": 70, "valid": 10, "test": 20}


def test_numbers_are_spread_over_their_range() -> None:
    values = np.random.default_rng(1).lognormal(size=200)
    strata = strata_of(values)
    assert np.bincount(strata).tolist() == [40] * 5
    splits = splits_of(strata, alone(200), 0.2, 0.2, seed=0)
    assert all((strata[splits == "test"] == k).sum() == 8 for k in range(5))
    assert np.isfinite(strata_of(np.ones(7))).all()


def test_images_of_a_unit_stay_together() -> None:
    unit = np.random.default_rng(2).integers(0, 30, 100)
    labels = np.random.default_rng(3).integers(0, 3, 100)
    for parts in (folds_of(strata_of(labels), unit, 5, 0), splits_of(strata_of(labels), unit, 0.2, 0.2, 0)):
        assert all(len(set(parts[unit == u].tolist())) == 1 for u in set(unit.tolist()))
        assert min(Counter(parts.tolist()).values()) >= 100 / len(set(parts.tolist())) * 0.5


def test_units_are_chains_of_near_places() -> None:
    latitude = np.array([0.0, 0.02, 0.04, 1.0, np.nan, 0.0, np.nan])
    longitude = np.array([10.0, 10.0, 10.0, 10.0, 10.0, -10.0, 3.0])  # 0.02 degrees are 2.2 km
    assert neighbours(latitude, longitude, 2.5).tolist() == [0, 0, 0, 3, 4, 5, 6]
    assert neighbours(latitude, longitude, 2.0).tolist() == list(range(7)) == neighbours(latitude, longitude, 0).tolist()
    assert len(set(neighbours(np.array([0.0, 0.0]), np.array([179.999, -179.999]), 1.0).tolist())) == 1  # over the date line
    assert neighbours(np.zeros(0), np.zeros(0), 5.0).shape == (0,)


def test_blocks_go_to_a_split_as_a_whole_whatever_the_other_tiles() -> None:
    rng = np.random.default_rng(5)
    latitude, longitude = rng.uniform(-60, 60, 4000), rng.uniform(-180, 180, 4000)
    blocks = blocks_of(latitude, longitude, 5.0)
    splits = splits_by_block(blocks, 0.1, 0.3, seed=0)
    of_block: dict[tuple[int, ...], set[str]] = {}
    for block, split in zip(map(tuple, blocks.tolist()), splits.tolist(), strict=True):
        of_block.setdefault(block, set()).add(split)
    assert max(map(len, of_block.values())) == 1
    shares = Counter(next(iter(found)) for found in of_block.values())
    assert shares["test"] / len(of_block) == pytest.approx(0.3, abs=0.04)
    assert shares["valid"] / len(of_block) == pytest.approx(0.1, abs=0.03)
    np.testing.assert_array_equal(splits[100:200], splits_by_block(blocks[100:200], 0.1, 0.3, seed=0))
    assert (splits != splits_by_block(blocks, 0.1, 0.3, seed=1)).any()


def test_the_blocks_that_a_release_holds_out_are_in_every_split() -> None:
    held_out = np.array([(s, w) for s in range(-50, 50) for w in range(-50, 50) if _share(0, s, w) < 0.1])
    found = Counter(splits_by_block(blocks_of(held_out[:, 0] + 0.5, held_out[:, 1] + 0.5, 1.0), 0.1, 0.3, 0).tolist())
    assert found["test"] / len(held_out) == pytest.approx(0.3, abs=0.06)


def test_distances_are_those_on_the_sphere() -> None:
    latitude, longitude = np.array([0.0, 0.0, 60.0]), np.array([0.0, 1.0, -179.5])
    others = np.array([[0.0, 0.5], [60.0, 179.5]])
    degree = np.pi / 180 * 6371
    np.testing.assert_allclose(km_to_nearest(latitude, longitude, others), [degree / 2, degree / 2, degree / 2], rtol=1e-4)
    assert km_to_nearest(latitude, longitude, np.zeros((0, 2))).tolist() == [np.inf] * 3


def test_shares_and_folds_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(UsageError, match="folds=1 leaves nothing"):
        check_shares(1, 0.1, 0.1)
    with pytest.raises(UsageError, match=r"valid=0\.5 and test=0\.5 leave nothing"):
        check_shares(0, 0.5, 0.5)
    check_shares(5, 0.9, 0.9)
    splits, folds = assigned(strata_of(np.arange(20) % 2), alone(20), 4, 0.2, 0.2, 0)
    assert (set(splits), np.bincount(folds).tolist()) == ({""}, [5] * 4)
    splits, folds = assigned(strata_of(np.arange(20) % 2), alone(20), 0, 0.2, 0.2, 0)
    assert (Counter(splits), set(folds.tolist())) == ({"train": 12, "valid": 4, "test": 4}, {-1})
