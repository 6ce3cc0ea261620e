"""The mixture: every position belongs to one set, each set's positions count up without a gap, shares are kept everywhere."""

import numpy as np
import pytest

from mmearth_ray.stream.mixture import RESOLUTION, Mixture, by_size, by_weight


def owners(mixture: Mixture, start: int, stop: int) -> list[tuple[int, int]]:
    """(set, its own position) of each position."""
    return [(number, own) for number, first, last in mixture.spans(start, stop) for own in range(first, last)]


MIXTURES = [by_size([3, 5, 1]), by_size([7, 7]), by_weight([1, 3]), by_weight([0.2, 0.5, 0.3]), by_weight([1, 10_000])]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_each_sets_own_positions_count_up_without_a_gap(mixture: Mixture) -> None:
    stop = 2 * len(mixture.pattern) + 5
    found = owners(mixture, 0, stop)
    assert len(found) == stop
    for number in range(len(mixture.places)):
        own = [position for owner, position in found if owner == number]
        assert own == list(range(len(own)))
        assert len(own) >= 2 * mixture.places[number]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_any_range_is_a_part_of_the_whole(mixture: Mixture) -> None:
    whole = owners(mixture, 0, 80)
    for start in range(0, 60, 7):
        for stop in range(start, 80, 9):
            assert owners(mixture, start, stop) == whole[start:stop]
    far = 10**9 * len(mixture.pattern)
    assert [(n, own - 10**9 * mixture.places[n]) for n, own in owners(mixture, far, far + 80)] == whole


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_batch_holds_nearly_the_shares_of_the_whole(mixture: Mixture) -> None:
    shares = np.asarray(mixture.places) / sum(mixture.places)
    for start in range(0, 3000, 61):
        held = np.bincount([number for number, _ in owners(mixture, start, start + 64)], minlength=len(shares))
        assert np.abs(held - 64 * shares).max() < len(shares) + 0.5


def test_by_size_each_tile_comes_once_in_a_block_and_by_weight_shares_are_those_asked_for() -> None:
    assert by_size([3, 5, 1]).places == (3, 5, 1)
    assert by_size([12]).places == by_weight([0.7]).places == (1,)
    assert by_weight([1, 3]).places == (RESOLUTION // 4, RESOLUTION * 3 // 4)
    assert by_weight([2, 6]).places == by_weight([1, 3]).places
    assert by_weight([1, 1, 1]).places in {(334, 333, 333), (333, 334, 333), (333, 333, 334)}
    assert by_weight([1, 10_000, 1]).places == (1, 998, 1)
    for weights in ([0.123, 0.456, 0.421], [5, 7, 11, 13], [1e-9] * 3 + [1.0]):
        places = by_weight(weights).places
        assert sum(places) == RESOLUTION
        assert min(places) >= 1


def test_one_set_has_all_positions() -> None:
    assert list(by_size([9]).spans(5, 70)) == [(0, 5, 70)]
