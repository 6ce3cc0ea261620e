"""Halves of tiles: whole blocks of places, about as many in each, the same whenever they are asked for."""

import numpy as np
import pytest

from mmearth_ray.evaluate.during.halves import BLOCKS, halves


def places(count: int, width: float) -> np.ndarray:
    return np.random.default_rng(count).uniform(0, width, (2, count))


@pytest.mark.parametrize(("count", "width"), [(600, 30.0), (512, 2.0), (40, 0.5)])
def test_blocks_are_whole_and_the_halves_about_alike(count: int, width: float) -> None:
    where = places(count, width)
    tested, side = halves(where, 0)
    blocks: dict[tuple[float, ...], set[bool]] = {}
    for place, test in zip(where.T, tested.tolist(), strict=True):
        blocks.setdefault(tuple(np.floor(place / side)), set()).add(test)
    assert all(len(found) == 1 for found in blocks.values())
    assert len(blocks) >= BLOCKS
    largest = np.bincount(np.unique(np.floor(where / side), axis=1, return_inverse=True)[1].ravel()).max()
    assert abs(2 * tested.sum() - count) <= largest


def test_blocks_are_no_narrower_than_they_have_to_be() -> None:
    assert halves(places(600, 30.0), 0)[1] == 1.0
    assert 0 < halves(places(600, 1.0), 0)[1] < 0.5


def test_tiles_of_one_place_are_halved_one_by_one() -> None:
    for where in (np.zeros((2, 9)), np.full((2, 9), np.nan)):
        tested, side = halves(where, 0)
        assert side == 0
        assert tested.sum() == 4


def test_places_that_are_not_known_are_together() -> None:
    where = places(40, 20.0)
    where[:, :15] = np.nan
    assert len(set(halves(where, 0)[0][:15].tolist())) == 1


def test_halves_are_a_function_of_places_and_seed() -> None:
    where = places(300, 30.0)
    assert np.array_equal(halves(where, 0)[0], halves(where.copy(), 0)[0])
    assert not np.array_equal(halves(where, 0)[0], halves(where, 1)[0])
