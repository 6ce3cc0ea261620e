"""Starting from earlier weights: an exported or imported model, a checkpoint, or a run that has one."""

from pathlib import Path

import torch
from torch import Tensor

from mmearth_ray.checkpoints.folder import CHECKPOINT_FILE, ENCODER_FILE, EXPORTED, files_of, open_exported, read_tensors
from mmearth_ray.errors import DataError
from mmearth_ray.experiment import Experiment, build_objective
from mmearth_ray.objective import ENCODER


def check_initial(experiment: Experiment) -> None:
    """Raise DataError, before any worker starts, unless `model.init` fits the model and its input bands."""
    if not experiment.config.model.init:
        return
    path = Path(experiment.config.model.init)
    with torch.device("meta"):
        module = build_objective(experiment, initial=False)
    load_initial(module, path)
    if path.is_file() or not _is_described(path):
        return
    found, spec = open_exported(path).description, experiment.spec
    if (found.input, found.bands) != (spec.input.name, list(spec.input.bands)):
        raise DataError(
            f"model.init={path}: its input is {found.input} with bands {', '.join(found.bands)}, this model's is "
            f"{spec.input.name} with {', '.join(spec.input.bands)}; set model.input and model.bands alike"
        )


def initial_tensors(path: Path) -> dict[str, Tensor]:
    """The weights that `model.init` names: a safetensors file, or a folder that holds some, described or not.

    Raises DataError if there are none.
    """
    if path.is_file():
        return read_tensors(path)
    if _is_described(path):
        return open_exported(path).tensors()
    if parts := files_of(path, CHECKPOINT_FILE):
        return {name: tensor for part in parts for name, tensor in read_tensors(part).items()}
    for file in (path / ENCODER_FILE, path / EXPORTED / ENCODER_FILE):
        if file.is_file():
            return read_tensors(file)
    raise DataError(
        f"model.init={path}: neither a safetensors file nor a folder with {CHECKPOINT_FILE}, {ENCODER_FILE} or {EXPORTED}/; "
        "a published .pth is imported first: python -m mmearth_ray.checkpoints import"
    )


def _is_described(path: Path) -> bool:
    try:
        open_exported(path)
    except DataError:
        return False
    return True


def load_initial(module: torch.nn.Module, path: Path) -> list[str]:
    """Copy the weights of `path` that the module has, and return their names.

    The names of an encoder alone may lack the prefix that they have in an Objective.  The whole encoder must be there, in
    this model's shapes, or it is a DataError; of the rest, what has another shape here (heads of other bands) stays as
    initialised, and so do the weights of the losses, which belong to a list of targets.
    """
    given = initial_tensors(path)
    own = dict(module.named_parameters())
    matched = {}
    for name, tensor in given.items():
        target = name if name in own else ENCODER + name
        if target not in own or target == "log_variances":
            continue
        if own[target].shape == tensor.shape:
            matched[target] = tensor
        elif target.startswith(ENCODER):
            raise DataError(
                f"model.init={path}: {name} has shape {tuple(tensor.shape)}, this model needs {tuple(own[target].shape)}; "
                "model.size, model.patch_size, model.stem and bands must agree"
            )
    missing = [name for name in own if name.startswith(ENCODER) and name not in matched]
    if missing:
        raise DataError(f"model.init={path}: {len(missing)} tensors of the encoder are not in it, the first is {missing[0]}")
    with torch.no_grad():
        for name, tensor in matched.items():
            own[name].copy_(tensor)
    return sorted(matched)
