"""The encoders that are compared: pretrained here or elsewhere, random, of timm, or plain statistics of the bands.

A `Subject` says what an encoder is, is small and travels to tasks; `build` makes the module of it.

Shapes: B images, C bands, H x W pixels, D features.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from mmearth_ray.checkpoints.folder import EXPORTED
from mmearth_ray.checkpoints.load import load_encoder
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.features.timm_models import TimmEncoder, timm_encoder
from mmearth_ray.modalities import DEFAULT_INPUT, get
from mmearth_ray.model.dense import DenseEncoder, build_dense
from mmearth_ray.model.encoder import PATCH_SIZES, SIZES, Stem
from mmearth_ray.model.mpmae import initialise
from mmearth_ray.model.normalise import Statistics

Kind = Literal["pretrained", "random", "timm", "statistics"]

FORMS = "a run, its exported model or a checkpoint, random:SIZE/PATCH[/SEED], timm:MODEL=FILE, timm:MODEL=random or statistics"

COLOURS = ("B4", "B3", "B2")
"""Red, green and blue, in the order in which ImageNet's models take them (10 m bands of the Sentinel-2 user handbook)."""

CELL = 8
"""Pixels along the side of a cell in maps of statistics: the smallest patch of our encoders."""


@dataclass(frozen=True)
class Structure:
    """The layers of an encoder: `timm` names a model of that library, otherwise it is a ConvNeXt V2 of ours."""

    depths: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    stem: str = ""
    timm: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An encoder that is judged.

    `digest` covers structure, bands, statistics and every weight: equal digests mean equal features.  `bands` are identities
    as in `TaskInfo`, in the order of the channels, empty for "statistics", which takes what there is.  `missing` and
    `statistics` are those of pretraining, in its units.  `patch`: pixels along the side of a cell of the last map.  `width`:
    features D, 0 for "statistics" (two per band).  `parameters`: numbers that are learnt.  `size`: the published name of the
    structure, or timm's.  `seed`: of random weights.  `weights`: the full path of what is loaded, empty where nothing is.
    """

    name: str
    spec: str
    kind: Kind
    digest: str
    bands: tuple[str, ...]
    missing: tuple[float, ...]
    patch: int
    width: int
    parameters: int
    size: str | None
    statistics: Statistics | None
    seed: int | None
    structure: Structure
    weights: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class ImageEncoder(Protocol):
    """What `build` gives: `DenseEncoder` or `TimmEncoder`, in eval mode.

    `dims`: channels of the maps; `width` = D; `patch_size`: pixels along the side of a cell of the last one.
    """

    dims: tuple[int, ...]
    width: int
    patch_size: int

    def maps(self, image_BCHW: Tensor) -> list[Tensor]:
        """Features after each stage, (B, dims[i], H_i, W_i)."""
        ...

    def forward_features(self, image_BCHW: Tensor) -> Tensor:
        """Those of the last stage, (B, D, H / patch, W / patch)."""
        ...

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Pooled, (B, D)."""
        ...


def open_subject(spec: str, name: str = "") -> Subject:
    """What `spec` names, one of `FORMS`; `name` is what reports call it.

    The weights of timm's models are local files; `timm:MODEL=random[/SEED]` has fresh ones.  `twin:SEED:SPEC` is
    `random_twin` of another.  Raises UsageError for what is none of these, DataError for weights that cannot be used.
    """
    prefix, colon, rest = spec.partition(":")
    if spec == "statistics":
        found = _statistics()
    elif colon and prefix in _OPENERS:
        found = _OPENERS[prefix](rest, spec)
    else:
        found = _pretrained(spec)
    return replace(found, name=name) if name else found


def random_twin(subject: Subject, seed: int) -> Subject:
    """The same structure, bands and statistics with fresh weights of that seed: the baseline of the subject's size.

    Raises UsageError for what has no weights.
    """
    if subject.kind == "statistics":
        raise UsageError("statistics of bands have no weights, so no random encoder is like them; name an encoder")
    name, spec = f"random-{subject.size or 'x'.join(map(str, subject.structure.dims))}-{subject.patch}", subject.spec
    if subject.structure.timm:
        name, spec = f"random-{subject.structure.timm}", f"timm:{subject.structure.timm}=random/{seed}"
    elif spec.startswith("random:"):
        spec = f"random:{subject.size}/{subject.patch}/{seed}"
    else:
        spec = f"twin:{seed}:{re.sub('^twin:[0-9]+:', '', spec)}"
    return _completed(replace(subject, name=name, spec=spec, kind="random", seed=seed, weights=""))


def build(subject: Subject) -> nn.Module:
    """The encoder with its weights, on the CPU, in eval mode; see `ImageEncoder`.

    Raises UsageError for "statistics", which is no module, DataError where the weights are no longer those that were opened.
    """
    module = _module(subject)
    found = _digest(subject, module)
    if found != subject.digest:
        raise DataError(
            f"the weights of encoder '{subject.name}' ({subject.weights or subject.spec}) are no longer those that it was "
            f"opened with ({found[:16]}, not {subject.digest[:16]}); run the command again"
        )
    return module


def _module(subject: Subject) -> nn.Module:
    structure, channels = subject.structure, len(subject.bands)
    if subject.kind == "statistics":
        raise UsageError("statistics of bands are no module; name an encoder to build")
    with torch.random.fork_rng(devices=[]):  # layers draw weights when they are made, which nobody else is to notice
        if structure.timm:
            module = timm_encoder(structure.timm, channels, subject.weights, subject.seed)
        elif subject.kind == "pretrained":
            module = load_encoder(subject.weights)
        else:
            module = _fresh(structure, channels, subject.patch, subject.seed or 0)
    return module.eval()


def _fresh(structure: Structure, channels: int, patch: int, seed: int) -> DenseEncoder:
    """Weights drawn as those that a pretraining starts from."""
    made = build_dense(channels, structure.depths, structure.dims, patch, cast(Stem, structure.stem), None,
                       num_classes=0, features_only=False, out_indices=None)  # fmt: skip
    initialise(nn.ModuleDict({"encoder": made}), "uniform", torch.Generator().manual_seed(seed))
    return cast(DenseEncoder, made)


def _pretrained(spec: str) -> Subject:
    path = Path(spec).expanduser()
    if path.suffix == ".pth":
        raise UsageError(
            f"{spec} is a published checkpoint; import it first: python -m mmearth_ray.checkpoints import {spec} OUT"
        )
    if not path.is_dir():
        raise UsageError(f"there is no encoder '{spec}', nor a folder of that name; name {FORMS}")
    place = path.resolve()
    with torch.random.fork_rng(devices=[]):
        d = load_encoder(place).description
    own = d.input == DEFAULT_INPUT
    return _completed(Subject(
        name=place.parent.name if place.name == EXPORTED else place.name, spec=spec, kind="pretrained", digest="",
        bands=tuple(band if own else f"{d.input}.{band}" for band in d.bands), missing=tuple(d.missing), patch=d.patch_size,
        width=d.dims[-1], parameters=0, size=d.size, statistics=d.statistics, seed=None,
        structure=Structure(tuple(d.depths), tuple(d.dims), d.stem), weights=str(place),
    ))  # fmt: skip


def _random(rest: str, spec: str) -> Subject:
    found = re.fullmatch(r"([a-z]+)/([0-9]+)(?:/([0-9]+))?", rest)
    if not found or found[1] not in SIZES or int(found[2]) not in PATCH_SIZES:
        raise UsageError(
            f"'{spec}' must be random:SIZE/PATCH or random:SIZE/PATCH/SEED, with a size of {', '.join(SIZES)} and a patch of "
            f"{', '.join(map(str, PATCH_SIZES))}"
        )
    size, patch, seed, entry = found[1], int(found[2]), int(found[3] or 0), get(DEFAULT_INPUT).default_bands()
    return _completed(Subject(
        name=f"random-{size}-{patch}", spec=spec, kind="random", digest="", bands=entry.bands, missing=entry.missing,
        patch=patch, width=SIZES[size].dims[-1], parameters=0, size=size, statistics=None, seed=seed,
        structure=Structure(*SIZES[size], "modified"),
    ))  # fmt: skip


def _timm(rest: str, spec: str) -> Subject:
    model, _, source = rest.partition("=")
    if not model or not source:
        raise UsageError(
            f"'{spec}' names no weights, and none are downloaded: timm:{model or 'MODEL'}=FILE.safetensors (or .pth), or "
            f"timm:{model or 'MODEL'}=random for fresh ones"
        )
    fresh = re.fullmatch(r"random(?:/([0-9]+))?", source)
    path = "" if fresh else str(Path(source).expanduser().resolve())
    seed = int(fresh[1] or 0) if fresh else None
    return _completed(Subject(
        name=f"random-{model}" if fresh else model, spec=spec, kind="random" if fresh else "timm", digest="", bands=COLOURS,
        missing=(), patch=0, width=0, parameters=0, size=model, statistics=None, seed=seed, structure=Structure(timm=model),
        weights=path,
    ))  # fmt: skip


def _twin(rest: str, spec: str) -> Subject:
    seed, _, other = rest.partition(":")
    if not seed.isdecimal() or not other:
        raise UsageError(f"'{spec}' must be twin:SEED:SPEC, with SPEC {FORMS}")
    return random_twin(open_subject(other), int(seed))


def _statistics() -> Subject:
    return Subject(
        name="statistics", spec="statistics", kind="statistics", digest=hashlib.sha256(b"mean, std; version 1").hexdigest(),
        bands=(), missing=(), patch=CELL, width=0, parameters=0, size=None, statistics=None, seed=None, structure=Structure(),
    )  # fmt: skip


_OPENERS = {"random": _random, "timm": _timm, "twin": _twin}


def _completed(subject: Subject) -> Subject:
    """With what only the module itself tells."""
    module = cast(DenseEncoder | TimmEncoder, _module(subject))
    structure = replace(subject.structure, dims=tuple(module.dims))
    subject = replace(subject, patch=module.patch_size, width=module.width, structure=structure,
                      parameters=sum(p.numel() for p in module.parameters()))  # fmt: skip
    return replace(subject, digest=_digest(subject, module))


def _digest(subject: Subject, module: nn.Module) -> str:
    """Hex digest of all that decides what features come out."""
    known: dict[str, Any] = {
        "structure": asdict(subject.structure), "patch": subject.patch, "bands": subject.bands, "missing": subject.missing,
        "statistics": subject.statistics,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
