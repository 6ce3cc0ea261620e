"""Metrics agree with scikit-learn, and with plain loops, on the whole split and on resamples."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, f1_score, jaccard_score, r2_score

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.metrics import Outcome, confusion_of, join, primary

N, K = 80, 5
IDS = np.array([f"image-{i}" for i in range(N)], dtype=object)


def single(seed: int = 0, ids: np.ndarray = IDS) -> Outcome:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, K - 1, len(ids))  # the last class does not occur
    return Outcome(Goal.SINGLE, K, ids, truth, np.where(rng.random(len(ids)) < 0.6, truth, rng.integers(0, K - 1, len(ids))))


def multi(seed: int = 0) -> Outcome:
    rng = np.random.default_rng(seed)
    truth = (rng.random((N, K)) < 0.3).astype(np.uint8)
    return Outcome(Goal.MULTI, K, IDS, truth, np.clip(0.4 * truth + rng.random((N, K)) * 0.7, 0, 1))


def regression(seed: int = 0, offset: float = 0.0) -> Outcome:
    rng = np.random.default_rng(seed)
    truth = rng.normal(offset, 3, N)
    return Outcome(Goal.REGRESSION, 1, IDS, truth, truth + rng.normal(0, 1, N))


def masks(seed: int = 0) -> tuple[Outcome, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, K - 1, (N, 6, 7))
    said = np.where(rng.random(truth.shape) < 0.5, np.maximum(truth, 0), rng.integers(0, K - 1, truth.shape))
    confusion = np.stack([confusion_of(t, s, K) for t, s in zip(truth, said, strict=True)])
    return Outcome(Goal.SEGMENTATION, K, IDS, confusion=confusion), truth, said


@pytest.mark.parametrize("rows", [None, np.random.default_rng(1).integers(0, N, N)])
def test_metrics_are_those_of_scikit_learn(rows: np.ndarray | None) -> None:
    chosen = np.arange(N) if rows is None else rows
    outcome = single()
    assert outcome.truth is not None
    assert outcome.prediction is not None
    truth, said = outcome.truth[chosen], outcome.prediction[chosen]
    expected = {"accuracy": accuracy_score(truth, said), "macro_f1": f1_score(truth, said, average="macro"),
                "micro_f1": f1_score(truth, said, average="micro")}  # fmt: skip
    assert outcome.metrics(rows) == pytest.approx(expected)
    outcome = multi()
    assert outcome.truth is not None
    assert outcome.prediction is not None
    truth, scores = outcome.truth[chosen], outcome.prediction[chosen]
    expected = {"micro_f1": f1_score(truth, scores > 0.5, average="micro"),
                "macro_f1": f1_score(truth, scores > 0.5, average="macro"),
                "map": average_precision_score(truth, scores, average="macro")}  # fmt: skip
    assert outcome.metrics(rows) == pytest.approx(expected)
    outcome = regression(offset=1e6)
    assert outcome.truth is not None
    assert outcome.prediction is not None
    truth, said = outcome.truth[chosen], outcome.prediction[chosen]
    expected = {"r2": r2_score(truth, said), "rmse": np.sqrt(np.mean((truth - said) ** 2))}
    assert outcome.metrics(rows) == pytest.approx(expected)
    outcome, truth, said = masks()
    known = truth[chosen] >= 0
    truth, said = truth[chosen][known], said[chosen][known]
    expected = {
        "accuracy": accuracy_score(truth, said),
        "micro_f1": f1_score(truth, said, average="micro"),
        "macro_f1": f1_score(truth, said, average="macro"),
        "miou": jaccard_score(truth, said, average="macro"),
    }
    assert outcome.metrics(rows) == pytest.approx(expected)


def test_the_primary_metric_is_one_of_the_metrics_and_comes_from_sums_over_images() -> None:
    rng = np.random.default_rng(2)
    for outcome in (single(), multi(), regression(), masks()[0]):
        rows = rng.integers(0, N, N)
        assert outcome.primary() == outcome.metrics()[primary(outcome.goal)]
        weights = np.bincount(rows, minlength=N)[None].astype(float)
        assert outcome.from_sums(weights @ outcome.sums)[0] == pytest.approx(outcome.metrics(rows)[primary(outcome.goal)])


def test_confusions_leave_out_ignored_pixels_and_have_the_truth_in_rows() -> None:
    truth, said = np.array([[0, 1, -1], [2, 2, 1]]), np.array([[0, 2, 1], [2, 0, 1]])
    known = truth >= 0
    assert np.array_equal(confusion_of(truth, said, 3), confusion_matrix(truth[known], said[known]))
    assert confusion_of(truth, said, 3).sum() == 5


def test_what_is_undefined_is_nan_and_absent_classes_do_not_count() -> None:
    nothing = np.zeros((3, 2))
    outcome = Outcome(Goal.MULTI, 2, IDS[:3], nothing, nothing)
    assert all(np.isnan(value) for value in outcome.metrics().values())
    positive = np.array([[1, 0], [0, 0], [1, 0]])
    outcome = Outcome(Goal.MULTI, 2, IDS[:3], positive, positive * 0.9)
    assert outcome.metrics() == {"micro_f1": 1.0, "macro_f1": 1.0, "map": 1.0}
    for truth in (np.full(3, 0.1), np.full(3, 1e9 + 0.3)):
        assert np.isnan(Outcome(Goal.REGRESSION, 1, IDS[:3], truth, truth + 1).primary())
    empty = Outcome(Goal.SEGMENTATION, 2, IDS[:2], confusion=np.zeros((2, 2, 2), int))
    assert all(np.isnan(value) for value in empty.metrics().values())
    one = Outcome(Goal.SEGMENTATION, 4, IDS[:1], confusion=np.diag([0, 9, 0, 0])[None])
    assert one.primary() == 1


def test_folds_are_joined_into_one_outcome() -> None:
    whole = [single(), multi(), regression(), masks()[0]]
    for outcome in whole:
        parts = []
        for rows in (np.arange(30), np.arange(30, N)):
            fields = {p: None if (v := getattr(outcome, p)) is None else v[rows] for p in ("truth", "prediction", "confusion")}
            parts.append(Outcome(outcome.goal, outcome.classes, outcome.ids[rows], **fields))
        assert join(parts).metrics() == pytest.approx(outcome.metrics())
    with pytest.raises(ValueError, match="more than one"):
        join([single(), single()])
    with pytest.raises(ValueError, match="one goal"):
        join([single(), multi()])
    with pytest.raises(ValueError, match="there are some"):
        join([])


def test_predictions_that_are_not_finite_or_not_classes_are_refused() -> None:
    said = np.zeros(N)
    said[7] = np.nan
    with pytest.raises(DataError, match="image-7"):
        Outcome(Goal.REGRESSION, 1, IDS, np.zeros(N), said)
    with pytest.raises(ValueError, match="0 to 4; got 5"):
        Outcome(Goal.SINGLE, K, IDS, np.full(N, 5), np.zeros(N, int))
    with pytest.raises(ValueError, match="must be"):
        Outcome(Goal.MULTI, K, IDS, np.zeros((N, K)), np.zeros(N))
    with pytest.raises(ValueError, match="got nothing"):
        Outcome(Goal.SEGMENTATION, K, IDS)


def test_ids_can_be_kept_in_a_file_without_pickle() -> None:
    assert single().ids.dtype.kind == "U"
