"""From the description of an exported model to the model."""

from typing import cast

import torch
from torch import Tensor

from mmearth_ray.checkpoints.folder import Description, Exported
from mmearth_ray.errors import DataError
from mmearth_ray.modalities import Modality, get
from mmearth_ray.model.encoder import Backend, Encoder, Stem
from mmearth_ray.model.layers import Scope
from mmearth_ray.model.mpmae import MPMAE, with_decoder
from mmearth_ray.objective import ENCODER


def input_of(description: Description) -> Modality:
    """The input modality with its bands.  Raises DataError if the table has no such modality or band."""
    return _row(description.input, description.bands)


def targets_of(description: Description) -> tuple[Modality, ...]:
    """The targets in the order of their log-variances, with their bands.  Raises DataError if the table lacks one."""
    return tuple(_row(name, description.target_bands.get(name)) for name in description.targets)


def build_encoder(description: Description, backend: Backend = "packed") -> Encoder:
    """The encoder, not yet with its weights.  Raises DataError for a structure that there is none of."""
    d = description
    try:
        return Encoder(
            len(d.bands), tuple(d.depths), tuple(d.dims), d.patch_size, cast(Stem, d.stem), cast(Scope, d.grn), backend
        )
    except ValueError as error:
        raise DataError(f"the model's description calls for what does not exist: {error}") from error


def build_model(description: Description, backend: Backend = "packed") -> MPMAE:
    """The whole pretraining model, for all its image sizes, not yet with its weights."""
    d = description
    others = tuple(d.others.values())
    return with_decoder(build_encoder(d, backend), targets_of(d), d.decoder_width, d.decoder_depth, others)


def parameter_shapes(description: Description) -> dict[str, tuple[int, ...]]:
    """Names, as in an Objective, and shapes of all weights."""
    with torch.device("meta"):
        model = build_model(description)
    shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
    return shapes | ({"log_variances": (len(description.targets),)} if description.weighting == "uncertainty" else {})


def checked_tensors(exported: Exported, *, whole: bool) -> dict[str, Tensor]:
    """The weights of an exported model, all (`whole`) or the encoder's, by their names in an Objective.

    Raises DataError unless they are just those that its description calls for.
    """
    if whole:
        tensors, wanted = exported.pretraining_tensors(), parameter_shapes(exported.description)
    else:
        tensors = {ENCODER + name: tensor for name, tensor in exported.encoder_tensors().items()}
        wanted = {k: shape for k, shape in parameter_shapes(exported.description).items() if k.startswith(ENCODER)}
    wrong = [name for name, shape in wanted.items() if name not in tensors or tuple(tensors[name].shape) != shape]
    wrong += [name for name in tensors if name not in wanted]
    if wrong:
        names = ", ".join(wrong[:3])
        raise DataError(
            f"the weights in {exported.folder} are not those of its description: see {names}; make the folder again"
        )
    return tensors


def _row(name: str, bands: list[str] | None) -> Modality:
    try:
        return get(name) if bands is None else get(name).select(bands)
    except ValueError as error:
        raise DataError(str(error)) from error
