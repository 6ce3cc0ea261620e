"""Parity with the published code on golden cases: encoder, predictions, losses, gradients.

    python -m benchmarks.bench_parity --case FOLDER/NAME [--case ...] [--backend packed | minkowski]

Prints one line of JSON per case with the worst difference of each quantity; exit code 1 if one is past its tolerance.
The model is imported as a published checkpoint is, and runs in published mode: GRN over the whole batch.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_case import GoldenCase, load_case
from mmearth_ray.checkpoints.assemble import build_model, input_of, targets_of
from mmearth_ray.checkpoints.folder import Description
from mmearth_ray.checkpoints.pth import Published
from mmearth_ray.checkpoints.recognise import import_published
from mmearth_ray.errors import DataError, run_command
from mmearth_ray.modalities import PRODUCTS, Kind, Level, Modality
from mmearth_ray.model.encoder import BACKENDS, Backend
from mmearth_ray.model.published import to_published
from mmearth_ray.objective import Objective

# Relative to the largest expected value of an array, or to the expected number; an independent implementation in float32 on a
# CPU stays below all of them.  Differences of gradient norms up to the floor are always within the tolerance.
TOLERANCES = {"encoder": 4e-6, "predictions": 1e-5, "losses": 5e-6, "total": 1e-6, "gradient_norms": 3e-4}
GRADIENT_FLOOR = 1e-6


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.bench_parity", description=__doc__)
    parser.add_argument("--case", action="append", required=True, type=Path, metavar="FOLDER/NAME")
    parser.add_argument("--backend", choices=BACKENDS, default="packed")
    options = parser.parse_args(arguments)
    passed = True
    for path in options.case:
        result = compare(load_case(path), options.backend)
        print(json.dumps(result), flush=True)
        passed = passed and result["passed"]
    return 0 if passed else 1


def compare(case: GoldenCase, backend: Backend = "packed") -> dict[str, Any]:
    """The worst difference of each quantity, where it is, and whether all are within their tolerances."""
    objective, description = build_objective(case, backend)
    batch = make_batch(case, objective)
    found = {
        "encoder": _encoder(case, objective, batch),
        "predictions": _predictions(case, objective, batch),
        **_losses_and_gradients(case, objective, description, batch),
    }
    worst = {quantity: max(differences.items(), key=lambda item: item[1]) for quantity, differences in found.items()}
    return {
        "case": case.name, "backend": backend,
        "passed": all(value <= TOLERANCES[quantity] for quantity, (_, value) in worst.items()),
        **{quantity: value for quantity, (_, value) in worst.items()},
        "worst": {quantity: name for quantity, (name, _) in worst.items()}, "tolerances": TOLERANCES,
    }  # fmt: skip


def build_objective(case: GoldenCase, backend: Backend) -> tuple[Objective, Description]:
    """The case's model in published mode, with unit statistics since its inputs are normalised."""
    meta, entry = case.meta, {key: case.meta[key] for key in ("patch_size", "norm_pix_loss")}
    arguments = entry | {"input_size": meta["img_size"], "out_modalities": dict.fromkeys(meta["modalities"], "all")}
    given = {key.removesuffix("_bands"): value for key, value in meta.items() if key.endswith("_bands")}
    description, tensors = import_published(Published(case.state, arguments, None), given)
    for name, wanted in (("patch_size", description.patch_size), ("dims", description.dims), ("depths", description.depths)):
        if meta[name] != wanted:
            raise DataError(f"the case {case.name} says {name} {meta[name]}, its state dict {wanted}")
    uncertain = meta["loss_aggregation"] == "uncertainty"
    if uncertain != (description.weighting == "uncertainty"):
        raise DataError(f"the case {case.name} has loss_aggregation {meta['loss_aggregation']}, its state dict disagrees")
    targets = tuple(replace(m, missing=()) for m in targets_of(description))  # nothing is missing in normalised inputs
    source = replace(input_of(description), missing=())
    unit = {m.name: (torch.zeros(len(PRODUCTS), m.width), torch.ones(len(PRODUCTS), m.width)) for m in (source, *targets)}
    objective = Objective(
        build_model(description, backend), input=source, targets=targets, statistics=unit,
        normalise_targets=frozenset(description.normalise_targets), missing="mean",
        weighting="uncertainty" if uncertain else "unweighted",
    )  # fmt: skip
    objective.load_state_dict(tensors)
    return objective, description


def make_batch(case: GoldenCase, objective: Objective) -> dict[str, Tensor]:
    """The case's inputs and mask as the data pipeline would hand them over."""
    mask_BL = case.expected["mask"]
    if len({int(row.sum()) for row in mask_BL}) > 1:
        raise DataError(f"the case {case.name} hides different numbers of patches in its images; a batch hides the same in all")
    batch = {"product": torch.zeros(len(mask_BL), dtype=torch.int8)}
    for m in (objective.input, *objective.targets):
        batch[m.name] = _as_streamed(m, case.inputs[m.name])
        batch[m.present_column] = torch.ones(len(mask_BL), dtype=torch.bool)
    for name, chosen in (("visible", 0), ("hidden", 1)):
        batch[name] = torch.from_numpy(np.stack([np.flatnonzero(row == chosen) for row in mask_BL]))
    return batch


def _as_streamed(m: Modality, value: Tensor) -> Tensor:
    if m.kind is Kind.CONTINUOUS:
        return value
    return value[:, 0] if m.level is Level.PIXEL else value.argmax(1)


def _difference(found: Tensor, expected: np.ndarray) -> float:
    """The largest difference over the largest expected value; of a sample's numbers only as many as are expected."""
    wanted = torch.from_numpy(expected).flatten(1)
    given = found.detach().flatten(1)[:, : wanted.shape[1]]
    if given.shape != wanted.shape:
        raise DataError(f"an array of {list(expected.shape)} is expected, the model gives {list(found.shape)}")
    return _relative(float((given - wanted).abs().max()), 0.0, float(wanted.abs().max()))


def _encoder(case: GoldenCase, objective: Objective, batch: dict[str, Tensor]) -> dict[str, float]:
    image, visible = batch[objective.input.name], batch["visible"]
    rows, columns = objective.model.grid(image)
    with torch.no_grad():
        x_BVD = objective.model.encoder(image, visible).flatten(1, 3)
    dense_BLD = x_BVD.new_zeros(len(image), rows * columns, x_BVD.shape[2])
    dense_BLD = dense_BLD.scatter(1, visible[..., None].expand_as(x_BVD), x_BVD)
    if case.expected["encoder"].size != dense_BLD.numel():
        raise DataError(
            f"the case {case.name} has an encoder output of {list(case.expected['encoder'].shape)}, which is cut off"
        )
    return {"features": _difference(dense_BLD.transpose(1, 2), case.expected["encoder"])}


def _predictions(case: GoldenCase, objective: Objective, batch: dict[str, Tensor]) -> dict[str, float]:
    """Predictions at all patches, visible ones too, as the published code makes them: (B, P P C, L)."""
    patches = case.expected["mask"].shape[1]
    with torch.no_grad():
        everywhere = torch.arange(patches).expand(len(batch["visible"]), -1)
        found = objective.model(batch[objective.input.name], batch["visible"], everywhere)
    maps = {
        m.name: found[m.name].flatten(2).transpose(1, 2) if m.level is Level.PIXEL else found[m.name] for m in objective.targets
    }
    return {name: _difference(prediction, case.expected[f"pred/{name}"]) for name, prediction in maps.items()}


def _losses_and_gradients(
    case: GoldenCase, objective: Objective, description: Description, batch: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    totals = objective.valid_counts(batch).sum(0)
    loss, sums = objective(batch, totals, 1.0)
    loss.backward()
    names = [m.name for m in objective.targets]
    losses = dict(zip(names, (sums.double() / totals).tolist(), strict=True))
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in objective.named_parameters()}
    norms = {key: value.norm().item() for key, value in to_published(gradients, description.targets).items()}
    absent = [key for key in case.meta["grad_norm"] if key not in norms]
    if absent:
        raise DataError(f"the case {case.name} has gradients of what the model has not: {', '.join(absent)}")
    return {
        "losses": {name: _relative(losses[name], wanted) for name, wanted in case.meta["losses"].items()},
        "total": {"loss": _relative(loss.item(), case.meta["loss"])},
        "gradient_norms": {
            key: _relative(norms[key], norm, GRADIENT_FLOOR / TOLERANCES["gradient_norms"])
            for key, norm in case.meta["grad_norm"].items()
        },
    }


def _relative(found: float, expected: float, least: float = 0.0) -> float:
    """The difference relative to the expected number, or to `least` where that is larger; what is no number is far off."""
    difference = abs(found - expected) / max(abs(expected), least, sys.float_info.min)
    return difference if math.isfinite(difference) else sys.float_info.max


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
