"""The exported model: a folder with all that is needed to use an encoder, whoever trained it.

    encoder.safetensors      float32 weights of the encoder: an ordinary dense ConvNeXt V2, by published names
    pretraining.safetensors  the rest of the pretraining model: decoder, heads, weights of the losses
    config.json              `Description`: structure, bands, units, normalisation, recipe, digests
    README.md                the model card: the same for people
    patch-N/                 of a model for several image sizes: the same files of each of its other sizes, by itself

Training writes it, importing a published checkpoint writes it, and everything that takes weights reads it.  A checkpoint of
a run (`model.safetensors` and `state.json`) holds the same and may stand in its place.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmearth_ray.checkpoints.card import model_card
from mmearth_ray.errors import DataError
from mmearth_ray.files import complete_or_absent_folder
from mmearth_ray.modalities import PRODUCTS
from mmearth_ray.model.encoder import PATCH_SIZES
from mmearth_ray.objective import ENCODER, SIZES

FORMAT = 2
ENCODER_FILE, PRETRAINING_FILE, CONFIG, CARD = "encoder.safetensors", "pretraining.safetensors", "config.json", "README.md"
EXPORTED = "exported"  # of a run
CHECKPOINT_FILE, STATE = "model.safetensors", "state.json"
INDEX = ".index.json"  # ending of the list of the files that hold what is too much for one


@dataclass(frozen=True)
class Description:
    """What an exported model is.

    `size` is null for a structure that is none of the published ones.  `statistics[product]` holds "mean" and "std" of every
    band, null where there is none; it is null as a whole where nobody knows them.  `target_bands` names the bands of every
    target that has some to choose.  `origin` says where the weights come from: a run's settings, digests and versions, or the
    arguments of the published run.  `image_sizes`: all that steps took in turn, in as many patches as `image_size` has of
    `patch_size`; empty for that size alone.
    """

    size: str | None
    depths: list[int]
    dims: list[int]
    patch_size: int
    image_size: int
    stem: str
    grn: str
    input: str
    bands: list[str]
    units: list[str]
    missing: list[int]
    statistics: dict[str, dict[str, list[float | None]]] | None
    targets: list[str]
    target_bands: dict[str, list[str]]
    normalise_targets: list[str]
    weighting: str
    decoder_width: int
    decoder_depth: int
    step: int | None = None
    tiles_seen: int | None = None
    data_set: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    image_sizes: list[int] = field(default_factory=list)

    @property
    def others(self) -> dict[int, int]:
        """Image sizes beside `image_size`, px, and the patch of each."""
        sizes = [size for size in dict.fromkeys(self.image_sizes) if size != self.image_size]
        return {size: self.patch_size * size // self.image_size for size in sizes}

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, found: Any, where: Path) -> "Description":
        """Raises DataError, naming what is missing, for JSON that is no such description."""
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            given = found.get("format") if isinstance(found, dict) else None
            raise DataError(
                f"{where} has format {given}, this version reads {FORMAT}; run the command that made it again (a finished "
                "pretraining run only rewrites its export)"
            )
        names = [f.name for f in fields(cls)]
        found = {"image_sizes": [], **found}  # a key that came later
        absent = [name for name in names if name not in found]
        if absent:
            raise DataError(f"{where} lacks {', '.join(absent)}; make the folder again")
        description = cls(**{name: found[name] for name in names})
        wrong = description.first_problem()
        if wrong:
            raise DataError(f"{where}: {wrong}; make the folder again")
        return description

    def first_problem(self) -> str | None:
        """What cannot be used, of types and lengths."""
        texts = {"stem": self.stem, "grn": self.grn, "input": self.input, "weighting": self.weighting}
        numbers = {"patch_size": self.patch_size, "image_size": self.image_size, "decoder_width": self.decoder_width,
                   "decoder_depth": self.decoder_depth}  # fmt: skip
        lists = {"depths": (self.depths, int), "dims": (self.dims, int), "bands": (self.bands, str), "units": (self.units, str),
                 "missing": (self.missing, int), "targets": (self.targets, str),
                 "normalise_targets": (self.normalise_targets, str), "image_sizes": (self.image_sizes, int)}  # fmt: skip
        wrong = [name for name, value in texts.items() if not isinstance(value, str)]
        wrong += [name for name, value in numbers.items() if not isinstance(value, int)]
        wrong += [name for name, (value, kind) in lists.items() if not _is_list_of(kind, value)]
        if wrong:
            return f"{wrong[0]} has no value of its kind"
        if not self.bands or len(self.depths) != len(self.dims) or not self.dims:
            return "it names no band, or depths and dims of different lengths"
        if self.image_sizes and (self.image_size < 1 or any(p not in PATCH_SIZES for p in self.others.values())):
            return f"image_sizes {self.image_sizes} are none of {self.image_size} px in patches of {self.patch_size}"
        for product, values in (self.statistics or {}).items():
            for part in ("mean", "std"):
                if len(values.get(part, ())) != len(self.bands):
                    return f"statistics of {product} have no {part} for each of {len(self.bands)} bands"
        return None


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


@dataclass(frozen=True)
class Exported:
    """An exported model, or a checkpoint of a run, on disk."""

    folder: Path
    description: Description
    weights: tuple[Path, ...]

    def tensors(self) -> dict[str, Tensor]:
        """All weights, by their names in the pretraining model: `model.encoder...`, `model.decoder...`, `log_variances`."""
        found: dict[str, Tensor] = {}
        for path in self.weights:
            prefix = ENCODER if path.name == ENCODER_FILE else ""
            found |= {prefix + name: tensor for name, tensor in read_tensors(path).items()}
        return found

    def encoder_tensors(self) -> dict[str, Tensor]:
        """Weights of the encoder, by its own names.  Nothing else is read, except from a checkpoint."""
        if self.weights[0].name == ENCODER_FILE:
            return read_tensors(self.weights[0])
        tensors = self.tensors()
        return {name.removeprefix(ENCODER): t for name, t in tensors.items() if name.startswith(ENCODER)}

    def pretraining_tensors(self) -> dict[str, Tensor]:
        """All weights, for uses that need the decoder too.  Raises DataError where only the encoder was kept."""
        tensors = self.tensors()
        if all(name.startswith(ENCODER) for name in tensors):
            raise DataError(f"{self.folder} holds the encoder only ({PRETRAINING_FILE} is not there); name a folder with both")
        return tensors


def open_exported(path: Path) -> Exported:
    """The exported model at `path`: its folder, the run that holds it, or a checkpoint.  Raises DataError if there is none."""
    for folder in (path, path / EXPORTED):
        if (folder / CONFIG).is_file() and (folder / ENCODER_FILE).is_file():
            files = tuple(folder / name for name in (ENCODER_FILE, PRETRAINING_FILE) if (folder / name).is_file())
            return Exported(folder, Description.from_json(_read_json(folder / CONFIG), folder / CONFIG), files)
    files = files_of(path, CHECKPOINT_FILE)
    if (path / STATE).is_file() and files:
        found = _read_json(path / STATE)
        description = Description.from_json(found.get("description") if isinstance(found, dict) else None, path / STATE)
        return Exported(path, description, files)
    raise DataError(
        f"{path} is no exported model: there is neither {ENCODER_FILE} with {CONFIG}, in it or in its folder '{EXPORTED}', nor "
        f"a checkpoint ({CHECKPOINT_FILE} with {STATE})"
    )


def files_of(folder: Path, file: str) -> tuple[Path, ...]:
    """The files that hold what `file` names: it alone, or those that its index lists; none where there is neither.

    Raises DataError for an index that cannot be read.
    """
    index = folder / f"{file}{INDEX}"
    if not index.is_file():
        return (folder / file,) if (folder / file).is_file() else ()
    found = _read_json(index)
    try:
        return tuple(folder / name for name in dict.fromkeys(found["weight_map"].values()))
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{index} is no index of safetensors files") from error


def parts_of(names: Iterable[str], file: str) -> list[str]:
    """Of the names in a folder, on a store too, those that hold what `file` names; it alone where there is none."""
    return [name for name in names if name.startswith(file.partition(".")[0])] or [file]


def write_exported(folder: Path, description: Description, tensors: Mapping[str, Tensor]) -> Path:
    """Write an exported model: it appears whole, in place of what had its name.

    `tensors`: by their names in the pretraining model; of one for a single image size the encoder alone is enough.  Raises
    DataError if the disk does not take it.
    """
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    with complete_or_absent_folder(folder) as incoming:
        _write(incoming, description, plain)
        for size, patch in description.others.items():
            (incoming / size_folder(patch)).mkdir()
            _write(incoming / size_folder(patch), *alone(description, plain, size))
    return folder


def size_folder(patch_size: int) -> str:
    """Where an exported model keeps that of another patch size."""
    return f"patch-{patch_size}"


def alone(description: Description, tensors: Mapping[str, Tensor], image_size: int) -> tuple[Description, dict[str, Tensor]]:
    """The model of one of its image sizes as if it were trained for no other: its description and weights."""
    patch_size = description.others.get(image_size, description.patch_size)
    own = f"{SIZES}{patch_size}."
    shared = {name: t for name, t in tensors.items() if not name.startswith(SIZES)}
    renamed = {f"model.{name.removeprefix(own)}": t for name, t in tensors.items() if name.startswith(own)}
    return replace(description, image_size=image_size, patch_size=patch_size, image_sizes=[]), shared | renamed


def _write(folder: Path, description: Description, tensors: Mapping[str, Tensor]) -> None:
    encoder = {name.removeprefix(ENCODER): t for name, t in tensors.items() if name.startswith(ENCODER)}
    rest = {name: t for name, t in tensors.items() if not name.startswith(ENCODER)}
    text = json.dumps(description.to_json(), indent=1, allow_nan=False)
    save_tensors(encoder, folder / ENCODER_FILE, {"mmearth_ray": text})
    if rest:
        save_tensors(rest, folder / PRETRAINING_FILE)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(description.to_json()), encoding="utf-8")


def statistics_by_product(mean: np.ndarray, std: np.ndarray) -> dict[str, dict[str, list[float | None]]]:
    """Mean and deviation of bands, float32 (products, bands) with NaN where unknown, as a description holds them."""
    return {product: {"mean": _numbers(mean[row]), "std": _numbers(std[row])} for row, product in enumerate(PRODUCTS)}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with the permissions of other files.  Raises OSError if the disk does not take it."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    if path.stat().st_mode != mode:  # safetensors leaves it to its owner alone
        path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file, on the CPU.  Raises DataError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
