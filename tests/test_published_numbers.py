"""The published code's numbers: features, predictions, losses and gradients of one image, where its outputs are at hand."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmearth_ray.modalities import Kind, Level, tasks
from mmearth_ray.model.decoder import Decoder
from mmearth_ray.model.encoder import Encoder
from mmearth_ray.model.mpmae import MPMAE
from mmearth_ray.objective import Objective

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
TARGETS = tasks()
INPUT = TARGETS[0]
BLOCK = "decoder_dict.sentinel2.0."  # one block under every modality's name; its gradient is listed under the first
PUBLISHED_NAMES = {
    "encoder.": "model.encoder.",
    "proj.": "model.decoder.projection.",
    "mask_token": "model.decoder.mask_token",
    BLOCK: "model.decoder.blocks.0.",
    "layer_norm_tmp.": "model.decoder.image_norm.",
    "loss_fn.log_vars": "log_variances",
} | {f"pred_dict.{m.name}.": f"model.decoder.{m.level}_heads.{m.name}." for m in TARGETS}


def _golden_case(name: str) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Meta data, state, inputs and expected outputs of a case that the published code computed."""
    if not GOLDEN.is_dir():
        pytest.skip(f"outputs of the published code are not at {GOLDEN}")
    spec = importlib.util.spec_from_file_location("golden_rebuild", GOLDEN / "rebuild.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name)


def _our_name(published: str) -> str | None:
    for prefix, ours in PUBLISHED_NAMES.items():
        if published.startswith(prefix):
            name = ours + published.removeprefix(prefix)
            return name.replace(".ln.", ".").replace(".linear.", ".").replace(".kernel", ".weight")
    return None  # the shared block under another modality's name


def _our_layout(value: np.ndarray, published: str) -> Tensor:
    """Sparse kernels (k k, D, O) or (k k, D) have index row + k * column, without flip; 1x1 convolutions become matrices."""
    tensor = torch.from_numpy(value)
    if published.endswith(".kernel"):
        tensor = tensor[:, None] if tensor.ndim == 2 else tensor
        side = round(len(tensor) ** 0.5)
        return tensor.permute(2, 1, 0).unflatten(2, (side, side)).transpose(2, 3).contiguous()
    if tensor.shape[-2:] == (1, 1):
        tensor = tensor[..., 0, 0]
    return tensor if published.endswith("weight") else tensor.flatten()


def _published_objective(meta: dict, state: dict[str, np.ndarray]) -> Objective:
    dims, patch, width = tuple(meta["dims"]), meta["patch_size"], meta["decoder_dim"]
    encoder = Encoder(len(INPUT.bands), tuple(meta["depths"]), dims, patch)
    decoder = Decoder(dims[-1], patch, TARGETS, width, meta["decoder_depth"], grn_eps=1e-4)  # its dense GRN has this eps
    unit = {m.name: (torch.zeros(2, len(m.bands)), torch.ones(2, len(m.bands))) for m in TARGETS}
    patches = frozenset({INPUT.name})
    model = MPMAE(encoder, decoder)
    objective = Objective(model, input=INPUT, targets=TARGETS, statistics=unit, normalise_targets=patches)
    named = {_our_name(key): _our_layout(value, key) for key, value in state.items()}
    objective.load_state_dict({name: tensor for name, tensor in named.items() if name is not None})
    return objective


def _published_batch(inputs: dict[str, np.ndarray], mask_BL: np.ndarray) -> dict[str, Tensor]:
    batch = {"product": torch.zeros(len(mask_BL), dtype=torch.int8)}
    for m in TARGETS:
        value = torch.from_numpy(inputs[m.name])
        if m.kind is Kind.CATEGORICAL:
            batch[m.name] = value[:, 0] if m.level is Level.PIXEL else value.argmax(1)
        else:
            batch[m.name] = value
            batch[m.present_column] = torch.ones(len(value), dtype=torch.bool)
    for name, chosen in (("visible", 0), ("hidden", 1)):
        batch[name] = torch.from_numpy(np.stack([np.flatnonzero(row == chosen) for row in mask_BL]))
    return batch


def test_published_numbers() -> None:
    """With one image the published, batch-wide GRN is the same as ours: features, predictions, losses, gradients agree."""
    meta, state, inputs, expected = _golden_case("small_p8_single")
    objective, batch = _published_objective(meta, state), _published_batch(inputs, expected["mask"])
    visible = batch["visible"][0]

    features_VD = objective.model.encoder(batch[INPUT.name], batch["visible"])[0, :, 0, 0]
    truth_VD = torch.from_numpy(expected["encoder"])[0].flatten(1).T[visible]
    assert (features_VD - truth_VD).abs().max() <= 4e-6 * truth_VD.abs().max()

    predictions = objective.model(batch[INPUT.name], batch["visible"], torch.arange(49)[None])
    for m in TARGETS:
        truth = torch.from_numpy(expected[f"pred/{m.name}"])[0]
        if m.level is Level.PIXEL:
            truth = truth.flatten(1).T
        assert (predictions[m.name][0].view_as(truth) - truth).abs().max() <= 4e-6 * truth.abs().max(), m.name

    totals = objective.valid_counts(batch).sum(0)
    loss, sums = objective(batch, totals, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(meta["loss"], rel=1e-5)
    for m, value in zip(TARGETS, (sums / totals).tolist(), strict=True):
        assert value == pytest.approx(meta["losses"][m.name], rel=1e-5), m.name
    parameters = dict(objective.named_parameters())
    for key, norm in meta["grad_norm"].items():
        gradient = parameters[_our_name(key) or key].grad
        assert gradient is not None
        assert gradient.double().norm().item() == pytest.approx(norm, rel=3e-4), key
