"""A small exported encoder: four blocks, a few channels, weights of everyday size."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tensors import randomise

from mmearth_ray.checkpoints.folder import Description, write_exported
from mmearth_ray.modalities import DEFAULT_INPUT, get
from mmearth_ray.model.encoder import Encoder
from mmearth_ray.objective import ENCODER

DEPTHS, DIMS = (1, 1, 1, 1), (4, 6, 8, 10)
BANDS = get(DEFAULT_INPUT).default_bands().bands


def tiny_statistics(bands: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
    """Of both products; l1c lacks the last band's."""
    mean: list[float | None] = [1000.0 + 100 * i for i in range(len(bands))]
    std: list[float | None] = [500.0 + 10 * i for i in range(len(bands))]
    return {"l2a": {"mean": mean, "std": std}, "l1c": {"mean": [*mean[:-1], None], "std": [*std[:-1], None]}}


def tiny_encoder(
    folder: Path,
    bands: Sequence[str] = BANDS,
    patch: int = 8,
    seed: int = 0,
    statistics: dict[str, dict[str, list[float | None]]] | None = None,
    modality: str = DEFAULT_INPUT,
    stem: str = "modified",
) -> Path:
    """Write the encoder, with weights of that seed, to a folder, which is its path for `open_subject`."""
    encoder = Encoder(len(bands), DEPTHS, DIMS, patch, stem)  # pyright: ignore[reportArgumentType]
    randomise(encoder, torch.Generator().manual_seed(seed))
    entry = get(modality)
    description = Description(
        size=None, depths=list(DEPTHS), dims=list(DIMS), patch_size=patch, image_size=2 * patch, stem=stem, grn="batch",
        input=modality, bands=list(bands), units=["1"] * len(bands), missing=list(entry.missing),
        statistics=statistics,
        targets=[], target_bands={}, normalise_targets=[], weighting="unweighted", decoder_width=8, decoder_depth=1,
    )  # fmt: skip
    return write_exported(folder, description, {ENCODER + name: t for name, t in encoder.state_dict().items()})
