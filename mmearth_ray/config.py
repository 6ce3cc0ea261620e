"""The configuration of a pretraining run: its settings read and checked, and what follows from them.

Resuming compares the fields that `FIXED_ON_RESUME` names.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from mmearth_ray import settings
from mmearth_ray.errors import UsageError
from mmearth_ray.keys import Config, Model, Train
from mmearth_ray.modalities import TABLE, Kind, Level, Modality, Role, get

C = TypeVar("C", bound=Config)

FIXED_ON_RESUME = (
    "model.", "optimizer.", "schedule.", "seed", "train.global_batch", "train.steps", "train.averaging", "train.clip",
    "data.where", "data.weights", "data.shuffle_window",
)  # fmt: skip
"""Prefixes of the settings that a run keeps for its whole life; all others may change when it resumes."""

FREE_ON_RESUME = ("model.init", "model.backend")
"""Settings below those prefixes that change no number after the first step."""

MAX_AUTO_MICRO_BATCH = 64
DEFAULT_STEPS = 300


def load(arguments: list[str]) -> Config:
    """The configuration of a command line: YAML files, later ones winning, then key=value arguments over them all."""
    return load_as(Config, arguments)


def load_as(kind: type[C], arguments: list[str]) -> C:
    """The same, with the keys that a command has beside those of a run."""
    if wrong := next((a for a in arguments if a.startswith(("-", "="))), ""):
        raise UsageError(f"'{wrong}' is not understood; settings are key=value, without dashes and spaces; --help lists them")
    files = [Path(a) for a in arguments if "=" not in a]
    config = settings.load(kind, files, [a for a in arguments if "=" in a])
    check(config)
    return config


def check(config: Config) -> None:
    """Raise UsageError for settings that do not fit each other."""
    model, train = config.model, config.train
    if model.image_size % model.patch_size:
        fits = model.image_size // model.patch_size * model.patch_size or model.patch_size
        raise UsageError(f"model.patch_size={model.patch_size} does not divide model.image_size={model.image_size}; "
                         f"use {fits} px, or another patch size")  # fmt: skip
    turns_of(model)
    _check_directories(config)
    patches = (model.image_size // model.patch_size) ** 2
    visible = visible_patches(patches, model.mask_ratio)
    if not 0 < visible < patches:
        raise UsageError(f"model.mask_ratio={model.mask_ratio} leaves {visible} of {patches} patches visible; "
                         "at least one must be visible and one hidden")  # fmt: skip
    worker_counts(config)
    _check_sets(config)
    if model.backend == "minkowski" and train.gpus:
        raise UsageError("model.backend=minkowski runs on CPUs only; set train.gpus=false or model.backend=packed")
    if model.backend == "triton" and train.gpus is False:
        raise UsageError("model.backend=triton runs on GPUs only; set train.gpus=true or model.backend=packed")
    _check_engine(config)
    if train.steps is not None and train.epochs is not None:
        raise UsageError("give train.steps or train.epochs, not both; =null takes back the one of a file")
    if config.log.tensorboard and not find_spec("tensorboard"):
        raise UsageError("log.tensorboard=true needs a package: pip install 'mmearth-ray[tensorboard]'")
    input_of(config)
    normalised_targets(config)
    _check_evaluation(config)


def _check_directories(config: Config) -> None:
    if not config.run.directory:
        raise UsageError("run.directory= names no directory; give one, such as run.directory=runs/pretrain")
    local = {"run.directory": config.run.directory, "data.cache": config.data.cache, "model.init": config.model.init,
             "eval.task": config.eval.task}  # fmt: skip
    for key, given in local.items():
        if "://" in given:
            instead = "; checkpoints may be in a store: checkpoint.directory=URL" if key == "run.directory" else ""
            raise UsageError(f"{key}={given} is a URL, and this one has to be a path on a disk of the machines{instead}")


def _check_engine(config: Config) -> None:
    train = config.train
    whole = train.engine == "ddp"
    if not whole and find_spec("deepspeed") is None:
        raise UsageError(f"train.engine={train.engine} needs DeepSpeed: pip install deepspeed, or set train.engine=ddp")
    if not whole and config.model.image_sizes:
        raise UsageError(f"train.engine={train.engine} trains all parameters in every step, which model.image_sizes does not; "
                         "set train.engine=ddp or model.image_sizes=[]")  # fmt: skip
    if not whole and train.compile:
        raise UsageError(f"train.compile=true does not work with train.engine={train.engine}; set one of them back")
    if train.compile and train.activation_checkpointing:
        raise UsageError("train.compile=true chooses itself what to compute twice; set train.activation_checkpointing=false")
    if train.offload and train.engine not in ("zero2", "zero3"):
        raise UsageError(f"train.offload=true needs train.engine=zero2 or zero3; it is {train.engine}")
    if train.offload and train.gpus is False:
        raise UsageError("train.offload=true is for GPUs: without them all is in the host's memory; set train.offload=false")


def _check_evaluation(config: Config) -> None:
    if config.eval.label and config.eval.task:
        raise UsageError(f"eval.task={config.eval.task} has labels of its own, and eval.label={config.eval.label} is for "
                         "held-out tiles; give one of them")  # fmt: skip
    label_of(config)
    if config.eval.every and not find_spec("sklearn"):
        raise UsageError(f"eval.every={config.eval.every} needs a package: pip install scikit-learn")


def _check_sets(config: Config) -> None:
    shards, weights = config.data.shards, config.data.weights
    if not shards or "" in shards:
        raise UsageError(f"data.shards={shards}: name at least one directory or URL of shards")
    if weights is not None and len(weights) != len(shards):
        raise UsageError(f"data.weights has {len(weights)} numbers for {len(shards)} data sets in data.shards; give one each")


def turns_of(model: Model) -> list[tuple[int, int]]:
    """Image and patch sizes that steps take in turn, px; empty for one alone.  Raises UsageError for sizes of other grids."""
    fits = {model.image_size * patch // model.patch_size: patch for patch in (8, 16, 32)}
    if model.image_sizes and not {model.image_size} <= set(model.image_sizes) <= set(fits):
        raise UsageError(f"model.image_sizes={model.image_sizes}: must be model.image_size={model.image_size} and others of as "
                         f"many patches of 8, 16 or 32 px, from {', '.join(map(str, fits))} px")  # fmt: skip
    return [(size, fits[size]) for size in model.image_sizes]


def sizes_of(model: Model) -> list[tuple[int, int]]:
    """Image and patch sizes of the steps, px: those that take turns, or the only one."""
    return turns_of(model) or [(model.image_size, model.patch_size)]


def divisors(number: int) -> list[int]:
    """Those of a whole number above 0, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Patches left visible: the whole part of patches x (1 - ratio), as published (19 of 49 at 0.6)."""
    return int(round(patches * (1 - mask_ratio), 6))


def worker_counts(config: Config) -> list[int]:
    """The numbers of workers that a run may have, ascending.  Raises UsageError if there is none."""
    train = config.train
    if len(train.workers) not in (1, 2):
        raise UsageError(f"train.workers={train.workers}: give one number, or [MIN,MAX]")
    if train.workers[0] > train.workers[-1]:
        raise UsageError(f"train.workers={train.workers}: MIN {train.workers[0]} is above MAX {train.workers[-1]}; "
                         f"give [{train.workers[-1]},{train.workers[0]}]")  # fmt: skip
    least, most = train.workers[0], train.workers[-1]
    shown, batch, micro = train.workers if least < most else most, train.global_batch, train.micro_batch or 1
    if not (even := [n for n in divisors(batch) if least <= n <= most]):
        raise UsageError(f"train.global_batch={batch} is not divisible by train.workers={shown}")
    if not (counts := [n for n in even if batch // n % micro == 0]):
        raise UsageError(f"train.micro_batch={micro} does not divide the {batch // even[-1]} tiles that each of "
                         f"{even[-1]} workers takes of train.global_batch={batch}")  # fmt: skip
    if len(counts) > 1 and train.micro_batch is None and numbers_know_micro_batch(config):
        raise UsageError(f"train.workers={shown} with train.averaging=local or model.grn=batch needs a train.micro_batch: the "
                         "numbers depend on it, and the default one on the number of workers")  # fmt: skip
    return counts


def numbers_know_micro_batch(config: Config) -> bool:
    """Whether the micro-batch is what GRN or a loss runs over."""
    return config.model.grn == "batch" or config.train.averaging == "local"


def most_workers(config: Config) -> int:
    """The largest number of workers that a run may have."""
    return worker_counts(config)[-1]


def micro_batch_of(config: Config, workers: int) -> int:
    """Tiles per forward pass: as set, or the largest divisor of a worker's share that is at most 64."""
    share = config.train.global_batch // workers
    if config.train.micro_batch is not None:
        return config.train.micro_batch
    return max(d for d in range(1, min(share, MAX_AUTO_MICRO_BATCH) + 1) if share % d == 0)


def steps_of(train: Train, samples: int) -> int:
    """Optimizer steps of a run over that many tiles."""
    return train.steps or (math.ceil(train.epochs * samples / train.global_batch) if train.epochs else DEFAULT_STEPS)


PUBLISHED_BATCH = 4096
"""Global batch of the published recipe, at which both scalings give its peak rate of 2.4e-3."""


def learning_rate_of(config: Config) -> float:
    """The peak learning rate: as set, or the published one scaled to the global batch.

    Adam's steps call for the square root of the batch (Malladi et al., 2022, arXiv:2205.10287); the published linear rule
    leaves a laptop's batch of 32 with a rate at which nothing is learnt in a few hundred steps.
    """
    if config.optimizer.lr is not None:
        return config.optimizer.lr
    published = config.optimizer.base_lr * PUBLISHED_BATCH / 256
    share = config.train.global_batch / PUBLISHED_BATCH
    return published * (share if config.optimizer.scaling == "linear" else share**0.5)


def input_of(config: Config, table: tuple[Modality, ...] = TABLE) -> Modality:
    """The input modality with its chosen bands.  Raises UsageError unless it is a continuous map."""
    chosen = _chosen(config, config.model.input, "model.input", table)
    if chosen.level is not Level.PIXEL or chosen.kind is not Kind.CONTINUOUS:
        raise UsageError(f"model.input={chosen.name}: the input must be a continuous map")
    return chosen


def targets_of(config: Config, table: tuple[Modality, ...] = TABLE) -> tuple[Modality, ...]:
    """The targets with their chosen bands, in table order whatever the order they were given in."""
    names = config.model.targets
    if not names or len(set(names)) < len(names):
        raise UsageError(f"model.targets={names}: name at least one modality, each once")
    for name in config.model.bands:
        _chosen(config, name, f"model.bands.{name}", table)
    chosen = [_chosen(config, name, "model.targets", table) for name in names]
    for modality in chosen:
        if not modality.trainable:
            raise UsageError(f"model.targets: {modality.name} holds bit flags, which no head predicts")
    order = [m.name for m in table]
    return tuple(sorted(chosen, key=lambda m: order.index(m.name)))


def normalised_targets(config: Config) -> list[str]:
    """The targets whose loss is relative to their own patch.  Raises UsageError unless each is a continuous map."""
    chosen = {m.name: m for m in targets_of(config)}
    if config.model.normalise_targets is None:
        return [config.model.input] if config.model.input in chosen else []
    for name in config.model.normalise_targets:
        if name not in chosen or chosen[name].level is not Level.PIXEL or chosen[name].kind is not Kind.CONTINUOUS:
            raise UsageError(f"model.normalise_targets: {name} is no continuous map among model.targets")
    return config.model.normalise_targets


def label_of(config: Config, table: tuple[Modality, ...] = TABLE) -> Modality:
    """What held-out tiles are told apart by.  Raises UsageError unless it is a modality of classes.

    By default it is the first that an experiment may predict of which a whole tile has one class.
    """
    classes = [m for m in table if m.kind is Kind.CATEGORICAL]
    if not config.eval.label:
        return next(m for m in classes if m.level is Level.IMAGE and m.role is Role.TASK)
    found = next((m for m in classes if m.name == config.eval.label), None)
    if found is None:
        names = ", ".join(m.name for m in classes)
        raise UsageError(f"eval.label={config.eval.label} is no modality of classes; name one of {names}")
    return found


def _chosen(config: Config, name: str, where: str, table: tuple[Modality, ...]) -> Modality:
    try:
        modality = get(name, table)
        bands = config.model.bands.get(name)
        if bands is not None and modality.kind is not Kind.CONTINUOUS:
            raise ValueError(f"{name} is categorical and has no bands to choose")
        return modality.default_bands() if bands is None else modality.select(bands)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
