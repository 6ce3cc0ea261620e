"""The six published GEO-Bench sets, in their own form, converted and taken through every protocol."""

from pathlib import Path

import numpy as np
import pytest
from geobench_fixture import SETS, write_set

from mmearth_ray.evaluate.compare.options import ScoreOptions
from mmearth_ray.evaluate.compare.planning import fixed_of
from mmearth_ray.evaluate.compare.points import Point
from mmearth_ray.evaluate.compare.score import Work, outcome_of, score_point
from mmearth_ray.evaluate.datasets.convert_geobench import GeobenchOptions, convert
from mmearth_ray.evaluate.datasets.task import load_task
from mmearth_ray.evaluate.features.encoders import open_subject
from mmearth_ray.evaluate.protocols.intervals import bootstrap
from mmearth_ray.evaluate.protocols.metrics import primary
from mmearth_ray.evaluate.protocols.names import PLAIN, PROTOCOLS


@pytest.mark.parametrize("name", SETS)
def test_every_protocol_scores_every_published_set(name: str, tmp_path: Path) -> None:
    convert(write_set(tmp_path, name), tmp_path / "task", GeobenchOptions())
    task = load_task(tmp_path / "task")
    fixed = fixed_of(ScoreOptions(steps=1, bootstrap=20), task)
    for spec, protocols in (("random:atto/8", PROTOCOLS), ("statistics", PLAIN)):
        for protocol in protocols:
            point = Point(spec, open_subject(spec), protocol, 1.0, 0, fixed)
            result, arrays = score_point(Work(point, task.folder, tmp_path / "cache"))
            outcome = outcome_of(arrays, task.info)
            assert result.n_test == len(task.rows("test")) == len(outcome)
            assert (result.n_train, result.n_valid) == (len(task.rows("train")), len(task.rows("valid")))
            value = result.metrics[primary(task.info.goal)]
            assert value is not None
            assert 0 <= value <= 1
            assert value == pytest.approx(outcome.primary())
            assert (result.low, result.high) == bootstrap(outcome, 20)
            assert np.array_equal(outcome.ids, task.ids[task.rows("test")])
