"""Checkpoints: one form for every engine and number of workers, complete under their name or not there at all.

`checkpoints/step-00000100/` means 100 steps are done and holds `model.safetensors` (float32 weights by name),
`optimizer.safetensors` (AdamW's moments by parameter name) and `state.json` (step, position, settings, digests, versions).
Tensors of more than 1 GiB are several files (see `parts`).  In a directory a checkpoint is written under another name and
renamed (see `commit`).  On an object store, where every file appears whole but no two at once, the state is written last and
removed first: what has none is no checkpoint.  The first worker finds the newest one and hands it on (see `handing`).
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmearth_ray.checkpoints.folder import CHECKPOINT_FILE, STATE, files_of, parts_of
from mmearth_ray.copies import at_hand
from mmearth_ray.errors import DataError
from mmearth_ray.keys import Config
from mmearth_ray.patience import Absent
from mmearth_ray.storage import Location, below, locate, names, read_bytes, remove
from mmearth_ray.train.parts import Stored

FOLDER = "checkpoints"
INCOMING = ".incoming"
MOMENTS_FILE = "optimizer.safetensors"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class State:
    """What a checkpoint says beside its tensors.  `description`: what the model is, as in an exported one.

    `skipped_steps`: those of the steps that were left out, as they were not finite; `skipped_in_a_row`: so many of the last.
    """

    step: int
    position: int
    settings: dict[str, Any]
    identity: dict[str, str]
    versions: dict[str, str]
    description: dict[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


def directory_of(config: Config) -> Location:
    """Where the checkpoints of a run are.  Raises UsageError for a URL that cannot be used."""
    given = config.checkpoint.directory
    return locate(given, "checkpoint.directory") if given else Path(config.run.directory) / FOLDER


def checkpoint_path(folder: Location, step: int) -> Location:
    return folder / f"step-{step:08d}"


def step_of(path: Location) -> int:
    """The steps that are done, by a checkpoint's name."""
    return int(path.name[-8:])


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


def take_away(path: Location) -> None:
    """Take a checkpoint from under its name at once, then delete it: what has the name is always complete."""
    if not isinstance(path, Path):
        remove(path / STATE)
        for name in below(path):
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


@contextmanager
def opened(path: Location, *, moments: bool = True) -> Iterator[tuple[Stored, Stored]]:
    """The checkpoint's weights and moments, on the CPU, each read when it is asked for; none of these if not wanted.

    Raises DataError if they cannot be read.
    """
    wanted = (CHECKPOINT_FILE, MOMENTS_FILE) if moments else (CHECKPOINT_FILE,)
    with ExitStack() as stack:
        try:
            local = stack.enter_context(at_hand(path, [part for file in wanted for part in parts_of(names(path), file)]))
            found = [Stored(files_of(local, file) or (local / file,), stack) for file in wanted]
        except (OSError, SafetensorError, Absent) as error:
            raise DataError(_unreadable(path, error)) from error
        yield found[0], found[1] if moments else Stored((), stack)


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
            take_away(folder / name)
