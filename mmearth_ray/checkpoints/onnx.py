"""Encoders for whole images as ONNX files, for runtimes without PyTorch.

Shapes: B images, C bands, D_i channels of stage i.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmearth_ray.errors import UsageError
from mmearth_ray.files import complete_or_absent
from mmearth_ray.model.dense import DenseEncoder
from mmearth_ray.model.features import FeatureEncoder

TOLERANCE = 1e-4  # of outputs, of their largest value or 1
LIMIT = 2**31 - 2**20  # bytes of weights: an ONNX file is one protocol buffer, which ends at 2 GiB
FREE = ("batch", "rows", "columns")  # patches


class _Dense(nn.Module):
    """Both what `forward_features` and what `forward` give."""

    def __init__(self, encoder: DenseEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = ("features", "scores" if encoder.num_classes else "pooled")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x_BDHW = self.encoder.forward_features(image)
        return x_BDHW, self.encoder.forward_head(x_BDHW)


class _Features(nn.Module):
    """The maps of the chosen stages."""

    def __init__(self, encoder: FeatureEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = tuple(f"stage{i}" for i in encoder.feature_info.out_indices)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encoder(image))


def export_onnx(encoder: DenseEncoder | FeatureEncoder, path: str | Path) -> Path:
    """Write an ONNX file that gives what `encoder` gives, for any batch and any size that is whole patches.

    The input "image" is float32 (B, C, height, width), normalised; outputs are "features" and "pooled", or "scores" where
    there are classes, or of a FeatureEncoder "stage0" and so on.  Other sizes are not refused by runtimes: what is over at
    the right and below is left out or fails.  The file's metadata hold bands, patch size, missing values and statistics.

    The file appears under its name only once onnxruntime gives the same numbers with it, for another size than exported
    with.  Raises UsageError where packages or the folder are not there or the weights too large, RuntimeError where numbers
    differ.
    """
    onnx, onnxruntime = _packages()
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    patch = encoder.patch_size
    copied = deepcopy(encoder).to("cpu", torch.float32)
    module = (_Dense(copied) if isinstance(copied, DenseEncoder) else _Features(copied)).eval()
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    if size > LIMIT:
        raise UsageError(f"an ONNX file holds at most 2 GiB; these weights are {size / 2**30:.1f}; export a smaller encoder")
    batch, rows, columns = (torch.export.Dim(name) for name in FREE)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (torch.zeros(2, encoder.in_chans, 2 * patch, 3 * patch),),
            input_names=["image"],
            output_names=module.names,
            dynamic_shapes={"image": {0: batch, 2: patch * rows, 3: patch * columns}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _describe(model, encoder)
    onnx.checker.check_model(model)
    with complete_or_absent(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
        _compare(onnxruntime, temporary, module, encoder.in_chans, patch)
    return path


def onnx_metadata(encoder: DenseEncoder | FeatureEncoder) -> dict[str, str]:
    """What a user of the file must know, as its metadata: text, JSON where it is more than a number."""
    known = {} if encoder.inputs is None else asdict(encoder.inputs)
    facts = {"patch_size": encoder.patch_size, "channels": encoder.in_chans, **known}
    return {name: json.dumps(value, allow_nan=False) for name, value in facts.items() if value is not None}


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise UsageError(f"ONNX files need more packages ({error}): pip install 'mmearth-ray[onnx]'") from error
    return onnx, onnxruntime


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own warnings about its own use of PyTorch."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


def _describe(model: Any, encoder: DenseEncoder | FeatureEncoder) -> None:
    """Metadata of ours into the file; the exporter's traces of source files, which name paths of this machine, out of it."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
    for name, value in onnx_metadata(encoder).items():
        model.metadata_props.add(key=name, value=value)


def _compare(onnxruntime: Any, path: Path, module: Any, channels: int, patch: int) -> None:
    """Raise RuntimeError unless the file gives the module's numbers, for an image of another size and batch."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, channels, 4 * patch, 2 * patch, generator=generator)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(list(module.names), {"image": image.numpy()})
    with torch.no_grad():
        expected = module(image)
    for name, actual, wanted in zip(module.names, found, expected, strict=True):
        off = (torch.from_numpy(actual) - wanted).abs().max().item()
        bound = TOLERANCE * max(1.0, wanted.abs().max().item())
        if not off <= bound:
            raise RuntimeError(f"{name} of the ONNX file differs by {off:.1e}, more than {bound:.1e}; no file was written")
