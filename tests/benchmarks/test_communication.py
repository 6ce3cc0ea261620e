"""The model of communication, against values worked out by hand."""

import pytest

from benchmarks.communication import (
    BUCKET_BYTES,
    SENT,
    Link,
    Machine,
    Step,
    assumed_step,
    efficiency,
    exposed,
    fit_link,
    ring_round,
    round_seconds,
    sent_seconds,
    volume,
)

FAST, SLOW = Link(100.0, 0.5), Link(10.0, 2.0)
ALONE = Machine(1, 8, FAST, SLOW)


def test_a_round_of_a_ring_passes_all_but_one_part_over_each_link() -> None:
    assert ring_round(400, 4, FAST) == 3 / 4 * 400 / 100 + 3 * 0.5
    assert ring_round(400, 1, FAST) == 0


def test_a_round_goes_within_nodes_first() -> None:
    one_node = Machine(4, 8, FAST, SLOW)
    assert round_seconds(400, one_node) == 3 / 4 * 400 / 100 + 3 * 0.5
    two_nodes = Machine(8, 4, FAST, SLOW)
    assert two_nodes.nodes == 2
    assert round_seconds(400, two_nodes) == (3 / 4 * 400 / 100 + 3 * 0.5) + (1 / 2 * 100 / 10 + 2.0)
    assert Machine(9, 4, FAST, SLOW).nodes == 3


def test_engines_send_two_or_three_times_the_parameters() -> None:
    assert {engine: volume(engine, 10.0) for engine in SENT} == {"ddp": 20, "zero1": 20, "zero2": 20, "zero3": 30}


def test_one_gpu_sends_nothing() -> None:
    for engine in SENT:
        assert exposed(engine, 1e9, Step(1, 2), ALONE) == 0
        assert efficiency(engine, 1e9, Step(1, 2), ALONE) == 1


def test_what_a_pass_hides_adds_nothing_but_its_last_bucket() -> None:
    size = 4 * BUCKET_BYTES
    link = Link(float(BUCKET_BYTES), 0.25)  # a bucket among 2 takes 0.5 s and one turn
    pair = Machine(2, 2, link, link)
    assert sent_seconds(size, pair) == 4 * 0.75
    assert exposed("ddp", size, Step(1, 100), pair) == 2 * 0.75
    assert exposed("ddp", size, Step(1, 2), pair) == 6 - 2
    assert exposed("ddp", size, Step(1, 100), pair, hidden=False) == 6
    assert exposed("zero1", size, Step(1, 100), pair) == 0.75 + 3
    assert exposed("zero3", size, Step(1, 100), pair) == (3 - 1) + 2 * 0.75
    assert efficiency("ddp", size, Step(1, 2), pair) == 3 / 7


def test_a_message_smaller_than_a_bucket_is_sent_at_once_after_the_backward_pass() -> None:
    pair = Machine(2, 2, Link(1.0, 0.0), SLOW)
    assert exposed("ddp", 8.0, Step(1, 100), pair) == 2 * 4.0


def test_an_assumed_step_is_flops_over_what_is_reached_of_the_peak() -> None:
    step = assumed_step(6e12, peak=4e13, utilisation=0.5)
    assert (step.forward, step.backward, step.seconds) == pytest.approx((0.1, 0.2, 0.3))


@pytest.mark.parametrize("members", [2, 4])
def test_a_link_is_found_again_from_the_times_it_makes(members: int) -> None:
    sizes = [1e3, 1e5, 1e6, 1e7]
    link = Link(2e9, 3e-5)
    found = fit_link(sizes, [2 * ring_round(size, members, link) for size in sizes], members)
    assert found.bandwidth == pytest.approx(link.bandwidth)
    assert found.latency == pytest.approx(link.latency)


def test_a_fit_takes_neither_part_below_zero() -> None:
    steep = fit_link([1.0, 10.0], [0.5, 50.0], 2)
    assert steep.latency == 0
    assert steep.bandwidth > 0
    falling = fit_link([1.0, 10.0], [2.0, 1.0], 2)
    assert falling.latency > 0
    assert falling.bandwidth == float("inf")
