"""An exported encoder with random weights, and how tests load the packages that adapters serve."""

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensors import randomise

from mmearth_ray.checkpoints.assemble import build_encoder
from mmearth_ray.checkpoints.folder import Description, write_exported
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.objective import ENCODER

BANDS = ["B2", "B3", "B4", "B8A", "B8"]
STATISTICS = {
    "l1c": {"mean": [900.0, 800.0, 700.0, 2000.0, 2100.0], "std": [100.0, 200.0, 300.0, 400.0, 500.0]},
    "l2a": {"mean": [500.0, 600.0, 650.0, None, 2500.0], "std": [50.0, 0.0, 250.0, None, 1000.0]},
}


def describe(**changes: Any) -> Description:
    """What the exported encoder of these tests says of itself: atto, patches of 8 px, five bands."""
    depths, dims = SIZES["atto"]
    return Description(**{
        "size": "atto", "depths": list(depths), "dims": list(dims), "patch_size": 8, "image_size": 56, "stem": "modified",
        "grn": "image", "input": "optical", "bands": BANDS, "units": ["reflectance x 10000"] * len(BANDS), "missing": [0],
        "statistics": STATISTICS, "targets": [], "target_bands": {}, "normalise_targets": [], "weighting": "unweighted",
        "decoder_width": 8, "decoder_depth": 1, "data_set": "made up",
    } | changes)  # fmt: skip


def export(folder: Path, **changes: Any) -> Path:
    """Write an exported encoder with random weights of everyday size."""
    description = describe(**changes)
    encoder = build_encoder(description)
    randomise(encoder, torch.Generator().manual_seed(0))
    return write_exported(folder, description, {ENCODER + name: p for name, p in encoder.named_parameters()})


def draw_image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def load(package: str, module: str) -> Any:
    """Import a module that needs a package: where that is not installed, the test is skipped.  Import warnings are theirs."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: 'make interop' makes an environment that has it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _load_torchvision()
        return importlib.import_module(module)


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Four samples, as both packages' data sets give them."""

    def __init__(self, sample: Callable[[int], dict[str, Any]]) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.sample(place)


def fit(task: Any, sample: Callable[[int], dict[str, Any]]) -> None:
    """Two steps of training and validation of a Lightning task."""
    loaders = [torch.utils.data.DataLoader(Samples(sample), batch_size=2) for _ in range(2)]
    load("lightning", "lightning.pytorch").Trainer(
        fast_dev_run=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, *loaders)  # fmt: skip


def _load_torchvision() -> None:
    """Beside a CPU build of torch, torchvision's own operators may not load.  None is used here, so it goes without them."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        stand_in = "torchvision._meta_registrations"
        sys.modules[stand_in] = ModuleType(stand_in)
        importlib.import_module("torchvision")
