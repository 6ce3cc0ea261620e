"""Small cases in the form of the golden ones, for structures that none of those has."""

import json
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.golden_case import GoldenCase, load_case
from mmearth_ray.checkpoints.assemble import parameter_shapes
from mmearth_ray.checkpoints.folder import Description
from mmearth_ray.modalities import get
from mmearth_ray.model.published import to_published

SMALL: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24]}
STRUCTURES: dict[str, dict[str, Any]] = {
    "original stem, patch 8": {"stem": "original"},
    "original stem, patch 16, colour": {"stem": "original", "patch_size": 16, "bands": ["B2", "B3", "B4"]},
    "patch 32, two decoder blocks": {"patch_size": 32, "decoder_depth": 2},
    "its input alone, in colour": {"patch_size": 32, "stem": "original", "bands": ["B2", "B3", "B4"], "targets": ["sentinel2"]},
    "one band": {"bands": ["B8"], "stem": "original"},
    "a choice of tasks in an order of its own": {"targets": ["biome", "sentinel2", "esa_worldcover", "lat"]},
    "maps only, unweighted": {"targets": ["sentinel2", "sentinel1", "dynamic_world"], "weighting": "unweighted"},
    "an odd choice of bands": {"bands": ["B11", "B1", "B5", "B10"], "targets": ["sentinel2", "month"]},
}


def make_case(structure: dict[str, Any]) -> GoldenCase:
    """A case of another structure; its expected encoder output comes from an implementation of its own, the rest is ours."""
    row = get("sentinel2").select(structure.get("bands", get("sentinel2").default_bands().bands))
    targets = structure.get("targets", ["sentinel2", "era5", "aster"])
    patch = structure.get("patch_size", 8)
    description = Description(
        size=None, **SMALL, patch_size=patch, image_size=4 * patch, stem=structure.get("stem", "modified"), grn="batch",
        input="sentinel2", bands=list(row.bands), units=[], missing=[], statistics=None, targets=targets,
        target_bands={"sentinel2": list(row.bands)}, normalise_targets=[], weighting=structure.get("weighting", "uncertainty"),
        decoder_width=20, decoder_depth=structure.get("decoder_depth", 1),
    )  # fmt: skip
    shapes = {name: torch.empty(shape) for name, shape in parameter_shapes(description).items()}
    meta = {
        "salt": "t", **SMALL, "batch": 2, "img_size": 4 * patch, "patch_size": patch, "norm_pix_loss": True,
        "loss_aggregation": description.weighting, "modalities": targets, "sentinel2_bands": list(row.bands),
        "loss": 1.0, "losses": dict.fromkeys(targets, 1.0), "grad_norm": {"mask_token": 1.0},
        "state_shapes": {key: list(value.shape) for key, value in to_published(shapes, targets).items()},
    }  # fmt: skip
    rng = np.random.default_rng(zlib.crc32(json.dumps(structure).encode()))
    mask = np.stack([rng.permutation([1] * 10 + [0] * 6) for _ in range(2)]).astype(np.float32)
    expected = {"mask": mask, "encoder": np.zeros((2, 24, 4, 4), np.float32)} | {
        f"pred/{name}": np.zeros((2, 2), np.float32) for name in targets
    }
    with TemporaryDirectory() as folder:
        return load_case(write_case(Path(folder), meta, expected))


def write_case(folder: Path, meta: dict[str, Any], expected: dict[str, np.ndarray]) -> Path:
    """Write a case as its makers do."""
    (folder / "made.json").write_text(json.dumps(meta))
    np.savez(folder / "made.npz", **expected)  # type: ignore[arg-type]
    return folder / "made"
