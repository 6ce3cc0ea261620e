"""The loss against plain formulas: what is counted, what divides, what weighs, and what a switch to published restores."""

import math

import numpy as np
import pytest
import torch
from tensors import assert_near
from tiny_release import at_hidden, convert_release, gradient_of, open_tiny, row_group, samples, step
from torch import Tensor

from mmearth_ray.losses import Target, squared_errors, uncertainty_weighted, unweighted
from mmearth_ray.modalities import Kind, Level, Modality
from mmearth_ray.objective import Objective
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.stream.prepare import Batch

TILES = [2, 3, 6, 7]
MISSING: dict[str, tuple[int, ...]] = {"sentinel2": (0,), "sentinel1": (), "aster": (-32768,), "canopy_height_eth": (127, -128)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return convert_release(tmp_path_factory.mktemp("fidelity"))


def plain(manifest: Manifest, m: Modality, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Normalised values of a map, 0 where missing, and where there are data: (B, C, H, W) each, one band at a time."""
    truth, valid = np.zeros(batch[m.name].shape), np.zeros(batch[m.name].shape, bool)
    for b, product in enumerate(batch["product"].tolist()):
        statistics = manifest.statistics[m.name][("l1c", "l2a")[product] if m.by_product else "all"]
        for c, band in enumerate(m.bands):
            raw = batch[m.name][b, c].astype(np.float64)
            mean, std = statistics[band]["mean"], statistics[band]["std"]
            if mean is not None and batch[m.present_column][b]:
                valid[b, c] = np.isfinite(raw) & ~np.isin(raw, MISSING[m.name])
                truth[b, c][valid[b, c]] = (raw[valid[b, c]] - mean) / std
    return truth, valid


def by_patch(truth_BNPC: Tensor, counted_BNPC: Tensor) -> Tensor:
    """Relative to the mean and deviation of what is counted in each patch, over all its pixels and bands together."""
    out = truth_BNPC.clone()
    for b, n in np.ndindex(*truth_BNPC.shape[:2]):
        values = truth_BNPC[b, n][counted_BNPC[b, n]]
        if len(values) > 1:
            out[b, n] = (truth_BNPC[b, n] - values.mean()) / (values.var(unbiased=True) + 1e-6).sqrt()
    return out


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("missing", ["ignored", "mean"])
def test_a_maps_loss_is_the_mean_over_what_counts(missing: str, name: str, manifest: Manifest) -> None:
    """With `mean` everything hidden counts, and what is missing is trained towards 0: the mean of its band."""
    experiment, objective = open_tiny(manifest, f"model.missing={missing}", "model.weighting=unweighted")
    (m,) = (m for m in experiment.spec.targets if m.name == name)
    batch = samples(experiment, TILES)
    truth, valid = plain(manifest, m, batch)
    truth_BNPC, valid_BNPC = at_hidden(truth, batch["hidden"]), at_hidden(valid, batch["hidden"])
    counted = valid_BNPC if missing == "ignored" else torch.ones_like(valid_BNPC)
    assert not valid_BNPC.all()
    if name in experiment.spec.normalise_targets:
        truth_BNPC = by_patch(truth_BNPC, counted)
    elif missing == "mean":
        assert (truth_BNPC[~valid_BNPC] == 0).all()

    found = step(objective, batch)
    prediction = found.predictions[name].detach().double()
    squares = (prediction - truth_BNPC).square()[counted]
    assert found.counts[name] == len(squares)
    assert found.errors[name] / found.counts[name] == pytest.approx(squares.mean().item(), rel=1e-5)
    expected = torch.where(counted, 2 * (prediction - truth_BNPC) / len(squares), 0).float()
    assert_near(gradient_of(found.predictions[name]) * len(squares), expected * len(squares), 1e-4)


def test_a_pixel_without_data_is_filled_before_the_encoder(manifest: Manifest) -> None:
    """One pixel is lost in a visible and one in a hidden patch: features, loss and gradients stay numbers."""
    experiment, objective = open_tiny(manifest)
    group = row_group(experiment)
    batch = samples(experiment, [4, 5], group)
    full = batch["count"][:, 0]
    pixels = [(int(p) // 3 * 8 + 5, int(p) % 3 * 8 + 5) for p in (batch["visible"][0, 0], batch["hidden"][0, 1])]
    for row, column in pixels:
        assert (batch["sentinel2"][0, :, row, column] != 0).all()
        for band in experiment.spec.input.columns:
            group.columns[band][group.id.index("4"), row, column] = 0
    seen: list[Tensor] = []
    objective.model.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    batch = samples(experiment, [4, 5], group)
    found = step(objective, batch)
    assert (full - batch["count"][:, 0]).tolist() == [12, 0]
    assert seen[0].isfinite().all()
    assert all((seen[0][0, :, row, column] == 0).all() for row, column in pixels)
    assert found.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())


def test_masking_the_input_leaves_the_target_alone(manifest: Manifest) -> None:
    """The encoder is given the whole image and leaves it as it was, and the target is what the raw values say."""
    experiment, objective = open_tiny(manifest)
    batch = samples(experiment, TILES)
    seen: list[Tensor] = []
    objective.model.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    step(objective, batch)
    truth, _ = plain(manifest, experiment.spec.input, batch)
    assert_near(seen[0], torch.from_numpy(truth).float(), 1e-4)
    hidden = torch.from_numpy(batch["hidden"]).long()
    objective.normalise_targets = frozenset()
    target = objective._truths(_tensors(batch), hidden)["sentinel2"]
    assert_near(target.truth, at_hidden(truth, batch["hidden"]).float(), 1e-4)


def _with_predictions(objective: Objective, predictions: dict[str, Tensor]) -> None:
    objective.model.forward = lambda *arguments: predictions  # type: ignore[method-assign]


def test_a_patch_that_is_predicted_exactly_still_counts(manifest: Manifest) -> None:
    experiment, objective = open_tiny(manifest, "model.weighting=unweighted", "model.targets=[aster]")
    batch = samples(experiment, [4, 5])
    (m,) = experiment.spec.targets
    truth, valid = (at_hidden(maps, batch["hidden"]) for maps in plain(manifest, m, batch))
    assert valid.all()
    wrong = (truth + 2).float()
    wrong[0, 0] = at_hidden(objective.read(_tensors(batch))["aster"].truth.numpy(), batch["hidden"])[0, 0]
    _with_predictions(objective, {"aster": wrong.requires_grad_()})
    patches = truth.shape[0] * truth.shape[1]
    assert step(objective, batch).loss.item() == pytest.approx(4 * (patches - 1) / patches, rel=1e-5)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items() if array.dtype.kind in "buif"}


def test_a_task_counts_by_its_data_not_by_its_loss() -> None:
    """A loss of exactly 0 with data keeps its log-variance in the sum; a loss without data loses it."""
    prediction = torch.zeros(2, 3, requires_grad=True)
    errors = squared_errors(prediction, Target(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)))
    assert errors == 0
    log_variances = torch.tensor([0.7, 0.7], requires_grad=True)
    errors_T, totals_T = torch.stack([errors, errors]), torch.tensor([6, 0])
    loss = uncertainty_weighted(errors_T, totals_T, 0.5, log_variances)
    loss.backward()
    assert loss.item() == pytest.approx(0.35)
    assert log_variances.grad is not None
    assert log_variances.grad.tolist() == [0.5, 0]
    assert unweighted(errors_T + 3, totals_T, 0.5, None).item() == pytest.approx(0.5)


@pytest.mark.parametrize("weighting", ["uncertainty", "unweighted"])
def test_tasks_add_up_as_published(weighting: str, manifest: Manifest) -> None:
    """Sum of exp(-s) L + s, or of L, over tasks with data: no factor 1/2, no other rule for classes."""
    experiment, objective = open_tiny(manifest, f"model.weighting={weighting}")
    batch = samples(experiment, [1])  # without any label of WorldCover
    found, expected = step(objective, batch), 0.0
    log_variances = objective.log_variances.tolist() if objective.log_variances is not None else [0.0] * 12
    for m, s in zip(experiment.spec.targets, log_variances, strict=True):
        if found.counts[m.name]:
            expected += math.exp(-s) * found.errors[m.name] / found.counts[m.name] + s
    assert found.counts["esa_worldcover"] == 0 < found.counts["dynamic_world"]
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_class_maps_loss_is_one_mean_over_all_labelled_pixels(manifest: Manifest) -> None:
    """Of the batch, not the mean of each image's mean: images with few labels weigh less, as published."""
    experiment, objective = open_tiny(manifest)
    batch = samples(experiment, [0, 1, 2])  # all pixels labelled, none, some
    found = step(objective, batch)
    (m,) = (m for m in experiment.spec.targets if m.name == "esa_worldcover")
    assert (m.level, m.kind) == (Level.PIXEL, Kind.CATEGORICAL)
    labels = at_hidden(batch[m.name][:, None].astype(np.int64), batch["hidden"])[..., 0]
    chances = found.predictions[m.name].detach().double().log_softmax(-1)
    picked = chances.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert found.errors[m.name] / found.counts[m.name] == pytest.approx(-picked[labels >= 0].mean().item(), rel=1e-5)
