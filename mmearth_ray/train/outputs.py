"""What a run leaves for people and for other programs: the exported encoder and the reconstruction figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmearth_ray.experiment import Experiment, fixed_settings, versions
from mmearth_ray.modalities import PRODUCTS
from mmearth_ray.objective import Objective
from mmearth_ray.report.reconstruction import draw_reconstruction
from mmearth_ray.stream.prepare import Batch, valid_mask

EXPORT_FORMAT = 1


def export_encoder(experiment: Experiment, objective: Objective, step: int) -> Path:
    """Write `exported/`: the encoder's float32 weights, and all that is needed to feed it.  Both appear whole or not at all."""
    folder = experiment.run / "exported"
    incoming = experiment.run / ".exported"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    description = encoder_description(experiment, step)
    weights = {name: p.detach().cpu().contiguous() for name, p in objective.model.encoder.named_parameters()}
    save_file(weights, incoming / "encoder.safetensors", metadata={"mmearth_ray": json.dumps(description)})
    (incoming / "config.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    removed = experiment.run / ".exported.removed"
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.replace(removed)
    incoming.replace(folder)
    shutil.rmtree(removed, ignore_errors=True)
    return folder


def outputs_are_of(run: Path, step: int) -> bool:
    """Whether the exported encoder, which is written last, is that of this step."""
    try:
        return json.loads((run / "exported" / "config.json").read_text(encoding="utf-8"))["step"] == step
    except (OSError, ValueError, KeyError, TypeError):
        return False


def encoder_description(experiment: Experiment, step: int) -> dict[str, Any]:
    """Size, patch, bands, units and statistics of the encoder, and where it comes from."""
    model, entry = experiment.config.model, experiment.spec.input
    mean, std = experiment.statistics[entry.name]
    return {
        "format": EXPORT_FORMAT,
        "size": model.size,
        "patch_size": model.patch_size,
        "image_size": model.image_size,
        "stem": model.stem,
        "input": entry.name,
        "bands": list(entry.bands),
        "units": list(entry.units),
        "missing": list(entry.missing),
        "statistics": {
            product: {"mean": _numbers(mean[row]), "std": _numbers(std[row])} for row, product in enumerate(PRODUCTS)
        },
        "targets": [m.name for m in experiment.spec.targets],
        "step": step,
        "tiles_seen": step * experiment.config.train.global_batch,
        "data_set": experiment.spec.dataset,
        "identity": experiment.identity,
        "settings": fixed_settings(experiment.config),
        "versions": versions(),
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


def draw_reconstructions(
    experiment: Experiment, objective: Objective, batch: Batch, tensors: dict[str, Tensor], step: int
) -> Path:
    """Draw input, visible patches, truth and prediction of every target for the samples of `batch`."""
    spec = experiment.spec
    with torch.no_grad():
        shown = objective.reconstruct(tensors)
    arrays = {name: {k: v.detach().cpu().numpy() for k, v in parts.items()} for name, parts in shown.items()}
    side = spec.image_size // spec.patch_size
    samples = []
    for i, name in enumerate(batch["id"].tolist()):
        visible = np.zeros(spec.patches, bool)
        visible[batch["visible"][i]] = True
        sample: dict[str, Any] = {"id": name, "visible": visible.reshape(side, side), "input": batch[spec.input.name][i]}
        sample["input_valid"] = valid_mask(spec, spec.input, batch)[i]
        for part in ("truth", "prediction", "valid"):
            sample[part] = {target: arrays[target][part][i] for target in arrays}
        samples.append(sample)
    path = experiment.run / "figures" / f"reconstruction-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{experiment.config.model.size}, step {step:,}: prediction from {spec.visible} of {spec.patches} patches"
    draw_reconstruction(path, samples, spec.targets, spec.input, spec.patch_size, title)
    return path
