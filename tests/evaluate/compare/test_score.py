"""The score of a point: what the protocols give, over all rounds, with the same labels for every encoder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoder import tiny_encoder
from tiny_points import FIXED
from tiny_task import tiny_task

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.compare import score as score_module
from mmearth_ray.evaluate.compare.points import Point
from mmearth_ray.evaluate.compare.score import RUN, Work, arrays_of, outcome_of, score_point
from mmearth_ray.evaluate.datasets.task import Goal, Task, identity_of
from mmearth_ray.evaluate.features.encoders import Subject, open_subject
from mmearth_ray.evaluate.features.extraction import band_statistics
from mmearth_ray.evaluate.features.feeding import feed_of
from mmearth_ray.evaluate.protocols.frozen import knn
from mmearth_ray.evaluate.protocols.intervals import bootstrap
from mmearth_ray.evaluate.protocols.metrics import primary
from mmearth_ray.evaluate.protocols.names import NORMALISATIONS, PROTOCOLS
from mmearth_ray.evaluate.protocols.splits import rounds, subset


@pytest.fixture(scope="module")
def plain() -> Subject:
    return open_subject("statistics")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(str(tiny_encoder(tmp_path_factory.mktemp("encoder"), patch=16)), "tiny")


def work(task: Task, subject: Subject, protocol: str, fraction: float = 1.0, **fixed: Any) -> Work:
    settings = FIXED | {"steps": 2, "dataset": identity_of(task)} | fixed
    point = Point(subject.name, subject, protocol, fraction, 1, settings)
    return Work(point, task.folder, task.folder.parent / "cache")


def test_names_of_protocols_and_normalisations_are_those_that_there_are() -> None:
    from mmearth_ray.evaluate.features import feeding

    assert tuple(RUN) == PROTOCOLS
    assert feeding.NORMALISATIONS == NORMALISATIONS


def test_a_score_is_that_of_the_protocol_on_the_same_labels(tmp_path: Path, plain: Subject) -> None:
    task = tiny_task(tmp_path / "task", images=60, classes=3)
    result, arrays = score_point(work(task, plain, "knn", 0.25))
    rows = rounds(task)[0]
    used = subset(task, rows.train, 0.25, 1)
    features = band_statistics(task.images(np.arange(60)), feed_of(plain, task.info, "dataset"))
    said = knn(features[used], task.labels(used), features[rows.test], Goal.SINGLE, 3, k=5).prediction
    assert arrays["prediction"].tolist() == said.tolist()
    assert arrays["ids"].tolist() == task.ids[rows.test].tolist()
    outcome = outcome_of(arrays, task.info)
    assert result.metrics == outcome.metrics()
    assert (result.low, result.high) == bootstrap(outcome, 100)
    assert (result.n_train, result.n_valid, result.n_test) == (9, 12, 12)
    assert (result.width, result.absent) == (24, ())
    assert result.seconds_features is not None
    assert score_point(work(task, plain, "knn", 0.25))[0].metrics == result.metrics


@pytest.mark.parametrize("goal", list(Goal))
def test_every_goal_under_every_protocol_over_folds(tmp_path: Path, encoder: Subject, goal: Goal) -> None:
    task = tiny_task(tmp_path / "task", goal, images=30, size=32, classes=2, folds=2)
    for protocol in PROTOCOLS:
        result, arrays = score_point(work(task, encoder, protocol, 0.5, recipe="published"))
        assert sorted(arrays["ids"].tolist()) == sorted(task.ids.tolist())
        value = result.metrics[primary(goal)]
        assert value is not None
        assert np.isfinite(value)
        assert result.n_test == 30
        assert (result.seconds_features is None) == (protocol in ("decoder", "finetune"))
        again = outcome_of(arrays, task.info)
        assert arrays_of(again).keys() == arrays.keys()
        assert again.primary() == value


def test_absent_classes_are_named(tmp_path: Path, plain: Subject) -> None:
    task = tiny_task(tmp_path / "task", images=60, classes=6)
    result, _ = score_point(work(task, plain, "logistic", 0.05))
    assert result.n_train == 2
    assert len(result.absent) == 4
    assert set(result.absent) < set(task.info.classes)


def test_features_that_are_not_finite_are_no_score(tmp_path: Path, encoder: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task(tmp_path / "task", images=20)
    found = score_module.features_of_point(work(task, encoder, "knn"), task)
    assert found.matrix_ND is not None
    broken = found.matrix_ND.copy()
    broken[rounds(task)[0].test[0], 3] = np.nan
    monkeypatch.setattr(score_module, "features_of_point", lambda *_: replace(found, matrix_ND=broken))
    name = task.ids[rounds(task)[0].test[0]]
    with pytest.raises(DataError, match=f"features of encoder 'tiny' for image '{name}' of the test split are not finite"):
        score_point(work(task, encoder, "knn"))


def test_another_data_set_in_the_same_place_gives_no_score(tmp_path: Path, plain: Subject) -> None:
    job = work(tiny_task(tmp_path / "task"), plain, "knn", dataset="tiny (another digest)")
    with pytest.raises(DataError, match=r"was tiny \(another digest\) when the command began"):
        score_point(job)
