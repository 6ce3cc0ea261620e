"""Checkpoints: one form for every engine and number of workers, complete under their name or not there at all.

`checkpoints/step-00000100/` means 100 steps are done and holds `model.safetensors` (float32 weights by name),
`optimizer.safetensors` (AdamW's moments by parameter name) and `state.json` (step, position, settings, digests, versions).
It is written under `checkpoints/.incoming/` and renamed.  Workers find the newest one themselves.
"""

import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmearth_ray.errors import DataError
from mmearth_ray.files import flush

FOLDER = "checkpoints"
INCOMING = ".incoming"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class State:
    """What a checkpoint says beside its tensors.  `description`: what the model is, as in an exported one."""

    step: int
    position: int
    settings: dict[str, Any]
    identity: dict[str, str]
    versions: dict[str, str]
    description: dict[str, Any] = field(default_factory=dict)


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
            flush(path)
        _remove(final)
        incoming.replace(final)
        flush(final.parent)
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


def load_state(path: Path) -> State:
    """The checkpoint's state.  Raises DataError if it cannot be read."""
    try:
        return State(**json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"the checkpoint {path} cannot be read ({error}); remove it to resume from the one before") from error


def clear_incoming(run: Path) -> None:
    """Remove what a kill left of a checkpoint that was being written."""
    shutil.rmtree(run / FOLDER / INCOMING, ignore_errors=True)
