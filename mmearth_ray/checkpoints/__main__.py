"""python -m mmearth_ray.checkpoints import | export: published checkpoints, timm names and ONNX, to and from our weights."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmearth_ray.commands import Command, Program
from mmearth_ray.errors import DataError, UsageError, run_command
from mmearth_ray.settings import key

SUFFIXES = {".pth": "published", ".onnx": "onnx", ".safetensors": "timm", "": "encoder"}


@dataclass(frozen=True)
class ImportOptions:
    bands: dict[str, list[str]] = key({}, "bands of a modality, as bands.NAME=[...]; by default those of the published run")
    shards: str = key("", "shards converted from the release it was trained on: its band statistics go along")


@dataclass(frozen=True)
class ExportOptions:
    format: str = key(
        "", "published (.pth), encoder (a folder: safetensors, config, model card), model (the same with the decoder), "
        "timm (.safetensors by timm's names), onnx (.onnx); empty: by the suffix of OUT",
        among=("", "published", "encoder", "model", "timm", "onnx"),
    )  # fmt: skip


def _import(places: list[Path], options: ImportOptions) -> int:
    from mmearth_ray.checkpoints.folder import write_exported
    from mmearth_ray.checkpoints.pth import read_pth
    from mmearth_ray.checkpoints.recognise import import_published, with_statistics

    source, out = places[0], _folder_to_write(places[1])
    description, tensors = import_published(read_pth(source), options.bands)
    if options.shards:
        description = with_statistics(description, Path(options.shards))
    write_exported(out, description, tensors)
    size = description.size or f"channels {description.dims}"
    print(f"{out}: ConvNeXt V2 {size}, patch {description.patch_size} px, {description.stem} stem, {len(tensors)} tensors")
    print(f"  input    {description.input}: {', '.join(description.bands)}")
    print(f"  targets  {', '.join(description.targets) or 'none of MMEarth: the encoder alone was imported'}")
    if not description.statistics:
        print("  no statistics: a .pth has none; name the converted release as shards=DIR to keep them with the weights")
    return 0


def _export(places: list[Any], options: ExportOptions) -> int:
    from mmearth_ray.checkpoints.folder import CHECKPOINT_FILE, STATE, open_exported, parts_of
    from mmearth_ray.copies import at_hand
    from mmearth_ray.storage import names

    place, out = places
    form = options.format or SUFFIXES.get(out.suffix)
    if form is None:
        raise UsageError(f"OUT={out}: its suffix is none of .pth, .onnx and .safetensors; name the form as format=...")
    if form not in ("encoder", "model") and (out.is_dir() or not out.parent.is_dir()):
        there = "it is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise UsageError(f"OUT={out}: {there}; format={form} writes a file")
    files = [*parts_of(names(place), CHECKPOINT_FILE), STATE]  # of what is not on this machine, a checkpoint
    with at_hand(place, files) as source:
        exported = open_exported(source)
        if form in ("encoder", "model"):
            out = _folder_to_write(out)
            if out == exported.folder.resolve():
                raise UsageError(f"OUT={out} is the model itself; name another folder")
        _WRITERS[form](exported, out)
    print(f"{out}: written as {form}")
    return 0


def _write_published(exported: Any, out: Path) -> None:
    from mmearth_ray.checkpoints.pth import export_published

    export_published(exported, out)


def _folder_to_write(out: Path) -> Path:
    """`out` itself, absolute.  Raises UsageError where that would replace anything but an exported model."""
    from mmearth_ray.checkpoints.folder import CARD, CONFIG, ENCODER_FILE, PRETRAINING_FILE, size_folder
    from mmearth_ray.model.encoder import PATCH_SIZES

    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise UsageError(f"OUT is a folder to write; {out} is a file")
    ours = {CARD, CONFIG, ENCODER_FILE, PRETRAINING_FILE, *(size_folder(patch) for patch in PATCH_SIZES)}
    others = {p.name for p in out.iterdir()} - ours if out.exists() else set()
    if others:
        raise UsageError(f"OUT={out} holds other things ({min(others)}), which would be lost; name a new folder")
    return out


def _write_encoder(exported: Any, out: Path) -> None:
    from mmearth_ray.checkpoints.assemble import checked_tensors
    from mmearth_ray.checkpoints.folder import alone, write_exported

    description = exported.description
    write_exported(out, *alone(description, checked_tensors(exported, whole=False), description.image_size))


def _write_model(exported: Any, out: Path) -> None:
    from mmearth_ray.checkpoints.assemble import checked_tensors
    from mmearth_ray.checkpoints.folder import write_exported

    write_exported(out, exported.description, checked_tensors(exported, whole=True))


def _write_timm(exported: Any, out: Path) -> None:
    from mmearth_ray.checkpoints.assemble import checked_tensors
    from mmearth_ray.checkpoints.folder import save_tensors
    from mmearth_ray.files import complete_or_absent
    from mmearth_ray.model.timm_names import to_timm
    from mmearth_ray.objective import ENCODER

    encoder = {name.removeprefix(ENCODER): t for name, t in checked_tensors(exported, whole=False).items()}
    try:
        tensors = to_timm(encoder)
    except ValueError as error:
        raise DataError(f"{exported.folder}: {error}") from error
    with complete_or_absent(out) as temporary:
        save_tensors(tensors, temporary, {"bands": ",".join(exported.description.bands)})


def _write_onnx(exported: Any, out: Path) -> None:
    from mmearth_ray.checkpoints.load import load_encoder
    from mmearth_ray.checkpoints.onnx import export_onnx

    export_onnx(load_encoder(exported.folder), out)


_WRITERS = {
    "published": _write_published, "encoder": _write_encoder, "model": _write_model, "timm": _write_timm, "onnx": _write_onnx,
}  # fmt: skip

PROGRAM = Program("python -m mmearth_ray.checkpoints", __doc__ or "", {
    "import": Command(("FILE.pth", "OUT"), "a published MP-MAE checkpoint -> a folder of safetensors, config and model card",
                      lambda: ImportOptions, _import),
    "export": Command(("MODEL", "OUT"), "an exported or imported model, a run or a checkpoint (also its URL) -> another form",
                      lambda: ExportOptions, _export, urls=("MODEL",)),
})  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run one subcommand and return its exit code.  Raises UsageError for a wrong command, argument or setting."""
    return PROGRAM.run(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
