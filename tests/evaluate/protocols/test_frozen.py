"""Protocols on frozen features refuse what is not finite and run every goal; nearest neighbours agree with plain loops."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_features import D, K, samples
from tiny_task import tiny_task

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.frozen import Fit, fit_knn, knn, require_finite, run_frozen, score
from mmearth_ray.evaluate.protocols.logistic import fit_logistic, logistic
from mmearth_ray.evaluate.protocols.splits import rounds, subset


def test_knn_is_a_vote_of_the_nearest_by_centred_cosine() -> None:
    (X, y), (Z, _) = samples(Goal.SINGLE), samples(Goal.SINGLE, 40, seed=1)
    for k in (1, 2, 5):
        found = knn(X, y, Z, Goal.SINGLE, K, k)
        mean = X.mean(axis=0, dtype=np.float64)
        A, B = X - mean, Z - mean
        for place, cosines in enumerate((B @ A.T) / np.outer(np.linalg.norm(B, axis=1), np.linalg.norm(A, axis=1))):
            near = y[np.argsort(-cosines)[:k]]
            votes = np.bincount(near, minlength=K)
            first = next(c for c in near if votes[c] == votes.max())
            assert found.prediction[place] == first
        assert found.chosen == {"k": k}


def test_knn_of_several_labels_is_their_share_and_of_values_their_mean() -> None:
    (X, y), (Z, _) = samples(Goal.MULTI), samples(Goal.MULTI, 9, seed=1)
    shares = knn(X, y, Z, Goal.MULTI, K, 4).prediction
    assert set(np.unique(shares * 4)) <= {0, 1, 2, 3, 4}
    assert shares.shape == (9, K)
    (X, y), (Z, _) = samples(Goal.REGRESSION), samples(Goal.REGRESSION, 9, seed=1)
    everyone = knn(X, y, Z, Goal.REGRESSION, 1, 10_000)
    assert everyone.prediction == pytest.approx(y.mean())
    assert everyone.chosen == {"k": 120}
    with pytest.raises(UsageError, match="k must be"):
        knn(X, y, Z, Goal.REGRESSION, 1, 0)


def test_knn_of_one_training_image_or_constant_features_gives_an_answer() -> None:
    X, y = samples(Goal.SINGLE)
    assert set(knn(X[:1], y[:1], X, Goal.SINGLE, K).prediction) == {y[0]}
    same = np.ones((6, 4), np.float32)
    assert knn(same, np.zeros(6, int), same, Goal.SINGLE, K).prediction.tolist() == [0] * 6


def test_scores_do_not_depend_on_shift_or_scale_of_features() -> None:
    (X, y), (V, yv) = samples(Goal.SINGLE), samples(Goal.SINGLE, 60, seed=1)
    first = logistic(X, y, V, yv, V, Goal.SINGLE, K).prediction
    assert np.array_equal(first, logistic(X * 8.0 - 16, y, V * 8.0 - 16, yv, V * 8.0 - 16, Goal.SINGLE, K).prediction)
    assert np.array_equal(knn(X, y, V, Goal.SINGLE, K).prediction, knn(X * 8.0, y, V * 8.0, Goal.SINGLE, K).prediction)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    task = tiny_task(tmp_path / "task")
    (found,) = rounds(task)
    features = np.random.default_rng(0).normal(size=(len(task), D)).astype(np.float32)
    fits: list[Fit] = [partial(fit_knn, goal=Goal.SINGLE, classes=K), partial(fit_logistic, goal=Goal.SINGLE, classes=K)]
    for split, rows in (("train", found.train), ("valid", found.valid), ("test", found.test)):
        broken = features.copy()
        broken[rows[3], 2] = value
        for fit in fits:
            with pytest.raises(DataError, match=f"encoder 'E' for image '{task.ids[rows[3]]}' of the {split} split"):
                run_frozen(fit, broken, task, found, "E")
    X, y = samples(Goal.SINGLE)
    broken = X.copy()
    broken[4, 1] = value
    with pytest.raises(DataError, match="row 4 of the train split"):
        knn(broken, y, X, Goal.SINGLE, K)
    with pytest.raises(DataError, match="row 4 of the test split"):
        logistic(X, y, X, y, broken, Goal.SINGLE, K)
    require_finite(X, "train")


@pytest.mark.parametrize("goal", [Goal.SINGLE, Goal.MULTI, Goal.REGRESSION])
def test_every_goal_runs_over_a_data_set_and_with_few_labels(tmp_path: Path, goal: Goal) -> None:
    task = tiny_task(tmp_path / "task", goal, images=100)
    features = task.images(np.arange(len(task))).mean(axis=(2, 3)).astype(np.float32)
    (found,) = rounds(task)
    outputs = task.info.outputs
    for fit in (partial(fit_knn, goal=goal, classes=outputs), partial(fit_logistic, goal=goal, classes=outputs)):
        outcome, chosen = run_frozen(fit, features, task, found)
        assert outcome.primary() > (0.6 if goal is Goal.REGRESSION and fit.func is fit_knn else 0.8)  # cosines know no length
        assert outcome.ids.tolist() == task.ids[found.test].tolist()
        assert chosen
        few = type(found)(subset(task, found.train, 0.01, 0), found.valid, found.test)
        assert np.isfinite(run_frozen(fit, features, task, few)[0].primary())
    with pytest.raises(DataError, match="no image with a label"):
        run_frozen(fit, features, task, type(found)(found.train, found.valid[:0], found.test))


def test_maps_are_not_one_feature_per_image(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task", Goal.SEGMENTATION, images=10)
    with pytest.raises(UsageError, match="per cell"):
        run_frozen(partial(fit_knn, goal=task.info.goal, classes=K), np.zeros((10, 2)), task, rounds(task)[0])


def test_choosing_prefers_what_is_defined() -> None:
    nothing = np.zeros((3, 2))
    assert score(Goal.MULTI, 2, nothing, nothing) == -np.inf
    assert score(Goal.REGRESSION, 1, np.ones(2), np.zeros(2)) == -1
    assert score(Goal.SEGMENTATION, 2, np.array([0, 1, 1]), np.array([0, 1, 0])) == pytest.approx(0.5)
