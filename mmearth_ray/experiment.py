"""An experiment: a configuration resolved against its data set, ready to travel to the workers.

Everything that can be wrong with the settings or the data set is found here, before a worker starts.
"""

import dataclasses
import hashlib
import json
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mmearth_ray import __version__, settings
from mmearth_ray.config import (
    FIXED_ON_RESUME,
    FREE_ON_RESUME,
    input_of,
    micro_batch_of,
    most_workers,
    normalised_targets,
    numbers_know_micro_batch,
    steps_of,
    targets_of,
    turns_of,
    visible_patches,
)
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.keys import Config
from mmearth_ray.modalities import Kind, Missing, table_hash
from mmearth_ray.model.encoder import Backend, Stem, sparse_layout
from mmearth_ray.model.layers import Scope
from mmearth_ray.model.mpmae import MPMAE, build_mpmae, initialise
from mmearth_ray.objective import Objective, Weighting
from mmearth_ray.patience import Patience
from mmearth_ray.shards.manifest import Manifest, joint_statistics, load_manifest, training_counts
from mmearth_ray.shards.stats import Statistics, checked, normalisation, require_statistics
from mmearth_ray.storage import Location, locate
from mmearth_ray.stream.cache import Cache
from mmearth_ray.stream.metadata import Metadata
from mmearth_ray.stream.prepare import SampleSpec
from mmearth_ray.stream.select import NothingSelected
from mmearth_ray.stream.shard import Reading
from mmearth_ray.stream.source import Source, open_source


@dataclass(frozen=True, eq=False)
class Experiment:
    """A resolved run: `config.train.steps` is set, the samples are chosen, every band in use can be normalised.

    `statistics[name]`: mean and std, float32 (products, bands) each.  `identity`: digests that a resumed run must share.
    `claim`: what the group of workers is known by that keeps checkpoints in their folder; empty where none looks
    (`train.ownership`).
    """

    config: Config
    source: Source
    held_out: Source | None
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    identity: dict[str, str]
    claim: str = ""

    @property
    def spec(self) -> SampleSpec:
        return self.source.spec

    def spec_of(self, step: int) -> SampleSpec:
        """What samples are like at a step: of `spec`, unless image sizes take turns."""
        return self.source.spec_at((step - 1) * self.config.train.global_batch)

    @property
    def steps(self) -> int:
        assert self.config.train.steps is not None
        return self.config.train.steps

    @property
    def last_step(self) -> int:
        """The step after which this call ends."""
        return min(self.steps, self.config.train.stop_at or self.steps)

    @property
    def run(self) -> Path:
        return Path(self.config.run.directory)


def open_experiment(config: Config, *shards: Location) -> Experiment:
    """Resolve a configuration against the data sets at `shards`.  Raises UsageError and DataError, as they apply."""
    config = _anchored(config)
    sparse_layout(cast(Backend, config.model.backend))
    manifests = [load_manifest(place.resolve() if isinstance(place, Path) else place) for place in shards]
    entry, targets = input_of(config), targets_of(config)
    modalities = (*targets, entry)
    statistics = load_statistics(config.data.statistics, manifests)
    origin = "the manifest" if config.data.statistics == "manifest" else f"data.statistics={config.data.statistics}"
    require_statistics(statistics, training_counts(manifests), modalities, origin)
    arrays = {m.name: normalisation(statistics, m) for m in modalities if m.kind is Kind.CONTINUOUS}
    if not np.isfinite(arrays[entry.name][0]).any():
        raise DataError(
            f"{origin} has no statistics of the input {entry.name}: {_places(manifests)} has no tile of split 'train' with "
            "valid values of it; use data.statistics=release or a JSON file"
        )
    patches = (config.model.image_size // config.model.patch_size) ** 2
    spec = SampleSpec(
        seed=config.seed, image_size=config.model.image_size, patch_size=config.model.patch_size,
        visible=visible_patches(patches, config.model.mask_ratio), input=entry, targets=targets,
        normalise_targets=frozenset(normalised_targets(config)),
        missing=cast(Missing, config.model.missing),
        known={name: np.isfinite(mean) for name, (mean, _) in arrays.items()},
    )  # fmt: skip
    data, reading = config.data, reading_of(config)
    metadata = [Metadata(manifest, reading) for manifest in manifests]
    source = open_source(
        manifests, data.where, spec, weights=data.weights, window=data.shuffle_window, reading=reading, metadata=metadata,
        turns=[dataclasses.replace(spec, image_size=i, patch_size=p) for i, p in turns_of(config.model)],
        turn=config.train.global_batch,
    )  # fmt: skip
    return Experiment(
        config=_with_steps(config, source.samples),
        source=source,
        held_out=_held_out(config, manifests, spec, reading, metadata),
        statistics=arrays,
        identity={
            "data": _digest_of_sets(manifests),
            "table": table_hash(),
            "samples": _digest(*(array for tiles in source.sets for array in tiles.selection.arrays)),
            "statistics": _digest(*(array for name in sorted(arrays) for array in arrays[name])),
        },
    )


def _anchored(config: Config) -> Config:
    """The configuration with absolute paths, since workers have other working directories, and targets in table order."""
    run = dataclasses.replace(config.run, directory=str(Path(config.run.directory).expanduser().resolve()))
    init = str(Path(config.model.init).expanduser().resolve()) if config.model.init else ""
    model = dataclasses.replace(config.model, init=init, targets=[m.name for m in targets_of(config)])
    cache = str(Path(config.data.cache).expanduser().resolve()) if config.data.cache else ""
    kept = locate(config.checkpoint.directory, "checkpoint.directory") if config.checkpoint.directory else ""
    checkpoint = dataclasses.replace(config.checkpoint, directory=str(kept.resolve() if isinstance(kept, Path) else kept))
    data = dataclasses.replace(config.data, cache=cache)
    task = str(Path(config.eval.task).expanduser().resolve()) if config.eval.task else ""
    evaluated = dataclasses.replace(config.eval, task=task)
    return dataclasses.replace(config, run=run, model=model, data=data, checkpoint=checkpoint, eval=evaluated)


def _digest(*arrays: np.ndarray) -> str:
    """SHA-256 of the arrays' types, shapes and bytes."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _with_steps(config: Config, samples: int) -> Config:
    train = dataclasses.replace(config.train, steps=steps_of(config.train, samples), epochs=None)
    return dataclasses.replace(config, train=train)


def _held_out(
    config: Config, manifests: list[Manifest], spec: SampleSpec, reading: Reading, metadata: list[Metadata]
) -> Source | None:
    """The held-out tiles, or none where the data sets have none or validation is off."""
    if not config.validate.tiles:
        return None
    try:
        where = config.data.validate_where
        return open_source(
            manifests, where, spec, key="data.validate_where", reading=reading, metadata=metadata, skip_empty=True
        )
    except NothingSelected:
        return None


def reading_of(config: Config) -> Reading:
    """How shards are read.  Raises DataError if the cache cannot be written."""
    data = config.data
    cache = Cache(Path(data.cache), int(data.cache_gb * 1e9)) if data.cache else None
    if cache:
        cache.check()
    return Reading(Patience(data.attempts, seconds=config.train.hang_timeout / 3), cache)


def _places(manifests: list[Manifest]) -> str:
    return " and ".join(str(manifest.directory) for manifest in manifests)


def _digest_of_sets(manifests: list[Manifest]) -> str:
    """The digest of the data set, or one over those of several, in their order."""
    digests = [manifest.digest for manifest in manifests]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def load_statistics(choice: str, manifests: list[Manifest]) -> Statistics:
    """The statistics that `data.statistics` names.  Raises DataError if there are none or the file cannot be read.

    Those of several manifests are over the training tiles of all of them together.
    """
    if choice == "manifest":
        return joint_statistics(manifests)
    if choice == "release":
        if len(manifests) > 1:
            raise DataError(f"data.statistics=release: {_places(manifests)} have statistics of their own each; use "
                            "data.statistics=manifest or a JSON file")  # fmt: skip
        (manifest,) = manifests
        if manifest.release_statistics is None:
            raise DataError(f"{manifest.directory} carries no release statistics; use data.statistics=manifest")
        return manifest.release_statistics
    try:
        loaded = json.loads(Path(choice).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data.statistics={choice}: cannot be read ({error}); use manifest, release or a JSON file") from error
    found = loaded.get("statistics", loaded) if isinstance(loaded, dict) else loaded
    return checked(found, f"data.statistics={choice}")


def build_model(config: Config, backend: Backend) -> MPMAE:
    """The model of a configuration, as PyTorch fills it."""
    model = config.model
    others = dict.fromkeys(patch for _, patch in turns_of(model) if patch != model.patch_size)
    return build_mpmae(
        size=model.size, in_channels=len(input_of(config).bands), image_size=model.image_size, patch_size=model.patch_size,
        targets=targets_of(config), stem=cast(Stem, model.stem), grn=cast(Scope, model.grn), backend=backend,
        decoder_width=model.decoder_width, decoder_depth=model.decoder_depth, others=tuple(others),
    )  # fmt: skip


def build_objective(experiment: Experiment, *, initial: bool = True) -> Objective:
    """The model with its initial weights (unless told not to), its normaliser and its losses: the same on every worker."""
    model, spec = experiment.config.model, experiment.spec
    network = build_model(experiment.config, cast(Backend, model.backend))
    if initial:
        initialise(network, model.init_scheme, torch.Generator().manual_seed(experiment.config.seed))
    return Objective(
        network,
        input=spec.input,
        targets=spec.targets,
        statistics={
            name: (torch.from_numpy(mean), torch.from_numpy(std)) for name, (mean, std) in experiment.statistics.items()
        },
        normalise_targets=spec.normalise_targets,
        missing=spec.missing,
        weighting=cast(Weighting, model.weighting),
    )


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings that a run keeps for its whole life, by dotted name.

    The micro-batch is one of them where it is what GRN or a loss runs over.
    """
    fixed = {
        name: value
        for name, value in settings.flatten(config).items()
        if name.startswith(FIXED_ON_RESUME) and name not in FREE_ON_RESUME
    }
    if numbers_know_micro_batch(config):
        fixed["train.micro_batch"] = micro_batch_of(config, most_workers(config))
    return fixed


def check_resume(experiment: Experiment, found: dict[str, Any], identity: dict[str, str], where: Path) -> None:
    """Raise UsageError naming the first setting that differs from those the run was started with."""
    before = settings.flatten(Config()) | found  # what an earlier version had no setting for was as the default is
    for name, value in fixed_settings(experiment.config).items():
        if before[name] != value:
            raise UsageError(
                f"{where} was trained with {name}={before[name]}, this command says {value}; "
                "set it back, or start another run with another run.directory"
            )
    meanings = {
        "data": "another data set (data.shards)",
        "table": "another table of modalities",
        "samples": "another choice of tiles (a list that data.where names has changed)",
        "statistics": "other band statistics (data.statistics)",
    }
    for name, digest in experiment.identity.items():
        if identity.get(name) != digest:
            raise UsageError(f"{where} was trained on {meanings[name]}; set it back, or use another run.directory")


def versions() -> dict[str, str]:
    """Versions of what computes, and the commit of this checkout if it is one."""
    found = {name: version(name) for name in ("torch", "ray", "pyarrow", "numpy")}
    return {"mmearth_ray": __version__, "python": platform.python_version(), "commit": _commit(), **found}


@cache
def _commit() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
