"""The learning rate at given moments, by the published formula."""

import math

import pytest

from mmearth_ray.train.schedule import learning_rate

PEAK = 2.4e-3  # published: 1.5e-4 x 4096 / 256


def published(epoch: float, peak: float = PEAK, minimum: float = 0.0) -> float:
    """Rate at a fractional epoch of 200, 40 of them warm-up, as MMEarth-train computes it before each step."""
    if epoch < 40:
        return peak * epoch / 40
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 160))


@pytest.mark.parametrize("minimum", [0.0, 1e-5])
@pytest.mark.parametrize("per_epoch", [1, 293])
def test_every_step_of_the_published_run_has_the_published_rate(per_epoch: int, minimum: float) -> None:
    steps = 200 * per_epoch
    for step in range(1, steps + 1, max(1, per_epoch // 3)):
        found = learning_rate(step, steps=steps, peak=PEAK, minimum=minimum, warmup_fraction=0.2)
        assert found == pytest.approx(published((step - 1) / per_epoch, minimum=minimum), rel=1e-12, abs=1e-18)


def test_the_rate_rises_from_zero_to_the_peak_and_falls_along_half_a_cosine() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, steps=1000, peak=1.0, minimum=0.1, warmup_fraction=0.2)

    assert rate(1) == 0
    assert rate(101) == 0.5
    assert rate(201) == 1.0  # the first step after the warm-up
    assert rate(401) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(601) == pytest.approx(0.55)  # half-way down
    assert rate(1001) == pytest.approx(0.1)  # the moment after the last step
    assert 0.1 < rate(1000) < 0.1001
    rates = [rate(step) for step in range(1, 1001)]
    assert rates[:201] == sorted(rates[:201])
    assert rates[200:] == sorted(rates[200:], reverse=True)


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert learning_rate(1, steps=10, peak=0.3, minimum=0.0, warmup_fraction=0.0) == 0.3


def test_with_warm_up_only_the_rate_never_falls() -> None:
    rates = [learning_rate(s, steps=10, peak=1.0, minimum=0.0, warmup_fraction=1.0) for s in range(1, 11)]
    assert rates == pytest.approx([s / 10 for s in range(10)])


def test_a_single_step_has_a_finite_rate() -> None:
    for fraction in (0.0, 0.2, 1.0):
        assert math.isfinite(learning_rate(1, steps=1, peak=1.0, minimum=0.0, warmup_fraction=fraction))
