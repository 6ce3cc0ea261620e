"""Losses: values by hand, nothing from what is missing, patch layouts, weighting."""

import math

import pytest
import torch
from torch import Tensor

from mmearth_ray.losses import (
    Target,
    cross_entropies,
    normalise_patches,
    patch_moments,
    patchify,
    squared_errors,
    uncertainty_weighted,
    unpatchify,
    unweighted,
)


def test_squared_errors_by_hand() -> None:
    prediction = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    target = Target(torch.tensor([[0.0, 5.0], [1.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    loss = squared_errors(prediction, target)
    loss.backward()
    assert loss.item() == 1 + 9 + 4
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [[2, -6], [4, 0]]
    assert target.counts().tolist() == [2, 1]


def test_cross_entropies_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [9.0, 9.0]]], requires_grad=True)
    labels = torch.tensor([[0, 0, -1]])
    loss = cross_entropies(logits, Target(labels, labels >= 0))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) + math.log(4 / 3))
    assert logits.grad is not None
    assert torch.allclose(logits.grad, torch.tensor([[[-0.5, 0.5], [-0.25, 0.25], [0.0, 0.0]]]))


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e30])
def test_filler_never_reaches_a_gradient(filler: float) -> None:
    prediction = torch.ones(2, 3, requires_grad=True)
    truth = torch.tensor([[filler, 0.0, 0.0], [filler] * 3])
    loss = squared_errors(prediction, Target(truth, truth == 0))
    loss.backward()
    assert loss.item() == 2
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [[0, 2, 2], [0, 0, 0]]


def test_without_any_label_the_loss_and_its_gradient_are_zero() -> None:
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.full((2, 3, 4), -1)
    loss = cross_entropies(logits, Target(labels, labels >= 0))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_patchify_has_the_layout_of_the_heads() -> None:
    maps = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(maps, 2)
    assert patches.shape == (2, 6, 4, 3)
    for place in range(6):
        for row in range(2):
            for column in range(2):
                pixel = maps[1, :, place // 3 * 2 + row, place % 3 * 2 + column]
                assert torch.equal(patches[1, place, row * 2 + column], pixel)
    assert torch.equal(unpatchify(patches, (2, 3)), maps)
    asked = torch.tensor([[0, 4, 5], [1, 2, 3]])
    for image in range(2):
        assert torch.equal(patchify(maps, 2, asked)[image], patches[image, asked[image]])


def test_target_normalisation_counts_valid_values_only() -> None:
    truth = torch.full((1, 4, 2, 2), float("nan"))
    truth[0, 1, 0, 0] = 7.0
    truth[0, 2, 0] = torch.tensor([1.0, 3.0])
    truth[0, 3] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    valid = truth == truth
    normalised = normalise_patches(Target(truth, valid))
    assert normalised.counts().tolist() == [6]
    assert [int(n) for n in normalised.valid.sum((2, 3))[0]] == [0, 0, 2, 4]  # 0, 1, 2 and 4 valid values
    two = torch.tensor([-1.0, 1.0]) / math.sqrt(2 + 1e-6)
    four = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(14 / 3 + 1e-6)
    assert torch.allclose(normalised.truth[0, 2, 0], two)
    assert torch.allclose(normalised.truth[0, 3].flatten(), four)
    assert all(moment.isfinite().all() for moment in patch_moments(Target(truth, valid)))

    prediction = torch.zeros(1, 4, 2, 2, requires_grad=True)
    loss = squared_errors(prediction, normalised)
    loss.backward()
    assert loss.item() == pytest.approx(two.square().sum().item() + four.square().sum().item())
    assert prediction.grad is not None
    assert (prediction.grad[0, :2] == 0).all()
    assert prediction.grad.isfinite().all()


def test_a_constant_patch_normalises_to_zero() -> None:
    truth = torch.full((1, 1, 4, 2), 5.0)
    normalised = normalise_patches(Target(truth, truth > 0))
    assert (normalised.truth == 0).all()
    assert normalised.valid.all()


def _weighted(totals: list[float], share: float, uncertain: bool) -> tuple[float, Tensor, Tensor | None]:
    errors = torch.tensor([6.0, 0.0, 8.0], requires_grad=True)
    log_variances = torch.tensor([0.5, 1.0, -1.0], requires_grad=True)
    weigh = uncertainty_weighted if uncertain else unweighted
    loss = weigh(errors, torch.tensor(totals), share, log_variances)
    loss.backward()
    assert errors.grad is not None
    return loss.item(), errors.grad, log_variances.grad


def test_uncertainty_weighting_by_hand() -> None:
    loss, d_errors, d_log_variances = _weighted([3, 0, 4], 0.25, uncertain=True)
    assert loss == pytest.approx(math.exp(-0.5) * 2 + 0.125 + math.e * 2 - 0.25)
    assert d_errors.tolist() == pytest.approx([math.exp(-0.5) / 3, 0, math.e / 4])
    assert d_log_variances is not None
    assert d_log_variances.tolist() == pytest.approx([-2 * math.exp(-0.5) + 0.25, 0, -2 * math.e + 0.25])
    assert d_errors[1] == 0
    assert d_log_variances[1] == 0


def test_unweighted_is_the_sum_of_means() -> None:
    loss, d_errors, d_log_variances = _weighted([3, 0, 4], 0.25, uncertain=False)
    assert loss == pytest.approx(4)
    assert d_errors.tolist() == pytest.approx([1 / 3, 0, 1 / 4])
    assert d_log_variances is None
