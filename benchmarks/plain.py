"""The published training computation in plain torch: the whole map everywhere, every task's decoder on its own.

What the published code (github.com/vishalned/MMEarth-train, models/fcmae.py and custom_loss.py) computes in a step, written in
ordinary torch with the parameters of an `Objective`.  The baseline of every ratio of speeds, so nothing in it is slow on
purpose: one memory format, no copies that are not needed, nothing that waits for the device.  What it does differently from
the objective is what the published code does: dense convolutions in the encoder, the shared decoder block run again for
every task, heads and losses at all patches, of which the mask then keeps the hidden ones.

Shapes: B images, C bands, H x W pixels, L = R S patches, P pixels along the side of a patch, K classes, D channels of the
encoder, E of the decoder, O outputs of a head, T targets.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.masked_dense import block, encode, norm
from mmearth_ray.losses import MISSING, PATCH_EPS
from mmearth_ray.modalities import Kind, Level, Modality
from mmearth_ray.model.mpmae import DECODER_GRN_EPS
from mmearth_ray.objective import ENCODER, HIDDEN, Batch, Objective, with_channels

MASK = "mask"  # beside the modalities in the inputs: (B, L), 1 where hidden
DECODER = "model.decoder."


class Plain(nn.Module):
    """The published computation with the parameters of an Objective (own copies, under the same names).

    `batch_wide`: the encoder's GRN takes its norm over the whole batch, as published, instead of over each image.
    """

    log_variances: nn.Parameter | None

    def __init__(self, objective: Objective, batch_wide: bool = True) -> None:
        super().__init__()
        self.model = copy.deepcopy(objective.model)  # for its parameters only; its modules never run
        self.readers = copy.deepcopy(objective.readers)
        self.register_parameter("log_variances", copy.deepcopy(objective.log_variances))
        self.input = objective.input
        self.targets = objective.targets
        self.modalities = {m.name: m for m in (self.input, *self.targets)}
        self.normalise_targets = objective.normalise_targets
        self.patch_size = objective.model.encoder.patch_size
        self.depths = tuple(len(stage) for stage in objective.model.encoder.stages)  # type: ignore[arg-type]
        self.decoder_depth = len(objective.model.decoder.blocks)
        self.batch_wide = batch_wide

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """What the published loader hands over, so no part of a step: normalised values, labels and the mask.

        float32 maps (B, C, H, W), 0 where missing, and vectors (B, C), NaN where missing; int64 class maps (B, 1, H, W) and
        labels (B,), -1 where missing; "mask" float32 (B, L).
        """
        inputs = {name: self._values(batch, name) for name in self.readers}
        height, width = inputs[self.input.name].shape[2:]
        patches = (height // self.patch_size) * (width // self.patch_size)
        hidden_BN = batch[HIDDEN].long()
        empty_BL = torch.zeros(len(hidden_BN), patches, device=hidden_BN.device)
        return inputs | {MASK: empty_BL.scatter(1, hidden_BN, 1.0)}

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and the losses of the targets (T,), detached."""
        predictions = self.predict(inputs)
        losses_T = torch.stack([self._loss(m, predictions[m.name], inputs[m.name], inputs[MASK]) for m in self.targets])
        if self.log_variances is None:
            return losses_T.sum(), losses_T.detach()
        terms_T = torch.exp(-self.log_variances) * losses_T + self.log_variances
        return (terms_T * (losses_T != 0)).sum(), losses_T.detach()

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """The encoder's output, zero where hidden: (B, D, R, S)."""
        parameters = _under(ENCODER, self)
        image_BCHW, seen_BL = inputs[self.input.name], 1 - inputs[MASK]
        return encode(parameters, image_BCHW, seen_BL, self.patch_size, self.depths, self.batch_wide)

    def predict(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predictions by target: maps (B, P P O, R, S) at all patches, image-level values (B, O)."""
        parameters = _under(DECODER, self)
        x_BERS = _pointwise(parameters, "projection", self.features(inputs))
        hidden_B1RS = inputs[MASK].view(len(x_BERS), 1, *x_BERS.shape[2:])
        x_BERS = x_BERS * (1 - hidden_B1RS) + parameters["mask_token"][:, None, None] * hidden_B1RS
        return {m.name: self._decode(parameters, m, x_BERS) for m in self.targets}

    def _decode(self, parameters: dict[str, Tensor], m: Modality, x_BERS: Tensor) -> Tensor:
        for number in range(self.decoder_depth):
            x_BERS = block(parameters, f"blocks.{number}", x_BERS, grn_eps=DECODER_GRN_EPS)
        if m.level is Level.PIXEL:
            return _pointwise(parameters, f"pixel_heads.{m.name}", x_BERS)
        pooled_BE = norm(parameters, "image_norm", x_BERS).mean((2, 3))
        head = f"image_heads.{m.name}"
        return functional.linear(pooled_BE, parameters[f"{head}.weight"], parameters[f"{head}.bias"])

    def _loss(self, m: Modality, prediction: Tensor, truth: Tensor, mask_BL: Tensor) -> Tensor:
        if m.level is Level.IMAGE and m.kind is Kind.CONTINUOUS:
            return _vector_loss(prediction, truth)
        if m.level is Level.IMAGE:
            return functional.cross_entropy(prediction, truth, ignore_index=MISSING)
        prediction_BLO = prediction.flatten(2).transpose(1, 2)
        truth_BLO = patchify(truth, self.patch_size)
        if m.kind is Kind.CATEGORICAL:
            return _class_map_loss(prediction_BLO, truth_BLO, mask_BL)
        if m.name in self.normalise_targets:
            mean, variance = truth_BLO.mean(-1, keepdim=True), truth_BLO.var(-1, keepdim=True)
            truth_BLO = (truth_BLO - mean) / (variance + PATCH_EPS).sqrt()
        errors_BL = (prediction_BLO - truth_BLO).square().mean(-1)
        return (errors_BL * mask_BL).sum() / mask_BL.sum()

    def _values(self, batch: Batch, name: str) -> Tensor:
        truth, valid = self.readers[name](batch, with_channels(self.modalities[name], batch))
        if truth.ndim == 4:
            return truth
        return truth.where(valid, torch.nan) if truth.is_floating_point() else truth[:, 0]


def patchify(map_BCHW: Tensor, patch_size: int) -> Tensor:
    """All patches of a map, values in the order of a head's outputs: (B, L, P P C)."""
    batch, channels, height, width = map_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    tiles_BCRPSP = map_BCHW.view(batch, channels, rows, patch_size, columns, patch_size)
    return tiles_BCRPSP.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def _under(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Parameters whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in module.named_parameters() if name.startswith(prefix)}


def _pointwise(parameters: dict[str, Tensor], name: str, x_BERS: Tensor) -> Tensor:
    """A convolution of one cell."""
    return functional.conv2d(x_BERS, parameters[f"{name}.weight"][:, :, None, None], parameters[f"{name}.bias"])


def _vector_loss(prediction_BC: Tensor, truth_BC: Tensor) -> Tensor:
    """The mean squared error over what is known in the batch."""
    known_BC = ~truth_BC.isnan()
    return torch.where(known_BC, prediction_BC - truth_BC, 0).square().sum() / known_BC.sum()


def _class_map_loss(logits_BLO: Tensor, labels_BLO: Tensor, mask_BL: Tensor) -> Tensor:
    """One mean over all labelled pixels of hidden patches; O holds the K logits of a pixel next to each other."""
    labels_BLO = labels_BLO.masked_fill(mask_BL[..., None] == 0, MISSING)
    classes = logits_BLO.shape[2] // labels_BLO.shape[2]
    return functional.cross_entropy(logits_BLO.reshape(-1, classes), labels_BLO.flatten(), ignore_index=MISSING)
