"""Means and differences over seeds: both kinds of chance are in the interval, pairs are pairs, bounds are kept."""

import math

import numpy as np
import pytest
from tiny_points import outcome

from mmearth_ray.evaluate.compare.combined import Estimate, Resamples, Scored, difference, estimate, mean_of
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.intervals import over_seeds
from mmearth_ray.evaluate.protocols.metrics import Outcome


def scored(of: Outcome, drawn: Resamples) -> Scored:
    return Scored(of.primary(), drawn.values(of))


def test_values_of_resamples_are_those_of_the_images_drawn() -> None:
    found, drawn = outcome(30), Resamples(40, 300, seed=3)
    rows = [np.repeat(np.arange(40), counts) for counts in drawn.counts_Rn.astype(int)]
    assert {len(r) for r in rows} == {40}
    assert drawn.values(found) == pytest.approx([found.primary(r) for r in rows])
    assert np.array_equal(drawn.counts_Rn, Resamples(40, 300, seed=3).counts_Rn)
    assert not np.array_equal(drawn.counts_Rn, Resamples(40, 300, seed=4).counts_Rn)


def test_half_widths_of_both_kinds_are_added_in_squares() -> None:
    rng = np.random.default_rng(0)
    scores = [0.5, 0.6, 0.55]
    values = [score + rng.normal(0, 0.05, 2000) for score in scores]
    mean, low, high = over_seeds(scores)
    assert low is not None
    assert high is not None
    image_low, image_high = np.percentile(np.mean(values, axis=0), [2.5, 97.5])
    found = estimate(scores, values, (0.0, 1.0))
    assert found.mean == pytest.approx(0.55)
    assert found.low == pytest.approx(mean - math.hypot(mean - image_low, mean - low))
    assert found.high == pytest.approx(mean + math.hypot(image_high - mean, high - mean))
    assert found.seeds == 3
    alone = estimate(scores[:1], values[:1], (0.0, 1.0))
    assert (alone.low, alone.high) == pytest.approx(tuple(np.percentile(values[0], [2.5, 97.5])))


def test_intervals_end_where_the_metric_ends() -> None:
    found = estimate([0.1, 0.9], [np.full(10, 0.1), np.full(10, 0.9)], (0.0, 1.0))
    assert (found.low, found.high) == (0.0, 1.0)
    assert estimate([0.5], [np.full(10, np.nan)], (0.0, 1.0)) == Estimate(0.5, None, None, 1)


def test_differences_pair_seeds_and_images() -> None:
    drawn = Resamples(40, 400)
    better = {seed: scored(outcome(30 + seed), drawn) for seed in range(3)}
    worse = {seed: scored(outcome(24 + seed), drawn) for seed in range(3)}
    found = difference(better, worse, alone=False)
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(6 / 40), 3)
    assert found.low is not None
    assert 0 < found.low < 6 / 40  # images that both get right cancel
    apart = mean_of(better, (0.0, 1.0))
    assert apart is not None
    assert apart.low is not None
    assert found.mean - found.low < apart.mean - apart.low
    assert difference({0: better[0]}, {1: worse[1]}, alone=False) is None
    assert difference({0: better[0], 1: better[1]}, {1: worse[1], 2: worse[2]}, alone=False) == difference(
        {1: better[1]}, {1: worse[1]}, alone=False
    )


def test_a_seed_that_is_left_of_several_meets_its_own_alone() -> None:
    drawn = Resamples(40, 100)
    left, all_of_them = {2: scored(outcome(30), drawn)}, {seed: scored(outcome(20 + 5 * seed), drawn) for seed in range(3)}
    assert difference(left, all_of_them, alone=False) == difference(left, {2: all_of_them[2]}, alone=False)


def test_a_single_test_image_gives_no_interval() -> None:
    assert np.isnan(Resamples(1, 10).values(outcome(1, 1))).all()


def test_with_all_labels_what_has_one_result_meets_every_seed() -> None:
    drawn = Resamples(40, 100)
    fixed, varied = {0: scored(outcome(30), drawn)}, {seed: scored(outcome(20 + seed), drawn) for seed in range(3)}
    found = difference(fixed, varied, alone=True)
    assert found is not None
    assert (found.seeds, found.mean) == (3, pytest.approx(9 / 40))
    back = difference(varied, fixed, alone=True)
    assert back is not None
    assert (back.seeds, back.mean) == (3, pytest.approx(-9 / 40))


def test_nothing_is_said_of_nothing() -> None:
    assert mean_of({}, (0.0, 1.0)) is None
    assert str(Estimate(0.5, None, None, 1)) == "0.500"
    assert str(Estimate(0.5, 0.25, 0.75, 2)) == "0.500 [0.250, 0.750]"


def test_an_interval_of_95_percent_holds_the_truth_about_as_often() -> None:
    """Seeds and test images vary: of 200 experiments the interval holds the expected score in 93 to 100 %."""
    held, experiments, images, seeds, truth = 0, 200, 80, 4, 0.6
    for number in range(experiments):
        rng = np.random.default_rng([number, 5])
        ease, drawn, found = rng.normal(0, 0.8, images), Resamples(images, 200, number), {}
        for seed in range(seeds):
            skill = rng.normal(0, 0.15)
            right = rng.random(images) < truth_of(ease + skill, truth)
            labels = np.zeros(images, int)
            made = Outcome(Goal.SINGLE, 2, np.arange(images).astype(object), labels, np.where(right, 0, 1))
            found[seed] = scored(made, drawn)
        e = mean_of(found, (0.0, 1.0))
        assert e is not None
        assert e.low is not None
        assert e.high is not None
        held += e.low <= EXPECTED <= e.high
    assert 0.93 <= held / experiments <= 1.0


def truth_of(ease: np.ndarray, centre: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(ease + math.log(centre / (1 - centre)))))


_LOTS = np.random.default_rng(1).normal(0, math.hypot(0.8, 0.15), 400_000)
EXPECTED = float(truth_of(_LOTS, 0.6).mean())
