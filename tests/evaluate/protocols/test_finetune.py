"""Fine-tuning learns every goal, by both recipes, by the seed alone, and says which image gives numbers that are none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_task import tiny_task

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal, Task
from mmearth_ray.evaluate.features.encoders import Structure, build, open_subject, random_twin
from mmearth_ray.evaluate.protocols.finetune import Tuning, _fit, _tuning, finetune
from mmearth_ray.evaluate.protocols.pictures import Pictures
from mmearth_ray.evaluate.protocols.recipes import tuning_recipe
from mmearth_ray.evaluate.protocols.splits import Round, rounds, subset

ATTO = open_subject("random:atto/8")
SUBJECT = replace(random_twin(replace(ATTO, structure=Structure((1, 1, 2, 1), (16, 32, 32, 64), "modified")), 0), name="small")


def few(task: Task, images: int = 8) -> Round:
    (found,) = rounds(task)
    return Round(subset(task, found.train, images / len(found.train), 0), found.valid[:4], found.test)


@pytest.mark.parametrize("goal", [Goal.SINGLE, Goal.MULTI, Goal.REGRESSION])
def test_supervised_training_from_scratch_learns_each_goal(tmp_path: Path, goal: Goal) -> None:
    task = tiny_task(tmp_path / "task", goal, size=8)
    steps = 60 if goal is Goal.REGRESSION else 25
    outcome, chosen = finetune(SUBJECT, task, rounds(task)[0], steps=steps, batch=16, seed=1)
    assert outcome.primary() > (0.5 if goal is Goal.REGRESSION else 0.75)
    assert outcome.ids.tolist() == task.ids[task.rows("test")].tolist()
    assert {"best_lr": 5e-4, "best_batch_size": 16, "steps": steps}.items() <= chosen.items()
    assert 1 <= chosen["best_step"] <= steps


@pytest.mark.parametrize("goal", [Goal.SINGLE, Goal.SEGMENTATION])
def test_in_bf16_it_learns_as_well_and_its_numbers_are_others(tmp_path: Path, goal: Goal) -> None:
    task = tiny_task(tmp_path / "task", goal, images=40, size=8)
    found = {p: finetune(SUBJECT, task, rounds(task)[0], steps=25, batch=8, precision=p) for p in ("fp32", "bf16")}
    assert all(outcome.primary() > 0.5 for outcome, _ in found.values())
    assert {p: chosen["precision"] for p, (_, chosen) in found.items()} == {p: p for p in found}
    assert not np.array_equal(made(task, "fp32")[1], made(task, "bf16")[1])


@pytest.mark.parametrize(("precision", "inside"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_only_what_is_multiplied_is_of_the_precision(tmp_path: Path, precision: str, inside: torch.dtype) -> None:
    tuning, outputs = made(tiny_task(tmp_path / "task", size=8), precision)
    assert outputs.dtype == np.float32
    assert all(weight.dtype == torch.float32 for weight in tuning.model.parameters())
    head, seen = next(m for m in tuning.model.modules() if isinstance(m, torch.nn.Linear)), []
    head.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    tuning.outputs(tuning.task.images(np.arange(2)))
    assert seen == [inside]


def made(task: Task, precision: str) -> tuple[Tuning, np.ndarray]:
    """A model after a few steps of training, and what it says of two images."""
    rows, plan = few(task), tuning_recipe("converged", task.info.goal)
    pictures, generator = Pictures(task, rows.train), torch.Generator().manual_seed(0)
    tuning = _tuning(SUBJECT, task, pictures.labels, "dataset", plan, False, generator, "cpu", precision)
    _fit(tuning, plan, pictures, rows, 8, 2, False, generator)
    with torch.no_grad():
        return tuning, tuning.outputs(task.images(np.arange(2))).numpy()


def test_images_are_read_once_however_often_validation_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, read, asked = tiny_task(tmp_path / "task", images=30, size=8), Task.images, []
    monkeypatch.setattr(Task, "images", lambda self, rows: asked.extend(np.asarray(rows).tolist()) or read(self, rows))
    (rows,) = rounds(task)
    _, chosen = finetune(SUBJECT, task, rows, steps=6)
    assert chosen["steps"] == 6  # each with a look at validation
    assert sorted(asked) == sorted([*rows.train.tolist(), *rows.valid.tolist(), *rows.test.tolist()])


@pytest.mark.parametrize("size", [16, 13])
def test_a_unet_learns_masks_of_any_side(tmp_path: Path, size: int) -> None:
    task = tiny_task(tmp_path / "task", Goal.SEGMENTATION, images=30, size=size)
    outcome, _ = finetune(SUBJECT, task, rounds(task)[0], steps=25, batch=8)
    assert outcome.primary() > 0.5
    truth = task.labels(task.rows("test"))
    assert outcome.confusion is not None
    assert outcome.confusion.sum(axis=(1, 2)).tolist() == (truth >= 0).sum(axis=(1, 2)).tolist()


@pytest.mark.parametrize("goal", list(Goal))
def test_the_published_recipe_runs_each_goal_and_the_seed_decides(tmp_path: Path, goal: Goal) -> None:
    task = tiny_task(tmp_path / "task", goal, images=30, size=8)
    state = torch.random.get_rng_state()
    found = [finetune(SUBJECT, task, few(task), recipe="published", steps=4, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    part = "confusion" if goal is Goal.SEGMENTATION else "prediction"
    first, same, other = (getattr(outcome, part) for outcome, _ in found)
    assert np.array_equal(first, same)
    if goal in (Goal.MULTI, Goal.REGRESSION):
        assert not np.array_equal(first, other)
    assert found[0][1]["best_batch_size"] == 8
    assert found[0][1]["best_step"] == 4


@pytest.mark.parametrize("goal", [Goal.SINGLE, Goal.SEGMENTATION])
def test_a_frozen_encoder_keeps_its_weights(tmp_path: Path, goal: Goal, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "mmearth_ray.evaluate.protocols.finetune.build", lambda subject: made.append(build(subject)) or made[-1]
    )
    task = tiny_task(tmp_path / "task", goal, images=30, size=8)
    _, chosen = finetune(SUBJECT, task, few(task), steps=3, frozen=True)
    assert chosen["frozen"] is True
    before = build(SUBJECT).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in made[0].state_dict().items())
    finetune(SUBJECT, task, few(task), steps=3)
    after = {name.replace("pwconv2.0", "pwconv2"): tensor for name, tensor in made[1].state_dict().items()}
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())


def test_batches_in_parts_are_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task(tmp_path / "task", Goal.REGRESSION, images=30, size=8)
    whole, _ = finetune(SUBJECT, task, few(task), steps=2, frozen=True, recipe="published")
    monkeypatch.setattr("mmearth_ray.evaluate.protocols.finetune.MOST_AT_ONCE", 3)
    monkeypatch.setattr("mmearth_ray.evaluate.protocols.pictures.MOST_BYTES", 0)  # and images are read from disk
    parts, _ = finetune(SUBJECT, task, few(task), steps=2, frozen=True, recipe="published")
    assert whole.prediction is not None
    assert parts.prediction == pytest.approx(whole.prediction, rel=1e-4)


def test_one_labelled_image_and_few_of_the_bands_are_enough(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task", images=30, size=8)
    images, chosen_bands = Task.images, task.info.bands[:4]
    part = replace(task.info, bands=chosen_bands, mean=task.info.mean[:4], std=task.info.std[:4])
    task = replace(task, info=part)
    assert images(task, [0]).shape == (1, 4, 8, 8)
    outcome, chosen = finetune(SUBJECT, task, few(task, 1), steps=2)
    assert chosen["best_batch_size"] == 1
    assert chosen["absent_bands"] == list(SUBJECT.bands[4:])
    assert len(outcome) == 6


def test_outputs_that_are_not_finite_name_encoder_image_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task(tmp_path / "task", images=30, size=8)
    (found,) = rounds(task)
    read = Task.images

    def broken(self: Task, rows: np.ndarray) -> np.ndarray:
        images = read(self, rows).astype(np.float32)
        images[np.asarray(rows) == found.test[2]] = 3e38
        return images

    monkeypatch.setattr(Task, "images", broken)
    monkeypatch.setattr("mmearth_ray.evaluate.protocols.pictures.MOST_BYTES", 0)  # floats as they are
    with pytest.raises(DataError, match=f"encoder 'small' for image '{task.ids[found.test[2]]}' of the test split"):
        finetune(SUBJECT, task, few(task), steps=1, recipe="published")
    monkeypatch.setattr(Task, "images", lambda self, rows: np.full_like(broken(self, rows), 3e38))
    with pytest.raises(DataError, match="fine-tuning encoder 'small' on tiny-single-label: the loss is not finite at step 1"):
        finetune(SUBJECT, task, few(task), steps=1)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task", images=30, size=8)
    with pytest.raises(UsageError, match="steps=0"):
        finetune(SUBJECT, task, few(task), steps=0)
    with pytest.raises(UsageError, match="no recipe"):
        finetune(SUBJECT, task, few(task), recipe="fast")
    with pytest.raises(UsageError, match="statistics"):
        finetune(open_subject("statistics"), task, few(task), steps=1)
    masks = tiny_task(tmp_path / "masks", Goal.SEGMENTATION, images=30, size=8)
    object.__setattr__(masks, "labels", lambda rows: np.full((len(rows), 8, 8), -1))
    with pytest.raises(DataError, match="no pixel of the training images"):
        finetune(SUBJECT, masks, few(masks), steps=1)
