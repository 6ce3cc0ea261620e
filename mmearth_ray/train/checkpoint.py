"""Checkpoints: one form for every engine and number of workers, complete under their name or not there at all.

`checkpoints/step-00000100/` means 100 steps are done and holds `model.safetensors` (float32 weights by name),
`optimizer.safetensors` (AdamW's moments by parameter name) and `state.json` (step, position, settings, digests, versions).
It is written under `checkpoints/.incoming/` and renamed.  Workers find the newest one themselves.
"""

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmearth_ray.errors import DataError

FOLDER = "checkpoints"
INCOMING = ".incoming"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class State:
    """What a checkpoint says beside its tensors."""

    step: int
    position: int
    settings: dict[str, Any]
    identity: dict[str, str]
    versions: dict[str, str]


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def committed(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / FOLDER
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found)


def newest(run: Path) -> Path | None:
    found = committed(run)
    return found[-1] if found else None


def save(run: Path, state: State, weights: dict[str, Tensor], moments: dict[str, Tensor], keep: int) -> Path:
    """Write and commit a checkpoint, then remove all but the newest `keep` (0: none).

    Raises DataError if the disk does not take it; what was committed before stays.
    """
    final = checkpoint_path(run, state.step)
    incoming = run / FOLDER / INCOMING / final.name
    try:
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        save_file(_plain(weights), incoming / "model.safetensors")
        save_file(_plain(moments), incoming / "optimizer.safetensors")
        (incoming / "state.json").write_text(json.dumps(vars(state), indent=1), encoding="utf-8")
        for path in [*incoming.iterdir(), incoming]:
            _flush(path)
        _remove(final)
        incoming.replace(final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(incoming, ignore_errors=True)
        raise DataError(f"cannot write the checkpoint {final}: {error}; free space and run the command again") from error
    if keep:
        for old in committed(run)[:-keep]:
            with suppress(OSError):
                _remove(old)
    return final


def _remove(path: Path) -> None:
    """Take a checkpoint from under its name at once, then delete it: what has the name is always complete."""
    if path.exists():
        doomed = path.parent / INCOMING / f"{path.name}.removed"
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_state(path: Path) -> State:
    """The checkpoint's state.  Raises DataError if it cannot be read."""
    try:
        return State(**json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"the checkpoint {path} cannot be read ({error}); remove it to resume from the one before") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file, on the CPU.  Raises DataError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error


def initial_weights(path: Path) -> dict[str, Tensor]:
    """Weights to start from: a checkpoint directory, an exported directory, or a safetensors file."""
    if path.is_dir():
        for name in ("model.safetensors", "encoder.safetensors"):
            if (path / name).exists():
                return load_tensors(path / name)
        raise DataError(f"model.init={path}: the directory holds neither model.safetensors nor encoder.safetensors")
    if not path.exists():
        raise DataError(f"model.init={path}: there is no such file")
    return load_tensors(path)


def load_initial(module: torch.nn.Module, path: Path, prefix: str) -> list[str]:
    """Copy the weights of `path` that the module has, and return their names.

    An exported encoder's names lack `prefix`.  Heads of other targets are left as initialised; a tensor of another shape
    or a file without any weight of the module is a DataError.
    """
    given = initial_weights(path)
    own = dict(module.named_parameters())
    matched = {}
    for name, tensor in given.items():
        target = name if name in own else prefix + name
        if target in own:
            if own[target].shape != tensor.shape:
                raise DataError(
                    f"model.init={path}: {name} has shape {tuple(tensor.shape)}, this model needs {tuple(own[target].shape)}; "
                    "model.size, model.patch_size, model.stem and bands must agree"
                )
            matched[target] = tensor
    missing = [name for name in own if name.startswith(prefix) and name not in matched]
    if missing:
        raise DataError(f"model.init={path}: {len(missing)} tensors of the encoder are not in it, the first is {missing[0]}")
    with torch.no_grad():
        for name, tensor in matched.items():
            own[name].copy_(tensor)
    return sorted(matched)
