"""Fine-tuning: an encoder and its head, or its UNet for segmentation, trained together on labelled images.

From a random encoder this is supervised training from scratch.  With `frozen` only the head, or the decoder, is trained.

Shapes: B images, C bands, H x W pixels, K outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.task import Goal, Task
from mmearth_ray.evaluate.features.encoders import Subject, build
from mmearth_ray.evaluate.features.extraction import torch_threads
from mmearth_ray.evaluate.features.feeding import Preparation, feed_of
from mmearth_ray.evaluate.protocols.metrics import Outcome, confusion_of
from mmearth_ray.evaluate.protocols.pictures import Pictures, turned
from mmearth_ray.evaluate.protocols.recipes import Recipe, tuning_recipe
from mmearth_ray.evaluate.protocols.splits import Round
from mmearth_ray.evaluate.protocols.targets import Target, target_of
from mmearth_ray.evaluate.protocols.training import DivergedError, Score, decayed, train
from mmearth_ray.evaluate.protocols.tunable import Classifier, add_drop_path, layer_groups
from mmearth_ray.evaluate.protocols.unet import UNet

STREAM = 7401  # tells this use of a seed from others
MOST_AT_ONCE, MOST_PIXELS = 64, 2**19  # images, and pixels, that pass together; a larger batch is several such parts


@dataclass(frozen=True, eq=False)
class Tuning:
    """A model and all that it is trained and tested with."""

    name: str
    model: Classifier | UNet
    prepare: Preparation
    target: Target
    task: Task
    device: str
    precision: str

    @property
    def at_once(self) -> int:
        """Images that pass together: 64 of up to 64 px, 8 of 256 px."""
        return max(1, min(MOST_AT_ONCE, MOST_PIXELS // (self.task.info.height * self.task.info.width)))

    def outputs(self, images_BCHW: np.ndarray) -> Tensor:
        """Scores (B, K), or (B, K, H, W) of exactly the image's size."""
        raw = torch.from_numpy(np.ascontiguousarray(images_BCHW)).to(self.device)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
            scores: Tensor = self.model(self.prepare(raw)).float()
        return scores[..., : raw.shape[2], : raw.shape[3]] if scores.ndim == 4 else scores


def finetune(
    subject: Subject,
    task: Task,
    rows: Round,
    *,
    normalisation: str = "dataset",
    recipe: str = "converged",
    seed: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    threads: int = 1,
    frozen: bool = False,
    device: str = "cpu",
    precision: str = "fp32",
) -> tuple[Outcome, dict[str, Any]]:
    """Train on the training rows by a recipe, at most `steps` steps, and predict the test rows; what was chosen, for reports.

    In the precision bf16 matrices and convolutions run in bfloat16, in training and test; weights and losses are float32.
    Seed, threads, precision and device decide the result to the last bit on a CPU.  Raises UsageError for settings that do
    not go together, DataError for images that give outputs that are not finite.
    """
    plan = tuning_recipe(recipe, task.info.goal)
    generator = torch.Generator().manual_seed(seed * 10_000 + STREAM)
    with torch_threads(threads):
        pictures = Pictures(task, rows.train)
        if task.info.goal is Goal.SEGMENTATION and not (pictures.labels >= 0).any():
            raise DataError(f"{task.info.name}: no pixel of the training images has a label, a segmentation needs some")
        tuning = _tuning(subject, task, pictures.labels, normalisation, plan, frozen, generator, device, precision)
        size = min(batch or plan.batch, len(pictures))
        planned = plan.steps(len(pictures), size, steps)
        best_step = _fit(tuning, plan, pictures, rows, size, planned, frozen, generator)
        outcome, _ = predict(tuning, Pictures(task, rows.test, keep=False), "test")
    chosen = {"recipe": plan.name, "best_lr": plan.rates[0], "best_batch_size": size, "steps": planned, "best_step": best_step,
              "frozen": frozen, "precision": precision, "normalisation": tuning.prepare.feed.normalisation,
              "absent_bands": list(tuning.prepare.feed.absent)}  # fmt: skip
    return outcome, chosen


def _tuning(
    subject: Subject,
    task: Task,
    labels: np.ndarray,
    normalisation: str,
    plan: Recipe,
    frozen: bool,
    generator: torch.Generator,
    device: str,
    precision: str,
) -> Tuning:
    prepare = Preparation(feed_of(subject, task.info, normalisation), subject.patch)
    encoder = build(subject)
    outputs = task.info.outputs
    if task.info.goal is Goal.SEGMENTATION:
        model = UNet(encoder, len(subject.bands), subject.patch, outputs, generator, plan.head_std)
    else:
        model = Classifier(encoder, subject.width, outputs, plan.head_std, generator)
    if plan.drop_path and not frozen:
        add_drop_path(encoder, plan.drop_path, generator)
    target = target_of(task.info.goal, labels, plan.smoothing)
    return Tuning(subject.name, model.to(device), prepare.to(device), target, task, device, precision)


def _fit(
    tuning: Tuning,
    plan: Recipe,
    pictures: Pictures,
    rows: Round,
    batch: int,
    steps: int,
    frozen: bool,
    generator: torch.Generator,
) -> int:
    """Train in place; the step that the weights are of."""
    model, goal = tuning.model, tuning.task.info.goal
    valid = Pictures(tuning.task, rows.valid) if plan.best else None

    def loss_of(places: Tensor, step: int) -> Tensor:
        model.resting = frozen or step <= plan.frozen_share * steps
        images, labels = pictures(places.numpy())
        if plan.augment:
            images, labels = turned(images, labels, goal, generator)
        return tuning.target.loss(tuning.outputs(images), torch.from_numpy(labels).to(tuning.device))

    def validate() -> Score:
        assert valid is not None
        outcome, loss = predict(tuning, valid, "valid")
        _to_training(model, frozen)
        value = outcome.primary()
        return value if np.isfinite(value) else -np.inf, -loss

    _to_training(model, frozen)
    try:
        best = train(
            model, _groups(model, plan, frozen), loss_of, images=len(pictures), batch=batch, steps=steps, rate=plan.rates[0],
            recipe=plan, generator=generator, validate=validate if plan.best else None, at_once=tuning.at_once,
        )  # fmt: skip
    except DivergedError as error:
        raise DataError(
            f"fine-tuning encoder '{tuning.name}' on {tuning.task.info.name}: {error}; check the images' values and the "
            "normalisation"
        ) from error
    return best.step


def _groups(model: Classifier | UNet, plan: Recipe, frozen: bool) -> list[dict[str, Any]]:
    own = [(name, p) for name, p in model.named_parameters() if not name.startswith("encoder.")]
    groups = decayed(own, plan.weight_decay)
    if frozen:
        return groups
    if plan.frozen_share:  # as published: what joins late has neither
        return groups + layer_groups(model.encoder, 1.0, 0.0)
    return groups + layer_groups(model.encoder, plan.layer_decay, plan.weight_decay)


def _to_training(model: nn.Module, frozen: bool) -> None:
    model.train()
    if frozen:
        model.get_submodule("encoder").eval()


@torch.no_grad()
def predict(tuning: Tuning, pictures: Pictures, split: str) -> tuple[Outcome, float]:
    """What the model says of images, and the mean loss over them.  Leaves the model in eval mode.

    Raises DataError naming the first image whose outputs are not finite.
    """
    task, target = tuning.task, tuning.target
    tuning.model.eval()
    found, losses = [], []
    for part, outputs, truth in _outputs(tuning, pictures, split):
        losses.append(len(part) * float(target.loss(outputs, torch.from_numpy(truth).to(outputs.device))))
        said = target.predict(outputs)
        if task.info.goal is Goal.SEGMENTATION:
            classes = len(task.info.classes)
            said = np.stack([confusion_of(t, s, classes) for t, s in zip(truth, said, strict=True)])
        found.append(said)
    loss, rows, prediction = sum(losses) / len(pictures), pictures.rows, np.concatenate(found)
    if task.info.goal is Goal.SEGMENTATION:
        return Outcome(task.info.goal, task.info.outputs, task.ids[rows], confusion=prediction), loss
    return Outcome(task.info.goal, task.info.outputs, task.ids[rows], task.labels(rows), prediction), loss


def _outputs(tuning: Tuning, pictures: Pictures, split: str) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """Places, outputs and labels of some images at a time."""
    for start in range(0, len(pictures), tuning.at_once):
        part = np.arange(start, min(start + tuning.at_once, len(pictures)))
        images, labels = pictures(part)
        outputs = tuning.outputs(images)
        wrong = ~outputs.isfinite().flatten(1).all(dim=1)
        if wrong.any():
            image = tuning.task.ids[pictures.rows[part[int(wrong.int().argmax())]]]
            raise DataError(
                f"outputs of encoder '{tuning.name}' for image '{image}' of the {split} split are not finite; check the values "
                "of the image and the normalisation"
            )
        yield part, outputs, labels
