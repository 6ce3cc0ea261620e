"""The plan: every position once, every epoch a permutation of the groups, the same samples for any number of workers."""

from itertools import pairwise

import numpy as np
import pytest

from mmearth_ray.stream.plan import MicroBatches, Plan, Slice

SIZES = (3, 1, 5, 2, 8, 4, 1)
Place = tuple[int, int, int]  # epoch, group, row


def plan(*sizes: int, seed: int = 0, window: int = 1) -> Plan:
    return Plan(np.array(sizes or SIZES), seed, window)


def places(pieces: list[Slice]) -> list[Place]:
    return [(p.epoch, p.group, row) for p in pieces for row in p.rows.tolist()]


def stretch(of: Plan, start: int, stop: int) -> list[Place]:
    return places(list(of.slices(start, stop)))


@pytest.mark.parametrize("seed", [0, 1, 99])
def test_each_epoch_holds_every_row_once_with_whole_groups_in_a_permuted_order(seed: int) -> None:
    the_plan = plan(seed=seed)
    n = the_plan.samples
    assert n == sum(SIZES)
    everything = stretch(the_plan, 0, 6 * n)
    orders = set()
    for epoch in range(6):
        mine = everything[epoch * n : (epoch + 1) * n]
        assert {e for e, _, _ in mine} == {epoch}
        groups = list(dict.fromkeys(group for _, group, _ in mine))
        assert sorted(groups) == list(range(len(SIZES)))
        assert mine == [(epoch, group, row) for group in groups for row in range(SIZES[group])]
        orders.add(tuple(groups))
    assert len(orders) == 6


def test_another_seed_gives_another_order() -> None:
    assert stretch(plan(seed=0), 0, 24) != stretch(plan(seed=1), 0, 24)


def test_any_range_equals_its_single_positions_one_after_the_other() -> None:
    the_plan = plan(2, 1, 3)
    end = 3 * the_plan.samples + 2
    single = [stretch(the_plan, position, position + 1) for position in range(end)]
    assert all(len(one) == 1 for one in single)
    for start in range(end):
        for stop in range(start, end + 1):
            assert stretch(the_plan, start, stop) == [place for one in single[start:stop] for place in one]


def test_a_range_touches_no_group_twice_within_an_epoch_and_cuts_only_at_its_ends() -> None:
    the_plan = plan()
    for start in range(0, 40):
        pieces = list(the_plan.slices(start, start + 17))
        assert len({(p.epoch, p.group) for p in pieces}) == len(pieces)
        for before, after in pairwise(pieces):
            assert before.rows[-1] == SIZES[before.group] - 1
            assert after.rows[0] == 0


def test_a_data_set_smaller_than_the_batch_repeats_epoch_by_epoch() -> None:
    the_plan = plan(2, 1)
    batch = stretch(the_plan, 10, 20)
    assert len(batch) == 10
    assert [epoch for epoch, _, _ in batch] == [position // 3 for position in range(10, 20)]
    for epoch in (4, 5):
        assert sorted((g, r) for e, g, r in batch if e == epoch) == [(0, 0), (0, 1), (1, 0)]


def test_a_plan_may_start_anywhere_without_what_came_before() -> None:
    late = stretch(plan(), 10**9, 10**9 + 50)
    assert late == stretch(plan(), 10**9 - 30, 10**9 + 50)[30:]


@pytest.mark.parametrize("window", [2, 3, 7, 50])
def test_a_window_mixes_the_rows_of_its_groups_and_of_no_others(window: int) -> None:
    mixed, plain = plan(window=window), plan()
    n = plain.samples
    orders = set()
    for epoch in range(4):
        mine, ordered = (stretch(p, epoch * n, (epoch + 1) * n) for p in (mixed, plain))
        groups = list(dict.fromkeys(group for _, group, _ in ordered))
        start = 0
        for first in range(0, len(groups), window):
            stop = start + sum(SIZES[group] for group in groups[first : first + window])
            assert sorted(mine[start:stop]) == sorted(ordered[start:stop])
            start = stop
        assert start == n
        assert mine != ordered
        orders.add(tuple(mine))
    assert len({tuple((g, r) for _, g, r in order) for order in orders}) == 4


@pytest.mark.parametrize("window", [2, 5])
def test_any_range_of_a_mixed_plan_equals_its_single_positions(window: int) -> None:
    the_plan = plan(2, 1, 3, 2, window=window)
    end = 2 * the_plan.samples + 3
    single = [stretch(the_plan, position, position + 1) for position in range(end)]
    for start in range(end):
        for stop in range(start, end + 1):
            assert stretch(the_plan, start, stop) == [place for one in single[start:stop] for place in one]


@pytest.mark.parametrize("global_batch", [12, 16])
def test_the_workers_micro_batches_of_a_step_are_its_positions_in_order_for_every_division(global_batch: int) -> None:
    divisors = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
    for workers in divisors:
        share = global_batch // workers
        for micro in (d for d in divisors if share % d == 0):
            by_rank = [MicroBatches(4, 6, global_batch, workers, r, micro) for r in range(workers)]
            assert {len(ranges) for ranges in by_rank} == {3 * share // micro}
            for step in (4, 5, 6):
                mine = [ranges[(step - 4) * ranges.per_step + part] for ranges in by_rank for part in range(ranges.per_step)]
                assert all(stop - start == micro for start, stop in mine)
                covered = [position for start, stop in mine for position in range(start, stop)]
                assert covered == list(range((step - 1) * global_batch, step * global_batch))


def test_a_sequence_of_micro_batches_ends_where_its_length_says() -> None:
    ranges = MicroBatches(first_step=3, last_step=4, global_batch=8, workers=2, rank=1, micro_batch=2)
    assert len(ranges) == 4
    assert [ranges[i] for i in range(4)] == [(20, 22), (22, 24), (28, 30), (30, 32)]
    for outside in (-1, 4):
        with pytest.raises(IndexError, match=f"micro-batch {outside} of 4"):
            ranges[outside]
    assert len(MicroBatches(5, 4, 8, 2, 1, 2)) == 0
