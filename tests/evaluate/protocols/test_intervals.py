"""Intervals cover what they should, and pairs share their resamples."""

import numpy as np
import pytest

from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.intervals import bootstrap, over_seeds, paired
from mmearth_ray.evaluate.protocols.metrics import Outcome

RUNS = 300


def accuracy_outcome(right: np.ndarray) -> Outcome:
    ids = np.array([f"{i}" for i in range(len(right))])
    return Outcome(Goal.SINGLE, 2, ids, np.zeros(len(right), int), np.where(right, 0, 1))


def test_the_bootstrap_covers_the_true_accuracy_about_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(0), 0
    for run in range(RUNS):
        low, high = bootstrap(accuracy_outcome(rng.random(150) < 0.7), 300, run)
        assert low is not None
        assert high is not None
        inside += low <= 0.7 <= high
    assert 0.90 <= inside / RUNS <= 0.985


def test_the_bootstrap_covers_micro_f1_r2_and_mean_iou() -> None:
    rng, n = np.random.default_rng(1), 120
    ids = np.array([f"{i}" for i in range(n)])

    def multi() -> Outcome:
        truth = (rng.random((n, 3)) < 0.4).astype(int)
        return Outcome(Goal.MULTI, 3, ids, truth, np.where(rng.random((n, 3)) < 0.8, truth, 1 - truth))

    def value() -> Outcome:
        truth = rng.normal(0, 2, n)
        return Outcome(Goal.REGRESSION, 1, ids, truth, truth + rng.normal(0, 1, n))

    def maps() -> Outcome:
        return Outcome(Goal.SEGMENTATION, 2, ids, confusion=rng.poisson([[20, 5], [5, 10]], (n, 2, 2)))

    iou = (20 / 30 + 10 / 20) / 2
    hit, wrong = 0.4 * 0.8, 0.4 * 0.2 + 0.6 * 0.2
    for make, true in ((multi, 2 * hit / (2 * hit + wrong)), (value, 1 - 1 / 4), (maps, iou)):
        found = [bootstrap(make(), 200, run) for run in range(120)]
        inside = np.mean([low <= true <= high for low, high in found if low is not None and high is not None])
        assert len(found) == 120
        assert inside >= 0.88


def test_paired_differences_cover_and_are_narrower_than_unpaired_ones() -> None:
    rng, inside, widths = np.random.default_rng(2), 0, []
    for run in range(RUNS):
        hard = rng.random(150)
        first, second = accuracy_outcome(hard < 0.75), accuracy_outcome(hard + rng.normal(0, 0.02, 150) < 0.65)
        _, low, high = paired(first, second, 300, run)
        assert low is not None
        assert high is not None
        inside += low <= 0.10 <= high
        alone = bootstrap(first, 300, run)
        assert alone[0] is not None
        assert alone[1] is not None
        widths.append((high - low, alone[1] - alone[0]))
    assert 0.90 <= inside / RUNS <= 0.985
    assert np.mean(widths, axis=0)[0] < 0.8 * np.mean(widths, axis=0)[1]


def test_an_outcome_does_not_differ_from_itself_and_the_seed_decides() -> None:
    right = np.random.default_rng(3).random(60) < 0.5
    outcome = accuracy_outcome(right)
    assert paired(outcome, outcome) == (0.0, 0.0, 0.0)
    assert bootstrap(outcome, seed=4) == bootstrap(outcome, seed=4) != bootstrap(outcome, seed=5)
    low, high = bootstrap(outcome)
    assert low is not None
    assert high is not None
    assert low < outcome.primary() < high


def test_a_bootstrap_is_that_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = accuracy_outcome(np.random.default_rng(4).random(40) < 0.8)
    whole = bootstrap(outcome, 4000, 1)
    monkeypatch.setattr("mmearth_ray.evaluate.protocols.intervals.BLOCK", 400)  # ten resamples at a time
    assert bootstrap(outcome, 4000, 1) == whole
    rng = np.random.default_rng(9)
    plain = np.percentile([outcome.primary(rng.integers(0, 40, 40)) for _ in range(4000)], [2.5, 97.5])
    assert whole == pytest.approx(tuple(plain), abs=0.026)


def test_other_images_or_another_truth_cannot_be_paired() -> None:
    first = accuracy_outcome(np.ones(5, bool))
    with pytest.raises(ValueError, match="same test images"):
        paired(first, accuracy_outcome(np.ones(6, bool)))
    assert first.truth is not None
    with pytest.raises(ValueError, match="same truth"):
        paired(first, Outcome(Goal.SINGLE, 2, first.ids, 1 - first.truth, first.truth))
    with pytest.raises(ValueError, match="same test images"):
        paired(first, Outcome(Goal.SINGLE, 2, first.ids[::-1], first.truth, first.truth))


def test_nothing_is_said_of_one_image_or_an_undefined_metric() -> None:
    assert bootstrap(accuracy_outcome(np.ones(1, bool))) == (None, None)
    assert paired(accuracy_outcome(np.ones(1, bool)), accuracy_outcome(np.zeros(1, bool))) == (1.0, None, None)
    flat = Outcome(Goal.REGRESSION, 1, np.array(["a", "b"]), np.ones(2), np.zeros(2))
    assert bootstrap(flat) == (None, None)


def test_intervals_over_seeds_are_students() -> None:
    assert over_seeds([0.5]) == (0.5, None, None)
    assert over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert over_seeds([0.25] * 5) == (0.25, 0.25, 0.25)
    rng = np.random.default_rng(5)
    inside = np.mean([low <= 0.6 <= high for _, low, high in (over_seeds(rng.normal(0.6, 0.1, 5).tolist()) for _ in range(400))
                      if low is not None and high is not None])  # fmt: skip
    assert 0.92 <= inside <= 0.98
    with pytest.raises(ValueError, match="at least one"):
        over_seeds([])
