"""ONNX files: the numbers of the module for any batch and size, what they say of themselves, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensors import assert_near, randomise

from mmearth_ray.checkpoints import onnx as exporting
from mmearth_ray.checkpoints.onnx import export_onnx
from mmearth_ray.errors import UsageError
from mmearth_ray.model.dense import DenseEncoder
from mmearth_ray.model.encoder import STEMS, Stem
from mmearth_ray.model.features import FeatureEncoder
from mmearth_ray.model.normalise import Inputs

onnx: Any = pytest.importorskip("onnx")
onnxruntime: Any = pytest.importorskip("onnxruntime")

DEPTHS, DIMS = (1, 1, 1, 1), (8, 16, 16, 24)
INPUTS = Inputs(("B4", "B3", "B2"), (0,), {"l2a": {"mean": [1.0, 2.0, None], "std": [1.0, 0.5, None]}})


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(10)


def run(path: Path, image: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"image": image.numpy()})), strict=True))


@pytest.mark.parametrize("stem", STEMS)
def test_a_file_gives_the_features_of_other_batches_and_sizes_and_says_what_it_takes(
    stem: Stem, generator: torch.Generator, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = DenseEncoder(3, DEPTHS, DIMS, 16, stem, INPUTS)
    randomise(encoder, generator)
    encoder.train()
    path = export_onnx(encoder, tmp_path / "encoder.onnx")
    assert encoder.training  # as it was
    assert list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")
    for shape in ((1, 3, 16, 16), (5, 3, 48, 16), (2, 3, 112, 112)):
        image = torch.randn(*shape, generator=generator)
        found = run(path, image)
        with torch.no_grad():
            assert_near(found["features"], encoder.forward_features(image), 1e-4)
            assert_near(found["pooled"], encoder(image), 1e-4)

    model = onnx.load(path)
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert facts == {
        "patch_size": 16, "channels": 3, "bands": ["B4", "B3", "B2"], "missing": [0],
        "statistics": {"l2a": {"mean": [1, 2, None], "std": [1, 0.5, None]}},
    }  # fmt: skip
    (image,) = model.graph.input
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["batch", 3, "16*rows", "16*columns"]
    assert b".py" not in path.read_bytes()  # no traces of source files, which name paths of this machine


def test_lists_of_maps_have_an_output_each(generator: torch.Generator, tmp_path: Path) -> None:
    encoder = FeatureEncoder(3, DEPTHS, DIMS, 8, out_indices=(0, 2))
    randomise(encoder, generator)
    found = run(export_onnx(encoder, tmp_path / "encoder.onnx"), image := torch.randn(1, 3, 40, 24, generator=generator))
    with torch.no_grad():
        for name, expected in zip(("stage0", "stage2"), encoder(image), strict=True):
            assert_near(found[name], expected, 1e-4, name)


def test_a_file_whose_numbers_differ_is_not_written(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, path = DenseEncoder(3, DEPTHS, DIMS, num_classes=5), tmp_path / "encoder.onnx"
    randomise(encoder, generator)
    path.write_bytes(b"earlier")
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="features of the ONNX file differs by"):
        export_onnx(encoder, path)
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == [(path, b"earlier")]


def test_what_cannot_be_exported_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = DenseEncoder(3, DEPTHS, DIMS)
    with pytest.raises(UsageError, match="there is no folder"):
        export_onnx(encoder, tmp_path / "absent" / "encoder.onnx")
    monkeypatch.setattr(exporting, "LIMIT", 1000)
    with pytest.raises(UsageError, match="at most 2 GiB"):
        export_onnx(encoder, tmp_path / "encoder.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'mmearth-ray\[onnx\]'"):
        export_onnx(encoder, tmp_path / "encoder.onnx")
