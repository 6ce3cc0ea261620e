"""The switches to what the published code does: each is a setting of a run, and does what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from processes import train
from safetensors.torch import load_file
from tiny_earth import make_data_set
from torch import Tensor
from torch.nn import functional

from mmearth_ray.config import PUBLISHED_BATCH, learning_rate_of, load
from mmearth_ray.experiment import Experiment, build_objective, open_experiment
from mmearth_ray.keys import Config
from mmearth_ray.modalities import Kind
from mmearth_ray.model.layers import GRN, SCOPES
from mmearth_ray.objective import Objective
from mmearth_ray.settings import flatten
from mmearth_ray.stream.prepare import Batch
from mmearth_ray.train.loop import to_device

PUBLISHED = Path(__file__).parents[2] / "configs" / "published.yaml"
SWITCHES = {
    "model.grn": "batch",
    "model.missing": "mean",
    "model.init_scheme": "published",
    "optimizer.scaling": "linear",
    "train.averaging": "local",
}
GLOBAL, WORKERS, MICRO = 8, 2, 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=24, size=40)
    return folder


def test_the_published_mode_sets_these_switches_and_nothing_else() -> None:
    ours, theirs = flatten(Config()), flatten(load([str(PUBLISHED)]))
    assert {name: value for name, value in theirs.items() if value != ours[name]} == SWITCHES


def test_the_published_mode_reaches_every_part_of_a_run(shards: Path, tmp_path: Path) -> None:
    small = ["model.image_size=24", "model.decoder_width=64", f"run.directory={tmp_path}"]
    experiment = open_experiment(load([str(PUBLISHED), *small]), shards)
    objective = build_objective(experiment)
    model = objective.model
    assert experiment.spec.missing == objective.missing == "mean"
    assert {layer.over for layer in model.encoder.modules() if isinstance(layer, GRN)} == {SCOPES["batch"]}
    assert {layer.over for layer in model.decoder.modules() if isinstance(layer, GRN)} == {SCOPES["image"]}
    assert model.decoder.projection.weight.std().item() == pytest.approx(0.88, rel=0.05)
    for batch in (64, PUBLISHED_BATCH):
        config = load([str(PUBLISHED), f"train.global_batch={batch}"])
        assert learning_rate_of(config) == pytest.approx(1.5e-4 * batch / 256)


def _published_losses(objective: Objective, batch: Batch) -> Tensor:
    """Mean error of every task over the batch's own valid elements, weighted and added up; by plain means of PyTorch."""
    tensors = to_device(batch, torch.device("cpu"))
    hidden, values = tensors["hidden"].long(), objective.read(tensors)
    predictions = objective.model(values[objective.input.name].truth, tensors["visible"].long(), hidden)
    total = torch.zeros(())
    assert objective.log_variances is not None
    for m, s in zip(objective.targets, objective.log_variances, strict=True):
        truth, valid = objective._truths(tensors, hidden)[m.name]
        if not valid.any():
            continue
        if m.kind is Kind.CATEGORICAL:
            logits = predictions[m.name].flatten(0, -2)[valid.flatten()]
            loss = functional.cross_entropy(logits, truth[valid])
        else:
            loss = functional.mse_loss(predictions[m.name][valid], truth[valid])
        total = total + torch.exp(-s) * loss + s
    return total


def _first_step(experiment: Experiment, averaging: str) -> dict[str, np.ndarray]:
    """Gradients of the first step: of the mean of micro-batches' means, or of means over the whole global batch."""
    objective, size = build_objective(experiment), MICRO if averaging == "local" else GLOBAL
    for start in range(0, GLOBAL, size):
        batch = next(experiment.source.batches([(start, start + size)]))
        (_published_losses(objective, batch) * size / GLOBAL).backward()
    return {name: p.grad.numpy() for name, p in objective.named_parameters() if p.grad is not None}


def _far(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest distance of a parameter's gradients, relative to their length."""
    return max(float(np.linalg.norm(one[name] - g) / (np.linalg.norm(g) + 1e-6)) for name, g in other.items())


def test_local_averages_are_the_mean_of_the_micro_batches_means_over_workers(shards: Path, tmp_path: Path) -> None:
    layout = (f"train.global_batch={GLOBAL}", f"train.workers={WORKERS}", f"train.micro_batch={MICRO}")
    experiment = train(shards, tmp_path, *layout, "train.averaging=local", "train.steps=1", "model.image_size=24")
    moments = load_file(tmp_path / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    found = {k.removeprefix("exp_avg/"): v.numpy() / 0.1 for k, v in moments.items() if k.startswith("exp_avg/")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    local, whole = (_first_step(experiment, averaging) for averaging in ("local", "global"))
    torch.set_num_threads(threads)
    assert found.keys() == local.keys()
    assert _far(found, local) <= 1e-4
    assert _far(whole, local) > 0.05
    assert np.sqrt(sum((g**2).sum() for g in found.values())) > 1  # and nothing clips gradients
