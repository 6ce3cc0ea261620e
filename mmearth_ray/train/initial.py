"""Starting from earlier weights: an exported encoder, a checkpoint, or a run that has one."""

import json
from pathlib import Path
from typing import Any

import torch

from mmearth_ray.errors import DataError
from mmearth_ray.experiment import ENCODER, Experiment, build_objective
from mmearth_ray.modalities import get
from mmearth_ray.train.checkpoint import load_tensors


def check_initial(experiment: Experiment) -> None:
    """Raise DataError, before any worker starts, unless `model.init` fits the model and its input bands."""
    if not experiment.config.model.init:
        return
    path = Path(experiment.config.model.init)
    with torch.device("meta"):
        module = build_objective(experiment, initial=False)
    load_initial(module, path, ENCODER)
    found, spec = _input_of(initial_file(path).parent), experiment.spec
    wanted = (spec.input.name, list(spec.input.bands))
    if found is not None and found != wanted:
        raise DataError(
            f"model.init={path}: its input is {found[0]} with bands {', '.join(found[1])}, this model's is {wanted[0]} with "
            f"{', '.join(wanted[1])}; set model.input and model.bands alike"
        )


def _input_of(folder: Path) -> tuple[str, list[str]] | None:
    """The input modality and bands that an export or a checkpoint was trained with; None where nothing says so."""
    for name, read in (("config.json", _exported_input), ("state.json", _trained_input)):
        try:
            return read(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _exported_input(description: dict[str, Any]) -> tuple[str, list[str]]:
    return description["input"], list(description["bands"])


def _trained_input(state: dict[str, Any]) -> tuple[str, list[str]]:
    settings = state["settings"]
    name = settings["model.input"]
    return name, list(settings["model.bands"].get(name) or get(name).default_bands().bands)


def initial_file(path: Path) -> Path:
    """The safetensors file that `model.init` names: itself, or within a checkpoint, an exported encoder or a run.

    Raises DataError if there is none.
    """
    names = ("model.safetensors", "encoder.safetensors", "exported/encoder.safetensors")
    for candidate in (path, *(path / name for name in names)):
        if candidate.is_file():
            return candidate
    raise DataError(f"model.init={path}: neither a safetensors file nor a directory with {' or '.join(names)}")


def load_initial(module: torch.nn.Module, path: Path, encoder: str) -> list[str]:
    """Copy the weights of `path` that the module has, and return their names.  `encoder` is the prefix of its encoder.

    An exported encoder's names lack that prefix.  The whole encoder must be there, in this model's shapes, or it is a
    DataError; of the rest, what has another shape here (heads of other bands) stays as initialised, and so do the weights of
    the losses, which belong to a list of targets.
    """
    given = load_tensors(initial_file(path))
    own = dict(module.named_parameters())
    matched = {}
    for name, tensor in given.items():
        target = name if name in own else encoder + name
        if target not in own or target == "log_variances":
            continue
        if own[target].shape == tensor.shape:
            matched[target] = tensor
        elif target.startswith(encoder):
            raise DataError(
                f"model.init={path}: {name} has shape {tuple(tensor.shape)}, this model needs {tuple(own[target].shape)}; "
                "model.size, model.patch_size, model.stem and bands must agree"
            )
    missing = [name for name in own if name.startswith(encoder) and name not in matched]
    if missing:
        raise DataError(f"model.init={path}: {len(missing)} tensors of the encoder are not in it, the first is {missing[0]}")
    with torch.no_grad():
        for name, tensor in matched.items():
            own[name].copy_(tensor)
    return sorted(matched)
