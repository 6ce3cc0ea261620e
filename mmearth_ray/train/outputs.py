"""What a run leaves for people and for other programs: the exported model and the reconstruction figures."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmearth_ray.checkpoints.folder import EXPORTED, Description, open_exported, statistics_by_product, write_exported
from mmearth_ray.errors import DataError
from mmearth_ray.experiment import Experiment, fixed_settings, versions
from mmearth_ray.modalities import Kind
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.report.reconstruction import draw_reconstruction
from mmearth_ray.stream.prepare import Batch, valid_mask


def export_model(experiment: Experiment, weights: Mapping[str, Tensor], step: int) -> Path:
    """Write `exported/`: the model's float32 weights, and all that is needed to feed it.  It appears whole or not at all.

    Of a model for several image sizes, the folder holds a model for each of the others as well.
    """
    return write_exported(experiment.run / EXPORTED, description_of(experiment, step), weights)


def clear_half_written(run: Path) -> None:
    """Remove what a kill left of an export; the one before it comes back where it was moved away already."""
    for removed in run.glob(f".{EXPORTED}.*.removed"):
        if not (run / EXPORTED).exists():
            removed.replace(run / EXPORTED)
    for left in run.glob(f".{EXPORTED}.*"):
        shutil.rmtree(left, ignore_errors=True)


def outputs_are_of(run: Path, step: int) -> bool:
    """Whether the exported model, which is written last, is that of this step."""
    try:
        return open_exported(run / EXPORTED).description.step == step
    except DataError:
        return False


def description_of(experiment: Experiment, step: int) -> Description:
    """Structure, bands, units and statistics of the model as it is after `step` steps, and where it comes from."""
    model, entry, targets = experiment.config.model, experiment.spec.input, experiment.spec.targets
    mean, std = experiment.statistics[entry.name]
    return Description(
        size=model.size,
        depths=list(SIZES[model.size].depths),
        dims=list(SIZES[model.size].dims),
        patch_size=model.patch_size,
        image_size=model.image_size,
        image_sizes=list(model.image_sizes),
        stem=model.stem,
        grn=model.grn,
        input=entry.name,
        bands=list(entry.bands),
        units=list(entry.units),
        missing=list(entry.missing),
        statistics=statistics_by_product(mean, std),
        targets=[m.name for m in targets],
        target_bands={m.name: list(m.bands) for m in targets if m.kind is Kind.CONTINUOUS},
        normalise_targets=sorted(experiment.spec.normalise_targets),
        weighting=model.weighting,
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        step=step,
        tiles_seen=step * experiment.config.train.global_batch,
        data_set=experiment.source.name,
        origin={
            "settings": fixed_settings(experiment.config), "identity": experiment.identity, "versions": versions(),
        },
    )  # fmt: skip


def draw_reconstructions(experiment: Experiment, batch: Batch, shown: Mapping[str, Mapping[str, Tensor]], step: int) -> Path:
    """Draw input, visible patches, truth and prediction of every target for the samples of `batch`.

    `shown`: what the objective's `reconstruct` made of them.
    """
    spec = experiment.spec
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
