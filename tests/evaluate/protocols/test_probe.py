"""The linear probe: the published settings exactly, and settings that converge to what a logistic regression finds."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_task import tiny_task

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.frozen import Fit, run_frozen
from mmearth_ray.evaluate.protocols.logistic import fit_logistic
from mmearth_ray.evaluate.protocols.probe import fit_probe
from mmearth_ray.evaluate.protocols.recipes import RECIPES, probe_recipe, tuning_recipe
from mmearth_ray.evaluate.protocols.splits import rounds, subset


def features_of(task_images: np.ndarray) -> np.ndarray:
    return np.concatenate([task_images.mean(axis=(2, 3)), task_images.std(axis=(2, 3))], axis=1).astype(np.float32)


@pytest.mark.parametrize("goal", [Goal.SINGLE, Goal.MULTI, Goal.REGRESSION])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_goal_is_probed_with_every_recipe(tmp_path: Path, goal: Goal, recipe: str) -> None:
    task = tiny_task(tmp_path / "task", goal, images=100)
    X, (found,) = features_of(task.images(np.arange(100))), rounds(task)
    steps = 120 if recipe == "converged" else None
    fit = partial(fit_probe, goal=goal, classes=task.info.outputs, recipe=recipe, steps=steps, all_labels=False)
    outcome, chosen = run_frozen(fit, X, task, found)
    again, _ = run_frozen(fit, X, task, found)
    assert outcome.prediction is not None
    assert again.prediction is not None
    assert np.array_equal(outcome.prediction, again.prediction)
    assert chosen["recipe"] == recipe
    if recipe == "converged":
        assert outcome.primary() > 0.9
    else:
        assert chosen["best_lr"] == 2.5e-5
        assert chosen["best_batch_size"] == 32
        assert chosen["steps"] == 100
        assert "drop path" in chosen["note"]
    few = type(found)(subset(task, found.train, 0.01, 0), found.valid, found.test)
    outcome, chosen = run_frozen(fit, X, task, few)
    assert np.isfinite(outcome.primary())
    assert chosen["best_batch_size"] == 1


def test_what_converges_is_as_good_as_a_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 20))
    y = rng.integers(0, 5, 800)
    X = (centres[y] + 1.6 * rng.normal(size=(800, 20))).astype(np.float32) * np.logspace(-2, 2, 20, dtype=np.float32)
    parts = [(X[part], y[part]) for part in (slice(0, 200), slice(200, 400), slice(400, 800))]
    fits: list[Fit] = [partial(fit_logistic, goal=Goal.SINGLE, classes=5),
                       partial(fit_probe, goal=Goal.SINGLE, classes=5, steps=200)]  # fmt: skip
    scores = [np.mean(fit(*parts[0], *parts[1]).predict(parts[2][0]) == parts[2][1]) for fit in fits]
    assert scores[0] > 0.6
    assert scores[1] > scores[0] - 0.04


def test_the_seed_decides_and_nothing_else_is_drawn_from() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 4)).astype(np.float32), rng.integers(0, 3, 40)
    state = torch.random.get_rng_state()
    labels = np.eye(3)[y]
    first, same, other = (
        fit_probe(X, labels, X, labels, goal=Goal.MULTI, classes=3, recipe="published", steps=5, seed=seed).predict(X)
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_steps_and_batch_can_be_set_and_bad_settings_are_refused() -> None:
    X, y = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32), np.arange(20) % 2
    chosen = fit_probe(X, y, X, y, goal=Goal.SINGLE, classes=2, steps=7, batch=8).chosen
    assert chosen["steps"] == 7
    assert chosen["best_batch_size"] == 8
    assert chosen["best_step"] <= 7
    with pytest.raises(UsageError, match="steps=0"):
        fit_probe(X, y, X, y, goal=Goal.SINGLE, classes=2, steps=0)
    with pytest.raises(UsageError, match="no recipe 'quick'"):
        fit_probe(X, y, X, y, goal=Goal.SINGLE, classes=2, recipe="quick")
    with pytest.raises(UsageError, match="no recipe"):
        tuning_recipe("quick", Goal.SINGLE)
    with pytest.raises(DataError, match="valid split has no image"):
        fit_probe(X, y, X[:0], y[:0], goal=Goal.SINGLE, classes=2)
    broken = X.copy()
    broken[2] = np.nan
    with pytest.raises(DataError, match="row 2 of the train split"):
        fit_probe(broken, y, X, y, goal=Goal.SINGLE, classes=2)


def test_published_settings_are_those_of_the_job_scripts() -> None:
    probe, few = probe_recipe("published"), probe_recipe("published", all_labels=False)
    assert (few.rates, few.batch, few.epochs, few.smoothing, few.weight_decay) == ((2.5e-5,), 32, 100, 0.2, 0.3)
    assert (probe.rates, probe.batch, probe.epochs, probe.smoothing) == ((pytest.approx(8e-4),), 1024, 100, 0.2)
    assert probe.steps(2000, 1024, None) == 100  # of m-eurosat: 31 of 64 images, one update of 16 of them
    assert few.steps(200, 32, None) == 600
    assert few.steps(20, 20, None) == 100
    tuning = tuning_recipe("published", Goal.MULTI)
    assert (tuning.rates, tuning.batch, tuning.layer_decay, tuning.drop_path) == ((pytest.approx(8e-4),), 1024, 0.9, 0.1)
    maps = tuning_recipe("published", Goal.SEGMENTATION)
    assert (maps.rates, maps.batch, maps.epochs, maps.frozen_share) == ((1.25e-3,), 32, 200, 0.25)
    assert not any(plan.best or plan.augment or plan.standardise for plan in (probe, tuning, maps))


def test_converged_steps_do_not_shrink_with_the_labels() -> None:
    plan = probe_recipe("converged")
    assert plan.steps(20, 20, None) == plan.least_steps
    assert plan.steps(10_000, 256, None) == 4000
    assert plan.steps(10_000, 256, 300) == 300
