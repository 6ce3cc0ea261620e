"""Checkpoints: one form for every engine and number of workers, complete under their name or not there at all.

`checkpoints/step-00000100/` means 100 steps are done and holds `model.safetensors` (float32 weights by name),
`optimizer.safetensors` (AdamW's moments by parameter name) and `state.json` (step, position, settings, digests, versions).
In a directory it is written under `checkpoints/.incoming/` and renamed.  On an object store, where every file appears whole but
no two at once, the state is written last and removed first: what has none is no checkpoint.  Workers find the newest one
themselves.
"""

import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from upath import UPath

from mmearth_ray.checkpoints.folder import CHECKPOINT_FILE, STATE, read_tensors
from mmearth_ray.config import Config
from mmearth_ray.errors import DataError
from mmearth_ray.files import flush
from mmearth_ray.patience import Absent
from mmearth_ray.storage import Location, at_hand, below, locate, read_bytes, remove, upload

FOLDER = "checkpoints"
INCOMING = ".incoming"
MOMENTS_FILE = "optimizer.safetensors"
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


def directory_of(config: Config) -> Location:
    """Where the checkpoints of a run are.  Raises UsageError for a URL that cannot be used."""
    given = config.checkpoint.directory
    return locate(given, "checkpoint.directory") if given else Path(config.run.directory) / FOLDER


def checkpoint_path(folder: Location, step: int) -> Location:
    return folder / f"step-{step:08d}"


def committed(folder: Location) -> list[Location]:
    """The complete checkpoints in a folder, oldest first.  Raises DataError if its store does not answer."""
    if isinstance(folder, Path):
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    else:
        found = {name.removesuffix(f"/{STATE}") for name in below(folder) if name.endswith(f"/{STATE}")}
    return [folder / name for name in sorted(found) if _NAME.fullmatch(name)]


def newest(folder: Location) -> Location | None:
    found = committed(folder)
    return found[-1] if found else None


def save(folder: Location, state: State, weights: dict[str, Tensor], moments: dict[str, Tensor], keep: int) -> Location:
    """Write and commit a checkpoint, then remove all but the newest `keep` (0: none).

    Raises DataError if the disk or the store does not take it; what was committed before stays.
    """
    final = checkpoint_path(folder, state.step)
    try:
        if isinstance(final, Path):
            _save_locally(final, state, weights, moments)
        else:
            _put(final, state, weights, moments)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write the checkpoint {final}: {error}; free space and run the command again") from error
    if keep:
        for old in committed(folder)[:-keep]:
            with suppress(OSError, DataError):
                _remove(old)
    return final


def _save_locally(final: Path, state: State, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    incoming = final.parent / INCOMING / final.name
    try:
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        _write(incoming, state, weights, moments)
        for path in [*incoming.iterdir(), incoming]:
            flush(path)
        _remove(final)
        incoming.replace(final)
        flush(final.parent)
    except (OSError, SafetensorError):
        shutil.rmtree(incoming, ignore_errors=True)
        raise


def _put(final: UPath, state: State, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    remove(final / STATE)
    with TemporaryDirectory(prefix="mmearth-ray-") as local:
        _write(Path(local), state, weights, moments)
        for name in (CHECKPOINT_FILE, MOMENTS_FILE, STATE):
            upload(Path(local) / name, final / name)


def _write(folder: Path, state: State, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    save_file(_plain(weights), folder / CHECKPOINT_FILE)
    save_file(_plain(moments), folder / MOMENTS_FILE)
    (folder / STATE).write_text(json.dumps(vars(state), indent=1), encoding="utf-8")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _remove(path: Location) -> None:
    """Take a checkpoint from under its name at once, then delete it: what has the name is always complete."""
    if not isinstance(path, Path):
        for name in (STATE, CHECKPOINT_FILE, MOMENTS_FILE):
            remove(path / name)
    elif path.exists():
        doomed = path.parent / INCOMING / f"{path.name}.removed"
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def load_state(path: Location) -> State:
    """The checkpoint's state.  Raises DataError if it cannot be read."""
    try:
        text = read_bytes(path / STATE)
    except Absent as error:
        raise DataError(_unreadable(path, error)) from error
    try:
        return State(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(_unreadable(path, error)) from error


def load_tensors(path: Location) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint's weights and moments, on the CPU.  Raises DataError if they cannot be read."""
    with at_hand(path, (CHECKPOINT_FILE, MOMENTS_FILE)) as local:
        try:
            return read_tensors(local / CHECKPOINT_FILE), read_tensors(local / MOMENTS_FILE)
        except DataError as error:
            raise DataError(_unreadable(path, error.__cause__)) from error


def _unreadable(path: Location, reason: BaseException | None) -> str:
    return f"the checkpoint {path} cannot be read ({reason}); remove it to resume from the one before"


def clear_incoming(folder: Location) -> None:
    """Remove what a kill left of a checkpoint that was being written.  Raises DataError if a store does not answer."""
    if isinstance(folder, Path):
        shutil.rmtree(folder / INCOMING, ignore_errors=True)
        return
    begun = {name.partition("/")[0] for name in below(folder)} - {path.name for path in committed(folder)}
    for name in begun:
        if _NAME.fullmatch(name):
            _remove(folder / name)
