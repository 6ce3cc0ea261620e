"""Logistic regression and ridge agree with scikit-learn, keep classes that are absent, and choose on validation."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny_features import K, samples

from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.logistic import PATIENCE, _best_strength, logistic, sigmoid


def test_logistic_chooses_the_smallest_of_the_best_c_and_is_scikit_learns() -> None:
    (X, y), (V, yv), (Z, _) = samples(Goal.SINGLE, noise=2), samples(Goal.SINGLE, 60, 2, 1), samples(Goal.SINGLE, 50, 2, 2)
    found = logistic(X, y, V, yv, Z, Goal.SINGLE, K)
    scale = StandardScaler().fit(X.astype(np.float64))
    models = {c: LogisticRegression(C=c, max_iter=5000, tol=1e-7).fit(scale.transform(X), y) for c in np.logspace(-4, 4, 9)}
    scores = {c: model.score(scale.transform(V), yv) for c, model in models.items()}
    best = min(c for c in scores if scores[c] == max(scores.values()))
    assert found.chosen["best_c"] == pytest.approx(best)
    assert np.mean(found.prediction == models[best].predict(scale.transform(Z))) >= 0.98


@pytest.mark.parametrize(
    ("scores", "best", "tried"),
    [
        ([0.1, 0.2, 0.5, 0.4, 0.4, 0.3], 2, 6),  # three worse ones in a row
        ([0.2, 0.1, 0.1, 0.3, 0.1, 0.1, 0.3, 0.1, 0.4], 8, 9),
        ([0.0] * 6 + [0.1, 0.1, 0.1], 6, 9),  # as good as the best is not worse
        ([-np.inf] * 8 + [0.3], 8, 9),
    ],
)
def test_the_sweep_ends_after_worse_ones_in_a_row(scores: list[float], best: int, tried: int) -> None:
    asked: list[float] = []

    def fit(strength: float) -> tuple[float, tuple[np.ndarray, np.ndarray, bool]]:
        asked.append(strength)
        return scores[len(asked) - 1], (np.full((2, 3), strength), np.zeros(2), True)

    found, (weights, _, _) = _best_strength(fit)
    assert PATIENCE == 3
    assert asked == np.logspace(-4, 4, 9)[:tried].tolist()
    assert found == weights[0, 0] == asked[best]


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


def test_sigmoid_is_exact_for_any_logit() -> None:
    assert sigmoid(np.array([-np.inf, -1000, 0, 1000, np.inf])).tolist() == [0, 0, 0.5, 1, 1]
    assert sigmoid(np.array([1.3])) == pytest.approx(1 / (1 + np.exp(-1.3)))
