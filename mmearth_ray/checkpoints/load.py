"""Trained encoders for downstream use: an exported model, or a checkpoint, as a module for whole images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast, overload

from mmearth_ray.checkpoints.assemble import checked_tensors
from mmearth_ray.checkpoints.folder import open_exported
from mmearth_ray.model.dense import DenseEncoder, build_dense
from mmearth_ray.model.encoder import Stem
from mmearth_ray.model.features import FeatureEncoder
from mmearth_ray.model.normalise import Inputs
from mmearth_ray.objective import ENCODER


@overload
def load_encoder(
    path: str | Path, *, num_classes: int = ..., features_only: Literal[False] = ..., out_indices: None = ...
) -> DenseEncoder: ...
@overload
def load_encoder(
    path: str | Path, *, features_only: Literal[True], out_indices: int | Sequence[int] | None = ...
) -> FeatureEncoder: ...
def load_encoder(
    path: str | Path,
    *,
    num_classes: int = 0,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
) -> DenseEncoder | FeatureEncoder:
    """The encoder of an exported model, of a run or of a checkpoint, for whole images, on the CPU.

    With `num_classes` a fresh classifier follows; with `features_only` a list of maps comes out, of the stages
    `out_indices`.  GRN is per image, whatever it was in pretraining.  The module carries `bands`, `description` (all that is
    known of the model) and `normalise(product)`.  Raises DataError for what cannot be read or does not fit together, and
    ValueError for arguments that do not.
    """
    source = open_exported(Path(path))
    d = source.description
    tensors = {name.removeprefix(ENCODER): t for name, t in checked_tensors(source, whole=False).items()}
    inputs = Inputs(tuple(d.bands), tuple(d.missing), d.statistics)
    model = build_dense(
        len(d.bands), tuple(d.depths), tuple(d.dims), d.patch_size, cast(Stem, d.stem), inputs,
        num_classes=num_classes, features_only=features_only, out_indices=out_indices,
    )  # fmt: skip
    model.load_state_dict({name: tensors[name] for name in model.state_dict() if name in tensors}, strict=False)
    model.description = d
    if isinstance(model, DenseEncoder):
        model.image_size = d.image_size
    return model
