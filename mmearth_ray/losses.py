"""Errors of predictions, by kind, as sums over valid elements, and how tasks are weighted.

Sums, not means: the number of valid hidden elements of the whole global batch divides them later, so that a batch may be
split over workers and micro-batches at will.  What is missing contributes exactly nothing, to the sum and to gradients.

Shapes: B images, C bands or classes, H x W pixels, L patches in the grid, N of them asked for, P pixels along the side of
a patch, K classes, T targets; ... stands for (B, N, PP) in maps and (B,) at image level.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmearth_ray.modalities import Kind

MISSING = -1  # label of a pixel or image without a class
PATCH_EPS = 1e-6  # added to the variance of a patch: published target normalisation


class Target(NamedTuple):
    """What a head should have said, in the prediction's layout, and where that is known.

    truth: a quantity (..., C), float32, or labels (...), int64.  valid: bool of the same shape.
    """

    truth: Tensor
    valid: Tensor

    def counts(self) -> Tensor:
        """Valid elements of each image: int64 (B,)."""
        return self.valid.flatten(1).sum(1)


class _SquaredErrors(torch.autograd.Function):
    """Sum of squares with one pass for the gradient, for which nothing but the errors is kept."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, truth: Tensor, invalid: Tensor) -> Tensor:
        error = (prediction.float() - truth).masked_fill_(invalid, 0)
        ctx.save_for_backward(error)
        ctx.dtype = prediction.dtype
        return error.square().sum()  # pairwise; a dot product of so many terms is off by 1e-4

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (error,) = ctx.saved_tensors
        return (error * (2 * grads[0])).to(ctx.dtype), None, None


def squared_errors(prediction: Tensor, target: Target) -> Tensor:
    """Sum of squared errors over valid elements: (..., C) -> ().  Zero gradient where nothing is valid."""
    return _SquaredErrors.apply(prediction, target.truth, ~target.valid)  # type: ignore[return-value]


def cross_entropies(prediction: Tensor, target: Target) -> Tensor:
    """Sum of cross-entropies over labelled elements: logits (..., K) -> ().  Zero gradient where there is no label."""
    logits = prediction.float().flatten(0, -2)
    return functional.cross_entropy(logits, target.truth.flatten(), ignore_index=MISSING, reduction="sum")


ERROR_SUMS: dict[Kind, Callable[[Tensor, Target], Tensor]] = {
    Kind.CONTINUOUS: squared_errors,
    Kind.CATEGORICAL: cross_entropies,
}


def patchify(map_BCHW: Tensor, patch_size: int, asked_BN: Tensor | None = None) -> Tensor:
    """Patches of a map in the layout of the heads: (B, L, P P, C), or (B, N, P P, C) for the patches `asked_BN`."""
    batch, channels, height, width = map_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    tiles_BCRPSP = map_BCHW.reshape(batch, channels, rows, patch_size, columns, patch_size)
    tiles_BRSPPC = tiles_BCRPSP.permute(0, 2, 4, 3, 5, 1)
    if asked_BN is None:
        return tiles_BRSPPC.reshape(batch, rows * columns, patch_size**2, channels)
    image_B1 = torch.arange(batch, device=map_BCHW.device)[:, None]
    return tiles_BRSPPC[image_B1, asked_BN // columns, asked_BN % columns].flatten(2, 3)


def unpatchify(patches_BLPC: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` on all patches of a grid: (B, L, P P, C) -> (B, C, H, W)."""
    side = round(patches_BLPC.shape[2] ** 0.5)
    tiles_BRSPPC = patches_BLPC.unflatten(2, (side, side)).unflatten(1, grid)
    return tiles_BRSPPC.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_moments(target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and number of the valid values of each patch, over its pixels and bands: (B, N, 1, 1).

    The variance is the unbiased one plus 1e-6, as published.  With fewer than two values it means nothing but is finite.
    """
    _, mean, std, count = _centred(target)
    return mean, std, count


def normalise_patches(target: Target) -> Target:
    """Patches (B, N, P P, C) with mean 0 and variance 1 over their valid values; fewer than two make a patch invalid."""
    centred, _, std, count = _centred(target)
    return Target(centred.div_(std), target.valid & (count >= 2))


def _centred(target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values less their patch's mean, 0 where invalid, and the patch's mean, standard deviation and number of values."""
    invalid, count = ~target.valid, target.valid.sum((2, 3), keepdim=True)
    mean = target.truth.masked_fill(invalid, 0).sum((2, 3), keepdim=True) / count.clamp(min=1)
    centred = (target.truth - mean).masked_fill_(invalid, 0)
    squares = centred.square().sum((2, 3), keepdim=True)
    return centred, mean, (squares / (count - 1).clamp(min=1) + PATCH_EPS).sqrt(), count


def unweighted(errors_T: Tensor, totals_T: Tensor, share: float, log_variances_T: Tensor | None) -> Tensor:
    """Sum over targets of S / N, where S is the sum of errors here and N the valid elements of the global batch."""
    return _where_any(totals_T, _means(errors_T, totals_T)).sum()


def uncertainty_weighted(errors_T: Tensor, totals_T: Tensor, share: float, log_variances_T: Tensor | None) -> Tensor:
    """Sum over targets with N > 0 of exp(-s) S / N + s share: task uncertainty (arXiv:1705.07115) as MP-MAE uses it.

    Neither factor 1/2 nor a distinction between regression and classification.  The `share` of this part of the global
    batch, 1 / (workers x accumulation), makes all parts together count s once.
    """
    assert log_variances_T is not None, "uncertainty weighting needs log-variances"
    terms_T = torch.exp(-log_variances_T) * _means(errors_T, totals_T) + log_variances_T * share
    return _where_any(totals_T, terms_T).sum()


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, float, Tensor | None], Tensor]] = {
    "uncertainty": uncertainty_weighted,
    "unweighted": unweighted,
}


def _means(errors_T: Tensor, totals_T: Tensor) -> Tensor:
    return errors_T / totals_T.clamp(min=1)


def _where_any(totals_T: Tensor, terms_T: Tensor) -> Tensor:
    """Terms of targets with valid elements somewhere; the others keep their place in the graph, with zero gradient."""
    return torch.where(totals_T > 0, terms_T, 0)
