"""Protocols on frozen features agree with plain loops and scikit-learn, for every goal, with classes absent and NaN refused."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny_task import tiny_task

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.frozen import (
    Fit,
    fit_knn,
    fit_logistic,
    knn,
    logistic,
    require_finite,
    run_frozen,
    score,
    sigmoid,
)
from mmearth_ray.evaluate.protocols.splits import rounds, subset

K, D = 3, 6


def samples(goal: Goal, n: int = 120, noise: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features that tell the labels, but for noise, far from the origin and of unlike sizes."""
    rng = np.random.default_rng([seed, 1])
    mixing = np.random.default_rng(0).normal(size=(K, D)) * np.logspace(-2, 2, D)
    if goal is Goal.MULTI:
        y = (rng.random((n, K)) < 0.4).astype(np.uint8)
        known = y - 0.5
    elif goal is Goal.REGRESSION:
        known = rng.normal(size=(n, K))
        y = 10 + known @ [1.0, -2.0, 0.5]
    else:
        y = rng.integers(0, K, n)
        known = np.eye(K)[y]
    X = known @ mixing + noise * rng.normal(size=(n, D)) * np.logspace(-2, 2, D) + 1000
    return X.astype(np.float32), y


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


def test_logistic_chooses_the_smallest_of_the_best_c_and_is_scikit_learns() -> None:
    (X, y), (V, yv), (Z, _) = samples(Goal.SINGLE, noise=2), samples(Goal.SINGLE, 60, 2, 1), samples(Goal.SINGLE, 50, 2, 2)
    found = logistic(X, y, V, yv, Z, Goal.SINGLE, K)
    scale = StandardScaler().fit(X.astype(np.float64))
    models = {c: LogisticRegression(C=c, max_iter=5000, tol=1e-7).fit(scale.transform(X), y) for c in np.logspace(-4, 4, 9)}
    scores = {c: model.score(scale.transform(V), yv) for c, model in models.items()}
    best = min(c for c in scores if scores[c] == max(scores.values()))
    assert found.chosen["best_c"] == pytest.approx(best)
    assert np.mean(found.prediction == models[best].predict(scale.transform(Z))) >= 0.98


def test_two_classes_of_many_and_classes_that_are_absent_keep_their_numbers() -> None:
    X, y = samples(Goal.SINGLE, noise=0.1)
    kept = y != 1
    found = logistic(X[kept], y[kept], X, y, X, Goal.SINGLE, K)
    assert set(found.prediction) == {0, 2}
    assert (found.prediction[kept] == y[kept]).mean() > 0.95
    only = logistic(X[y == 2], y[y == 2], X, y, X, Goal.SINGLE, K)
    assert set(only.prediction) == {2}
    assert only.chosen == {"best_c": None, "only_class": 2}


def test_one_against_the_rest_gives_probabilities_zero_to_what_was_never_seen() -> None:
    (X, y), (V, yv) = samples(Goal.MULTI), samples(Goal.MULTI, 60, seed=1)
    y[:, 1], everyone = 0, y.copy()
    everyone[:, 1] = 1
    for labels, expected in ((y, 0.0), (everyone, 1.0)):
        found = logistic(X, labels, V, yv, V, Goal.MULTI, K)
        assert (found.prediction[:, 1] == expected).all()
        assert ((found.prediction[:, [0, 2]] > 0.5) == yv[:, [0, 2]]).mean() > 0.8
        assert ((found.prediction >= 0) & (found.prediction <= 1)).all()
    nothing = logistic(X, np.zeros_like(y), V, yv, V, Goal.MULTI, K)
    assert (nothing.prediction == 0).all()


def test_ridge_finds_a_line_and_survives_a_single_image() -> None:
    (X, y), (V, yv), (Z, yz) = (samples(Goal.REGRESSION, n, 0.01, n) for n in (120, 40, 40))
    found = logistic(X, y, V, yv, Z, Goal.REGRESSION, 1)
    assert np.corrcoef(found.prediction, yz)[0, 1] > 0.99
    assert found.chosen["best_alpha"] < 100
    assert logistic(X[:1], y[:1], V, yv, Z, Goal.REGRESSION, 1).prediction == pytest.approx(y[0])
    noise = np.random.default_rng(0).normal(size=X.shape)
    assert logistic(noise, y, noise[:40], yv, noise, Goal.REGRESSION, 1).chosen["best_alpha"] >= 100


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


def test_sigmoid_is_exact_for_any_logit() -> None:
    assert sigmoid(np.array([-np.inf, -1000, 0, 1000, np.inf])).tolist() == [0, 0, 0.5, 1, 1]
    assert sigmoid(np.array([1.3])) == pytest.approx(1 / (1 + np.exp(-1.3)))
