"""Published checkpoints as files: `.pth` of MMEarth-train, read and written.

A `.pth` is a pickle, and a pickle can run code.  It is read by PyTorch's restricted unpickler, which is told of just what
these files hold beside tensors: the run's arguments, an argparse.Namespace in which paths may lie; those become strings.
"""

import argparse
import math
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals, get_unsafe_globals_in_checkpoint

from mmearth_ray.checkpoints.assemble import checked_tensors, input_of
from mmearth_ray.checkpoints.folder import Description, Exported, alone
from mmearth_ray.errors import DataError
from mmearth_ray.files import complete_or_absent
from mmearth_ray.model.published import to_published

OURS = "mmearth_ray"  # the key under which our files hold their description, beside what published ones hold
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")


@dataclass(frozen=True)
class Published:
    """A published checkpoint as read: tensors by published names, and the run's arguments in JSON's types.

    `description`: that of our own model in its JSON form, where we wrote the file.
    """

    state: dict[str, Tensor]
    arguments: dict[str, Any]
    epoch: int | None
    description: dict[str, Any] | None = None


def read_pth(path: Path) -> Published:
    """Raises DataError for a file that cannot be read, that is no such checkpoint, or that holds any other pickled class."""
    try:
        with _only_what_is_known(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's version: what cannot be read is told below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is refused: {_refusal(path)}") from error
    except Exception as error:  # whatever bytes that are no checkpoint make of the unpickler
        raise DataError(f"{path} cannot be read as a PyTorch checkpoint ({_first_line(error)})") from error
    state = found.get("model") if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no state dict under 'model', as published checkpoints do")
    if any(value.layout is not torch.strided for value in state.values()):
        raise DataError(f"{path} holds sparse tensors; published checkpoints hold none")
    if all(str(name).startswith("module.") for name in state):  # saved with the wrapper of data-parallel training
        state = {str(name).removeprefix("module."): value for name, value in state.items()}
    try:
        arguments, ours = _plain(found.get("args")), _plain(found.get(OURS))
    except RecursionError as error:
        raise DataError(f"{path} holds arguments that contain themselves") from error
    epoch = found.get("epoch")
    return Published(
        state={str(name): value for name, value in state.items()},
        arguments=arguments if isinstance(arguments, dict) else {},
        epoch=epoch if isinstance(epoch, int) else None,
        description=ours if isinstance(ours, dict) else None,
    )


@contextmanager
def _only_what_is_known() -> Iterator[None]:
    """The unpickler knows argparse.Namespace and paths, nothing else; then again what it knew before."""
    before = get_safe_globals()
    clear_safe_globals()
    names = [(module, name) for module in ("pathlib", "pathlib._local") for name in PATHS]
    makers = [(_windows_path if "Windows" in name else _path, f"{module}.{name}") for module, name in names]
    add_safe_globals([argparse.Namespace, *makers])
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _path(*parts: str) -> str:
    return str(Path(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _refusal(path: Path) -> str:
    """Which classes and functions the pickle wants beside those that are allowed."""
    try:
        with _only_what_is_known():
            wanted = set(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # another form of file than that function knows
        wanted = set()
    wanted = wanted or _globals_of(path)
    wanted = {name for name in wanted if not name.startswith(("pathlib.", "argparse.Namespace", "torch.", "collections."))}
    named = f"it pickles {', '.join(sorted(wanted))}" if wanted else "it does not follow the rules of such a pickle"
    return f"{named}, and unpickling may run code; only tensors, plain values, argparse.Namespace and paths are read"


def _globals_of(path: Path) -> set[str]:
    """All classes and functions that the pickles in a file name, of whatever protocol, found without running them."""
    found: set[str] = set()
    try:
        for data in _pickles(path):
            strings: list[str] = []
            for code, argument, _ in pickletools.genops(data):
                if code.name == "GLOBAL":
                    found.add(str(argument).replace(" ", "."))
                elif code.name == "STACK_GLOBAL" and len(strings) > 1:
                    found.add(".".join(strings[-2:]))
                elif isinstance(argument, str) and "UNICODE" in code.name:
                    strings.append(argument)
    except Exception:  # a damaged pickle: what was found until then is what there is
        pass
    return {name for name in found if name.isprintable()}


def _pickles(path: Path) -> Iterator[bytes]:
    """The pickle of a zip file, or the stream of pickles of the older form, one after the other."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        return
    data = path.read_bytes()
    while data:
        yield data
        *_, (_, _, last) = pickletools.genops(data)
        data = data[(last or 0) + 1 :]


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(letter for letter in line if letter.isprintable())


def _plain(value: Any) -> Any:
    """The value in JSON's types; what has none (a tensor, a number that is not finite) as text."""
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def export_published(source: Exported, path: Path) -> None:
    """Write the published `.pth` of an exported model; importing it again gives the same, for `image_size` alone.

    The optimizer's state is not in it.  Raises DataError where the decoder is not there or the disk does not take it.
    """
    description, tensors = alone(source.description, checked_tensors(source, whole=True), source.description.image_size)
    origin = description.origin.get("published", {})
    content = {
        "model": to_published(tensors, description.targets),
        "epoch": origin.get("epoch"),
        "args": argparse.Namespace(**origin.get("args", _arguments(description))),
        OURS: description.to_json(),
    }
    with complete_or_absent(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error)) from error


def _arguments(d: Description) -> dict[str, Any]:
    """The arguments that a published run of this model would have had."""
    entry = input_of(d)
    targets = {name: d.target_bands.get(name, "all") for name in d.targets}
    return {
        "model": f"convnextv2_{d.size}", "input_size": d.image_size, "patch_size": d.patch_size,
        "use_orig_stem": d.stem == "original", "norm_pix_loss": bool(d.normalise_targets), "loss_aggr": d.weighting,
        "decoder_depth": d.decoder_depth, "decoder_embed_dim": d.decoder_width,
        "inp_modalities": {entry.name: d.bands}, "out_modalities": targets, "modalities": {entry.name: d.bands} | targets,
    }  # fmt: skip
