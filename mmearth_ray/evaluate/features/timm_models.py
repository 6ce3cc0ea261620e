"""timm's models as encoders that are judged: maps stage by stage and pooled features, weights from local files only.

timm is an optional package (github.com/huggingface/pytorch-image-models); its API as of version 1.0.31.

Shapes: B images, C channels, H x W pixels, D features.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmearth_ray.errors import DataError, UsageError, one_line

CELLS = 2  # along the side of the last map of the image that a model is tried with

UNTRAINED = ("head.norm.",)
"""What weights may lack: those of ConvNeXt V2 from masked pretraining alone have no norm after the pooling (timm's "fcmae")."""


class TimmEncoder(nn.Module):
    """A convolutional model of timm without its classifier.

    Pooling and what follows it (in ConvNeXt a LayerNorm) are the model's own.  Raises UsageError for a model that gives no
    maps of images of any size, or whose pooled features are not those of its last map.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model: Any = model
        try:
            self.patch_size = int(self.model.feature_info[-1]["reduction"])
            model.eval()  # a batch norm in training would learn from the empty image
            with torch.no_grad():
                image = torch.zeros(1, _channels(model), CELLS * self.patch_size, CELLS * self.patch_size)
                maps, last, pooled = self.maps(image), self.forward_features(image), self(image)
        except Exception as error:  # of any model there is, that was made for something else
            raise UsageError(f"timm's {name} gives no maps of images of any size ({one_line(error, 80)}); name a convolutional "
                             "model, such as convnextv2_atto") from error  # fmt: skip
        self.dims = tuple(int(found.shape[1]) for found in maps)
        self.width = self.dims[-1]
        if last.shape != (1, self.width, CELLS, CELLS) or pooled.shape != (1, self.width):
            raise UsageError(
                f"timm's {name} gives maps {tuple(last.shape[1:])} and features {tuple(pooled.shape[1:])} of an image of "
                f"{image.shape[-1]} px, which do not belong together; name another model, such as convnextv2_atto"
            )

    def maps(self, image_BCHW: Tensor) -> list[Tensor]:
        """Features after each stage, (B, dims[i], H_i, W_i)."""
        return self.model.forward_intermediates(image_BCHW, intermediates_only=True)

    def forward_features(self, image_BCHW: Tensor) -> Tensor:
        """Those of the last stage, (B, D, H / patch, W / patch)."""
        return self.model.forward_features(image_BCHW)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Pooled, (B, D)."""
        return self.model(image_BCHW)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from the input to the output, as timm's layer-wise learning rates take them."""
        own = self.model.group_matcher(coarse)
        return {key: _inside(pattern) for key, pattern in own.items()}


def _inside(pattern: Any) -> Any:
    """Patterns of parameters' names for those of the wrapper."""
    if isinstance(pattern, str):
        return pattern.replace("^", r"^model\.", 1)
    return [(_inside(first), *rest) for first, *rest in pattern]


def _channels(model: nn.Module) -> int:
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def timm_encoder(name: str, channels: int, file: str, seed: int | None) -> TimmEncoder:
    """timm's model `name` for images of so many channels, with the weights of a file, or drawn from a seed where that is empty.

    Uses up PyTorch's own generator.  Raises UsageError if timm is absent or has no such model, DataError for weights of
    another one.
    """
    timm = _timm()
    if not timm.is_model(name):
        near = timm.list_models(f"{name.partition('.')[0]}*")[:3] or timm.list_models("convnextv2_*")[:3]
        raise UsageError(f"timm has no model '{name}'; it has {', '.join(near)} and others")
    torch.default_generator.manual_seed(seed or 0)
    model = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    if file:
        _load(model, _read(Path(file)), file)
    return TimmEncoder(model, name)


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("timm", "torchvision"):
            raise
        raise UsageError(f"{error.name} is not installed; encoders of timm need it: pip install timm") from error
    except (ImportError, RuntimeError) as error:  # a torchvision of another build of PyTorch
        raise UsageError(f"timm cannot be loaded ({one_line(error)}); install it and torchvision for this PyTorch") from error


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file of weights, under `model` or `state_dict` where a training run wrote it."""
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there; name a file with the weights of timm's model") from error
    except (OSError, RuntimeError, SafetensorError, EOFError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"{path} cannot be read as weights ({one_line(error, 120)}); name a .safetensors or .pth file"
        ) from error
    except Exception as error:  # pickle's UnpicklingError and whatever a damaged pickle raises
        raise DataError(f"{path} holds no plain weights ({one_line(error, 80)}); name a .safetensors or .pth file") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{path} holds no weights by name; name a .safetensors or .pth file of a model of timm")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def _load(model: Any, state: dict[str, Tensor], file: str) -> None:
    """Give a model its weights.  A classifier is left out; anything else must be just what the model has."""
    classifier = str(model.pretrained_cfg.get("classifier") or "head.fc")
    state = {name: value for name, value in state.items() if not name.startswith(f"{classifier}.")}
    own = model.state_dict()
    wrong = [name for name in own if name not in state and not name.startswith(UNTRAINED)]
    wrong += [name for name in own if name in state and state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        known = model.pretrained_cfg.get("architecture", "this model")
        raise DataError(f"{file} does not hold the weights of timm's {known}: see {', '.join(wrong[:3])}; name a file of it")
    model.load_state_dict(state, strict=False)
