"""Logistic regression, or ridge for values, on frozen features, with the strength of regularisation chosen on validation.

Shapes: n images, D features, K classes.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.frozen import Answer, Fitted, Predict, Standardised, require, require_finite, score

C_START, C_STOP, C_COUNT = -4, 4, 9
"""log10 of the inverse strengths of regularisation that are tried (torchgeo-bench: from -6 to 4), and how many at most."""
PATIENCE = 3
"""Strengths in a row that are worse than the best so far and end the sweep: the weakest take most of its time."""
ALPHA_START, ALPHA_STOP, ALPHA_COUNT = -4, 6, 11
"""log10 of ridge's penalties: features are standardised, so that a penalty of n halves the weight of a lone feature."""
ITERATIONS = 1000
TOLERANCE = 1e-6  # of the mean loss's gradient; with scikit-learn's 1e-4 a weak C would end where a stronger one began

Weights: TypeAlias = tuple[np.ndarray, np.ndarray, bool]
"""(K, D), (K,), and whether the fit converged."""


def logistic(
    X_train: np.ndarray,
    y_train: np.ndarray,
    X_valid: np.ndarray,
    y_valid: np.ndarray,
    X_test: np.ndarray,
    goal: Goal,
    classes: int,
) -> Answer:
    """Predictions of `fit_logistic` for X_test: of a ridge regression where the goal is REGRESSION."""
    fitted = fit_logistic(X_train, y_train, X_valid, y_valid, goal=goal, classes=classes)
    require_finite(X_test, "test")
    return Answer(fitted.predict(X_test), fitted.chosen)


def fit_logistic(
    X_train: np.ndarray, y_train: np.ndarray, X_valid: np.ndarray, y_valid: np.ndarray, *, goal: Goal, classes: int
) -> Fitted:
    """Logistic regression on features standardised by the training samples; C is the best on validation, of equals the least.

    Best by the primary metric, of those tried until `PATIENCE` in a row were worse than the best.  MULTI: one against the
    rest, one C for all; a class without positives has probability 0, one without negatives 1.  Of one class alone, that class
    is predicted.  REGRESSION: ridge, whose penalty is chosen by squared error, of equals the largest.  Raises DataError for
    features that are not finite, and without training or validation.
    """
    require(X_train, y_train, "train")
    require(X_valid, y_valid, "valid")
    scaler = Standardised(X_train)
    X, V = scaler(X_train), scaler(X_valid)
    if goal is Goal.REGRESSION:
        best, chosen = _ridge(X, y_train, V, y_valid)
    elif goal is Goal.MULTI:
        best, chosen = _one_against_rest(X, y_train, V, y_valid, classes)
    else:
        best, chosen = _multinomial(X, y_train, V, y_valid, goal, classes)
    return Fitted(lambda Z: best(scaler(Z)) if len(Z) else y_train[:0], chosen)


def _multinomial(
    X: np.ndarray, y: np.ndarray, V: np.ndarray, y_valid: np.ndarray, goal: Goal, classes: int
) -> tuple[Predict, dict[str, Any]]:
    if len(np.unique(y)) == 1:
        only = y[0]
        return lambda Z: np.full(len(Z), only, np.int64), {"best_c": None, "only_class": int(only)}
    model = _regression()

    def fit(strength: float) -> tuple[float, Weights]:
        converged = _fit_quietly(model.set_params(C=strength), X, y)
        return score(goal, classes, y_valid, model.predict(V)), (model.coef_.copy(), model.intercept_.copy(), converged)

    best_c, (weight_KD, bias_K, converged) = _best_strength(fit)
    known, binary = model.classes_, len(weight_KD) == 1

    def predict(Z: np.ndarray) -> np.ndarray:
        logits = Z @ weight_KD.T + bias_K
        return known[(logits[:, 0] > 0).astype(int) if binary else logits.argmax(axis=1)].astype(np.int64)

    return predict, {"best_c": best_c, "converged": converged}


def _one_against_rest(
    X: np.ndarray, y_nK: np.ndarray, V: np.ndarray, y_valid_nK: np.ndarray, classes: int
) -> tuple[Predict, dict[str, Any]]:
    y_nK = y_nK > 0
    learnt = np.flatnonzero(y_nK.any(axis=0) & ~y_nK.all(axis=0))
    models = [_regression() for _ in learnt]
    # A class that all samples have, or none, has a logit that gives probability 1 or 0.
    fixed_K = np.where(y_nK.all(axis=0), np.inf, -np.inf)

    def fit(strength: float) -> tuple[float, Weights]:
        weight_KD, bias_K, converged = np.zeros((classes, X.shape[1])), fixed_K.copy(), True
        for model, number in zip(models, learnt, strict=True):
            converged &= _fit_quietly(model.set_params(C=strength), X, y_nK[:, number])
            weight_KD[number], bias_K[number] = model.coef_[0], model.intercept_[0]
        found = score(Goal.MULTI, classes, y_valid_nK, sigmoid(V @ weight_KD.T + bias_K))
        return found, (weight_KD, bias_K, converged)

    best_c, (best_KD, best_K, converged) = _best_strength(fit)
    return lambda Z: sigmoid(Z @ best_KD.T + best_K), {"best_c": best_c, "converged": converged}


def _best_strength(fit: Callable[[float], tuple[float, Weights]]) -> tuple[float, Weights]:
    """The C that is best on validation and its weights; tried from the strongest regularisation on."""
    best, kept, worse = -np.inf, None, 0
    for strength in np.logspace(C_START, C_STOP, C_COUNT):
        found, weights = fit(strength)
        if kept is None or found > best:
            best, kept = found, (float(strength), weights)
        worse = worse + 1 if found < best else 0
        if worse == PATIENCE:
            break
    assert kept is not None  # there is at least one strength
    return kept


def _ridge(X: np.ndarray, y: np.ndarray, V: np.ndarray, y_valid: np.ndarray) -> tuple[Predict, dict[str, Any]]:
    from sklearn.linear_model import Ridge

    best, kept, penalty = -np.inf, None, 0.0
    for alpha in np.logspace(ALPHA_STOP, ALPHA_START, ALPHA_COUNT):
        model = Ridge(alpha=alpha, solver="svd").fit(X, y)  # svd: exact for any penalty, however alike the features are
        found = score(Goal.REGRESSION, 1, y_valid, model.predict(V))
        if kept is None or found > best:
            best, kept, penalty = found, model, float(alpha)
    assert kept is not None  # there is at least one penalty
    return kept.predict, {"best_alpha": penalty}


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    # Newton's method: on few images and a weak C, L-BFGS needs a hundred times as many iterations, and stops before the end.
    return LogisticRegression(solver="newton-cg", max_iter=ITERATIONS, tol=TOLERANCE, warm_start=True)


def _fit_quietly(model: Any, X: np.ndarray, y: np.ndarray) -> bool:
    """Fit, starting from the weights of the smaller C; whether it converged."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="(?i).*line search")  # the last digits cannot be improved
        model.fit(X, y)
    return bool(np.max(model.n_iter_) < ITERATIONS)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, exact for any size."""
    return 0.5 * (1 + np.tanh(0.5 * logits))
