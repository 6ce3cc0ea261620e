"""The objective: a batch of raw values in, a loss out.  Normalise, predict, compare: what a training engine wraps.

Shapes: B images, C bands, H x W pixels, V visible and N hidden patches, P pixels along the side of a patch, K classes,
T targets, G Sentinel-2 products (`modalities.PRODUCTS`).
"""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmearth_ray.losses import (
    ERROR_SUMS,
    WEIGHTINGS,
    Target,
    normalise_patches,
    patch_moments,
    patchify,
    unpatchify,
)
from mmearth_ray.modalities import Kind, Level, Missing, Modality
from mmearth_ray.model.mpmae import MPMAE

Weighting = Literal["uncertainty", "unweighted"]
Batch = Mapping[str, Tensor]
Statistics = Mapping[str, tuple[Tensor | np.ndarray, Tensor | np.ndarray]]

ENCODER, SIZES = "model.encoder.", "model.sizes."  # prefixes of parameters: the encoder's, those of further patch sizes
VISIBLE, HIDDEN, PRODUCT = "visible", "hidden", "product"  # what a batch holds beside the modalities


class Normaliser(nn.Module):
    """Raw values of one continuous modality to zero mean and unit variance, by the product of each image.

    mean, std: float32 (G, C).  A band whose mean or std is not finite has no statistics: it is missing everywhere.  A band
    that is constant (std 0) is centred only.  The buffers are no part of a checkpoint: statistics belong to the data.
    """

    mean_GC: Tensor
    std_GC: Tensor
    known_GC: Tensor

    def __init__(self, modality: Modality, mean: Tensor | np.ndarray, std: Tensor | np.ndarray) -> None:
        super().__init__()
        self.modality = modality
        mean_GC = torch.as_tensor(mean, dtype=torch.float32)
        std_GC = torch.as_tensor(std, dtype=torch.float32)
        known_GC = mean_GC.isfinite() & std_GC.isfinite()
        self.register_buffer("mean_GC", mean_GC.where(known_GC, 0), persistent=False)
        self.register_buffer("std_GC", std_GC.where(known_GC & (std_GC > 0), 1), persistent=False)
        self.register_buffer("known_GC", known_GC, persistent=False)

    def forward(self, batch: Batch, raw: Tensor, channels: int = 1) -> Target:
        """Normalised values of `raw`, native values with their channels in that dimension: 0 where missing, and where valid."""
        mean, std, known = self._per_image(batch, raw.ndim, channels)
        values = raw.to(torch.float32, copy=True)  # exact for all native types of the table
        present = batch[self.modality.present_column].view(-1, *[1] * (raw.ndim - 1))
        valid = self.modality.valid(values) & (present & known)
        if raw.is_floating_point():
            valid = valid & values.isfinite()  # whatever the table's type
        return Target(values.sub_(mean).div_(std).masked_fill_(~valid, 0), valid)

    def undo(self, batch: Batch, values: Tensor) -> Tensor:
        """Normalised values (B, C, ...) in the units of the table."""
        mean, std, _ = self._per_image(batch, values.ndim, 1)
        return values * std + mean

    def _per_image(self, batch: Batch, ndim: int, channels: int) -> tuple[Tensor, ...]:
        product_B = batch[PRODUCT].long()
        shape = [1] * ndim
        shape[0], shape[channels] = len(product_B), -1
        return tuple(rows_GC[product_B].view(shape) for rows_GC in (self.mean_GC, self.std_GC, self.known_GC))


class Labels(nn.Module):
    """Class labels as targets: int64, with one channel; negative where there is none."""

    def __init__(self, modality: Modality) -> None:
        super().__init__()
        self.modality = modality

    def forward(self, batch: Batch, raw: Tensor, channels: int = 1) -> Target:
        """Labels, native values with one channel, and where they are valid."""
        labels = raw.long()
        return Target(labels, labels >= 0)

    def undo(self, batch: Batch, logits: Tensor) -> Tensor:
        """Logits (B, K, ...) for a figure: the likeliest class of every pixel, or all probabilities of an image."""
        return logits.argmax(1) if self.modality.level is Level.PIXEL else logits.softmax(1)


READERS: dict[Kind, Callable[[Modality, Statistics], Normaliser | Labels]] = {
    Kind.CONTINUOUS: lambda m, statistics: Normaliser(m, *statistics[m.name]),
    Kind.CATEGORICAL: lambda m, statistics: Labels(m),
}


class Objective(nn.Module):
    """The training loss of MP-MAE.  `forward` is for training, `reconstruct` for figures, `valid_counts` to cross-check.

    A batch's images are of one size, one of those that the model is for.

    A batch holds, straight from the data pipeline: for each modality a tensor of its name (continuous maps (B, C, H, W) in
    native types, class maps int8 (B, H, W), vectors float32 (B, C), labels int16 (B,); -1 is no class); for continuous ones
    a bool (B,) under `present_column`; "product" int8 (B,); "visible" (B, V) and "hidden" (B, N) indices of patches.

    `statistics` gives mean and std, float32 (G, C), of every continuous modality in use.  The targets in
    `normalise_targets` (continuous maps) are normalised patch by patch as well.  With `missing` "mean" the missing pixels of
    continuous target maps are trained towards the mean of their band, as the published code does.
    """

    log_variances: nn.Parameter | None

    def __init__(
        self,
        model: MPMAE,
        *,
        input: Modality,
        targets: tuple[Modality, ...],
        statistics: Statistics,
        normalise_targets: frozenset[str] = frozenset(),
        missing: Missing = "ignored",
        weighting: Weighting = "uncertainty",
    ) -> None:
        super().__init__()
        _check(input, targets, statistics, normalise_targets, weighting)
        self.model = model
        self.input = input
        self.targets = targets
        self.normalise_targets = normalise_targets
        self.missing = missing
        self.weigh = WEIGHTINGS[weighting]
        used = {m.name: m for m in (input, *targets)}  # an input that is a target too is read once
        self.readers = nn.ModuleDict({name: READERS[m.kind](m, statistics) for name, m in used.items()})
        uncertain = weighting == "uncertainty"
        self.register_parameter("log_variances", nn.Parameter(torch.zeros(len(targets))) if uncertain else None)

    def forward(self, batch: Batch, totals_T: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The part of the global batch's loss that this micro-batch contributes, and its sums of errors (T,), detached.

        `totals_T`: what errors are divided by, the valid hidden elements per target in the whole global batch (for averages of
        its own, this micro-batch's divided by the share); `share`: 1 / (workers x accumulation).
        Losses and gradients of all micro-batches on all workers are to be added.  Parameters of other patch sizes get
        gradients of zero, for engines wait for one of every parameter: the sum of none of its elements joins the loss.
        """
        predictions, truths = self._compared(batch)
        errors_T = torch.stack([ERROR_SUMS[m.kind](predictions[m.name], truths[m.name]) for m in self.targets])
        loss = self.weigh(errors_T, totals_T, share, self.log_variances)
        for parameter in self.model.idle(self.patch_size(batch)):
            loss = loss + parameter.flatten()[:0].sum()
        return loss, errors_T.detach()

    @torch.no_grad()
    def errors_of_images(self, batch: Batch) -> Tensor:
        """The sums of errors of every image by itself: float32 (B, T); `forward` adds them up."""
        predictions, truths = self._compared(batch)
        rows_TB = [
            [ERROR_SUMS[m.kind](prediction, Target(truth, valid))
             for prediction, truth, valid in zip(*(t.split(1) for t in (predictions[m.name], *truths[m.name])), strict=True)]
            for m in self.targets
        ]  # fmt: skip
        return torch.stack([torch.stack(row_B) for row_B in rows_TB], 1)

    def patch_size(self, batch: Batch) -> int:
        """Side of the batch's patches, px: images of all sizes have as many."""
        if not self.model.sizes:
            return self.model.encoder.patch_size
        (height, width), patches = batch[self.input.name].shape[-2:], batch[VISIBLE].shape[1] + batch[HIDDEN].shape[1]
        return round((height * width / patches) ** 0.5)

    @torch.no_grad()
    def valid_counts(self, batch: Batch) -> Tensor:
        """Valid hidden elements of every image and target: int64 (B, T)."""
        truths = self._truths(batch, batch[HIDDEN].long())
        return torch.stack([truths[m.name].counts() for m in self.targets], 1)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Every target as predicted at all patches, visible ones too, beside the truth, in the units of the table.

        Per target "prediction", "truth" and "valid": maps (B, C, H, W) or labels (B, H, W), vectors (B, C), labels (B,)
        for which the prediction is probabilities (B, K).  Targets normalised by patch get back the mean and variance of
        the true patch.  Where not valid, the truth is whatever filler the data hold.
        """
        image_BCHW = self.image(batch)
        model = self.model.at(self.patch_size(batch))
        grid = model.grid(image_BCHW)
        all_BL = torch.arange(grid[0] * grid[1], device=image_BCHW.device).expand(len(image_BCHW), -1)
        predictions = model(image_BCHW, batch[VISIBLE].long(), all_BL)
        values, shown = self.read(batch), {}
        for m in self.targets:
            prediction = predictions[m.name].float()
            if m.name in self.normalise_targets:
                mean, std, _ = patch_moments(self._truth(m, batch, all_BL))
                prediction = prediction * std + mean
            if m.level is Level.PIXEL:
                prediction = unpatchify(prediction, grid)
            prediction = self.readers[m.name].undo(batch, prediction)  # type: ignore[operator]
            valid = values[m.name].valid.view_as(batch[m.name])
            shown[m.name] = {"prediction": prediction, "truth": batch[m.name], "valid": valid}
        return shown

    def read(self, batch: Batch) -> dict[str, Target]:
        """Normalised values and labels of whole images, (B, C, ...), by modality."""
        modalities = {m.name: m for m in (self.input, *self.targets)}
        return {name: self.readers[name](batch, with_channels(m, batch)) for name, m in modalities.items()}

    def image(self, batch: Batch) -> Tensor:
        """The normalised input: (B, C, H, W)."""
        return self.readers[self.input.name](batch, batch[self.input.name]).truth

    def _compared(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Target]]:
        """What the heads say of the hidden patches, and what they should have said."""
        hidden_BN = batch[HIDDEN].long()
        predictions = self.model.at(self.patch_size(batch))(self.image(batch), batch[VISIBLE].long(), hidden_BN)
        return predictions, self._truths(batch, hidden_BN)

    def _truths(self, batch: Batch, asked_BN: Tensor) -> dict[str, Target]:
        """What the heads are compared with, in the layout of their predictions."""
        truths = {m.name: self._truth(m, batch, asked_BN) for m in self.targets}
        return truths | {name: normalise_patches(truths[name]) for name in self.normalise_targets}

    def _truth(self, m: Modality, batch: Batch, asked_BN: Tensor) -> Target:
        """A target at the patches asked for, which are picked in their native type; at image level as a whole."""
        raw = with_channels(m, batch)
        if m.level is Level.PIXEL:
            raw = patchify(raw, self.patch_size(batch), asked_BN)
        target: Target = self.readers[m.name](batch, raw, channels=-1)
        if self.missing == "mean" and m.level is Level.PIXEL and m.kind is Kind.CONTINUOUS:
            return target._replace(valid=torch.ones_like(target.valid))  # missing values are 0, the mean, once normalised
        return target


def with_channels(m: Modality, batch: Batch) -> Tensor:
    """Native values as (B, C, ...); labels have one channel."""
    return batch[m.name].unsqueeze(1) if m.kind is Kind.CATEGORICAL else batch[m.name]


def _check(
    input: Modality,
    targets: tuple[Modality, ...],
    statistics: Statistics,
    normalise_targets: frozenset[str],
    weighting: str,
) -> None:
    """Raise ValueError, saying what to do, for an objective that cannot be built."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"there is no weighting '{weighting}'; use one of {', '.join(WEIGHTINGS)}")
    if not targets or len({m.name for m in targets}) < len(targets):
        raise ValueError(f"targets must be distinct and at least one; got {[m.name for m in targets]}")
    for m in (input, *targets):
        if m.kind not in READERS:
            raise ValueError(f"{m.name} holds {m.kind}, which cannot be trained on; leave it out")
        if m.kind is Kind.CONTINUOUS and m.name not in statistics:
            raise ValueError(f"{m.name} has no statistics; there are some for {', '.join(statistics) or 'nothing'}")
        if m.name == input.name and m.bands != input.bands:
            raise ValueError(f"as input and as target {m.name} must have the same bands; got {input.bands}, {m.bands}")
    maps = {m.name for m in targets if m.level is Level.PIXEL and m.kind is Kind.CONTINUOUS}
    if (input.level, input.kind) != (Level.PIXEL, Kind.CONTINUOUS):
        raise ValueError(f"the input must be a continuous map; {input.name} is not")
    if not normalise_targets <= maps:
        odd = ", ".join(sorted(normalise_targets - maps))
        raise ValueError(f"only targets that are continuous maps ({', '.join(sorted(maps))}) can be normalised; got {odd}")
