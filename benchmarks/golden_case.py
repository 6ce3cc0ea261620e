"""Golden cases: what the published code computed, with the weights and inputs that it computed it from.

A case is NAME.json and NAME.npz.  The JSON holds the settings, the shapes of the published state dict, the losses and the
norm of every gradient; the arrays are the mask (B, L), 1 where hidden, the encoder's output (B, D, H, W) with zeros where
hidden, and pred/<modality>, flattened per sample and cut off in large cases.  Weights and inputs are not stored: each is
drawn from a generator that its own name and the case's salt seed.
"""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import DEFAULT_INPUT, Kind, Level, get

SETTINGS = (
    "salt", "depths", "dims", "batch", "img_size", "patch_size", "norm_pix_loss", "loss_aggregation", "modalities",
    f"{DEFAULT_INPUT}_bands", "loss", "losses", "grad_norm", "state_shapes",
)  # fmt: skip


@dataclass(frozen=True)
class GoldenCase:
    """`state`: the published state dict.  `inputs`: normalised values by modality, class maps with -1 where unlabelled, image
    labels one-hot.  `expected`: the arrays of the case."""

    name: str
    meta: dict[str, Any]
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, np.ndarray]

    @property
    def bands(self) -> list[str]:
        """Bands of the input modality."""
        return list(self.meta[f"{DEFAULT_INPUT}_bands"])


def load_case(path: Path) -> GoldenCase:
    """The case FOLDER/NAME, with or without suffix.  Raises DataError for one that is not there or not of this form."""
    path = path.with_suffix("") if path.suffix in (".json", ".npz") else path
    try:
        meta = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
        with np.load(path.with_name(f"{path.name}.npz")) as arrays:
            expected = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"the case {path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"the case {path} holds no settings by name")
    absent = [key for key in SETTINGS if key not in meta or meta[key] in ({}, [])]
    absent += [f"the loss of {m}" for m in meta.get("modalities", []) if m not in meta.get("losses", {})]
    absent += [name for name in ("mask", "encoder", *(f"pred/{m}" for m in meta.get("modalities", []))) if name not in expected]
    if absent:
        raise DataError(f"the case {path} lacks {', '.join(absent)}")
    return GoldenCase(path.name, meta, _state(meta), _inputs(meta), expected)


def _generator(salt: str, name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{salt}/{name}".encode()))


def _state(meta: dict[str, Any]) -> dict[str, Tensor]:
    """Normal numbers: scales of norms around 1, all else small, GRN four times larger so that it matters.

    The decoder's block is drawn under the name of each task; as it is one block, the last task's numbers are everybody's.
    """
    state = {}
    for key, shape in meta["state_shapes"].items():
        drawn = _generator(meta["salt"], key).standard_normal(tuple(shape)).astype(np.float32)
        scale = key == "layer_norm_tmp.weight" or key.endswith(("ln.weight", "norm.weight"))
        value = 1 + 0.1 * drawn if scale else 0.05 * drawn
        state[key] = torch.from_numpy(np.asarray(4 * value if "grn" in key else value, np.float32))
    shared = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith("decoder_dict.")}
    return {key: shared[key.split(".", 2)[2]] if key.startswith("decoder_dict.") else value for key, value in state.items()}


def _inputs(meta: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(_input(meta, name)) for name in dict.fromkeys([DEFAULT_INPUT, *meta["modalities"]])}


def _input(meta: dict[str, Any], name: str) -> np.ndarray:
    generator, batch, row = _generator(meta["salt"], f"input/{name}"), meta["batch"], get(name)
    side = (meta["img_size"],) * 2 if row.level is Level.PIXEL else ()
    if row.kind is Kind.CONTINUOUS:
        width = len(meta[f"{name}_bands"]) if f"{name}_bands" in meta else row.width
        return generator.standard_normal((batch, width, *side)).astype(np.float32)
    if row.level is Level.PIXEL:
        return generator.integers(-1, row.width, (batch, 1, *side))
    return np.eye(row.width, dtype=np.int64)[generator.integers(0, row.width, (batch,))]
