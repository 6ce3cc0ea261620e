"""Every setting of a pretraining run, with its default and meaning.

The defaults are the published recipe (MP-MAE; MMEarth-train commit 1f368b3) scaled to a laptop: its batch, length and
data set are in `configs/mmearth64_atto.yaml`.  Resuming compares the fields that `FIXED_ON_RESUME` names.
"""

from dataclasses import dataclass
from pathlib import Path

from mmearth_ray import settings
from mmearth_ray.errors import UsageError
from mmearth_ray.modalities import DEFAULT_INPUT, TABLE, Kind, Level, Modality, get, tasks
from mmearth_ray.settings import key, section

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Data:
    shards: list[str] = key(
        [EMBEDDED], "where the shards are, a directory or a URL such as s3://bucket/prefix, or several; "
        "'embedded': the procedural Earth, written to data/embedded on first use",
    )  # fmt: skip
    weights: list[float] | None = key(
        None, "shares of several data sets in the stream, in their order; null: each tile of all of them once an epoch", above=0
    )
    where: str = key("split == 'train'", "which tiles to train on, over id split product date latitude longitude source")
    validate_where: str = key("split == 'val'", "which tiles are held out for the validation loss")
    statistics: str = key("manifest", "whose statistics normalise: manifest (of the shards), release, or a JSON file")
    shuffle_window: int = key(
        1, "row groups whose tiles are mixed with each other; each reader holds as many in memory", at_least=1, at_most=256
    )
    cache: str = key("", "local directory that keeps what was read from URLs; empty: none")
    cache_gb: float = key(50.0, "size of the cache, GB, beyond which what was used longest ago goes", above=0)
    attempts: int = key(8, "times to ask a store that fails, over half a minute, before the run ends", at_least=1, at_most=20)
    tiles_per_task: int = key(64, "tiles that one data task prepares at a time", at_least=1)
    read_ahead: int = key(4, "batches kept ready for each worker", at_least=1)


@dataclass(frozen=True)
class Model:
    size: str = key("atto", "encoder size", among=("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"))  # SIZES
    image_size: int = key(56, "side of the crop that the model sees, px", at_least=8)
    patch_size: int = key(8, "side of a patch, px", among=(8, 16, 32))
    image_sizes: list[int] = key([], "image sizes that steps take in turn, model.image_size and others of as many patches, 8, "
                                 "16 or 32 px wide; empty: that one", at_least=8)  # fmt: skip
    input: str = key(DEFAULT_INPUT, "the modality that is masked and encoded")
    targets: list[str] = key([m.name for m in tasks()], "the modalities to predict")
    bands: dict[str, list[str]] = key({}, "bands of a modality, as model.bands.NAME=[...]; all but the unused ones by default")
    stem: str = key("modified", "first layers: MP-MAE's, or those of ConvNeXt V2", among=("modified", "original"))
    mask_ratio: float = key(0.6, "share of patches that are hidden", above=0, below=1)
    decoder_width: int = key(512, "channels of the decoder", at_least=1)
    decoder_depth: int = key(1, "blocks of the decoder, shared by all modalities", at_least=1)
    normalise_targets: list[str] | None = key(
        None, "maps predicted relative to the mean and deviation of their own patch; null: the input, if it is a target"
    )
    weighting: str = key("uncertainty", "how the losses add up", among=("uncertainty", "unweighted"))
    missing: str = key(
        "ignored", "what missing pixels of target maps are to the loss: nothing, or as published the mean",
        among=("ignored", "mean"),
    )  # fmt: skip
    grn: str = key("image", "what GRN's norm runs over in the encoder: an image, or as published the whole batch",
                   among=("image", "batch"))  # fmt: skip
    backend: str = key(
        "packed", "what convolves visible patches; minkowski must be installed, triton is for GPUs",
        among=("packed", "minkowski", "triton"),
    )  # fmt: skip
    init_scheme: str = key("uniform", "initial weights: std 0.02 throughout, or as published", among=("uniform", "published"))
    init: str = key("", "start from these weights: an exported encoder, a checkpoint or its model.safetensors")


@dataclass(frozen=True)
class Optimizer:
    base_lr: float = key(1.5e-4, "learning rate per 256 tiles of a global batch of 4096, as published", above=0)
    scaling: str = key(
        "sqrt", "how the rate follows other global batches; linear is the published rule", among=("sqrt", "linear")
    )
    lr: float | None = key(None, "the peak learning rate itself, in place of base_lr and scaling", above=0)
    beta1: float = key(0.9, "AdamW's first decay", at_least=0, below=1)
    beta2: float = key(0.95, "AdamW's second decay", at_least=0, below=1)
    eps: float = key(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = key(0.05, "decay of matrices and kernels; vectors and biases have none", at_least=0)


@dataclass(frozen=True)
class Schedule:
    warmup_fraction: float = key(0.2, "share of the steps over which the learning rate rises (published: 40 of 200 epochs)",
                                 at_least=0, at_most=1)  # fmt: skip
    min_lr: float = key(0.0, "learning rate at the end of the cosine", at_least=0)


@dataclass(frozen=True)
class Train:
    steps: int | None = key(None, "optimizer steps; 300 where neither steps nor epochs is given", at_least=1)
    epochs: float | None = key(None, "length in passes over the tiles, in place of steps", above=0)
    global_batch: int = key(64, "tiles per step over all workers", at_least=1)
    micro_batch: int | None = key(None, "tiles per forward pass of a worker; default: at most 64", at_least=1)
    workers: int = key(1, "train workers; each takes an equal part of the global batch", at_least=1)
    gpus: bool | None = key(None, "one GPU per worker (nccl); default: if the cluster has enough")
    engine: str = key("ddp", "how workers share the model", among=("ddp",))
    precision: str = key("fp32", "of matrices and convolutions; bf16: autocast with float32 weights", among=("fp32", "bf16"))
    compile: bool = key(False, "torch.compile, after a check that loss and gradients stay; takes minutes and a C++ compiler")
    fetch_every: int | None = key(None, "steps whose metrics leave the device together, after which SIGTERM is heard; default: "
                                  "1 on a CPU, 10 on a GPU", at_least=1)  # fmt: skip
    averaging: str = key(
        "global", "what a loss is the mean of: the global batch, or as published each worker's micro-batch",
        among=("global", "local"),
    )  # fmt: skip
    ledger: bool = key(False, "write the ids of every step's tiles to ledger/rank-R.jsonl")
    stop_at: int | None = key(None, "save and exit after this step; the schedule keeps its length", at_least=1)
    max_failures: int = key(3, "times to start the workers again after one was lost", at_least=0)
    hang_timeout: float = key(300.0, "seconds without a sign of life after which a worker is replaced", above=0)


@dataclass(frozen=True)
class Checkpoint:
    every: int = key(100, "steps between checkpoints; one is always written at the end", at_least=1)
    keep: int = key(3, "newest checkpoints to keep; 0 keeps all", at_least=0)
    directory: str = key("", "where they are, a path or a URL such as s3://bucket/prefix; empty: run.directory/checkpoints")


@dataclass(frozen=True)
class Validate:
    every: int = key(100, "steps between validations on the held-out tiles", at_least=1)
    tiles: int = key(512, "held-out tiles used, at most; 0 turns validation off", at_least=0)


@dataclass(frozen=True)
class Figure:
    every: int = key(0, "steps between reconstruction figures; 0: at the end only", at_least=0)
    tiles: int = key(2, "tiles shown; 0 draws no figure", at_least=0, at_most=4)


@dataclass(frozen=True)
class Run:
    directory: str = key("runs/pretrain", "where everything about the run is written; the same again resumes it")
    address: str = key("", "Ray cluster to join ('auto' or an address); empty: RAY_ADDRESS, or a Ray of our own")


@dataclass(frozen=True)
class Config:
    """All settings.  Construct through `load`, which checks them."""

    data: Data = section(Data)
    model: Model = section(Model)
    optimizer: Optimizer = section(Optimizer)
    schedule: Schedule = section(Schedule)
    train: Train = section(Train)
    checkpoint: Checkpoint = section(Checkpoint)
    validate: Validate = section(Validate)
    figure: Figure = section(Figure)
    run: Run = section(Run)
    seed: int = key(0, "seed of weights, order, crops and masks", at_least=0, below=2**63)


FIXED_ON_RESUME = (
    "model.", "optimizer.", "schedule.", "seed", "train.global_batch", "train.steps", "train.averaging", "data.where",
    "data.weights", "data.shuffle_window",
)  # fmt: skip
"""Prefixes of the settings that a run keeps for its whole life; all others may change when it resumes."""

FREE_ON_RESUME = ("model.init", "model.backend")
"""Settings below those prefixes that change no number after the first step."""

MAX_AUTO_MICRO_BATCH = 64


def load(arguments: list[str]) -> Config:
    """The configuration of a command line: YAML files, later ones winning, then key=value arguments over them all."""
    files = [Path(a) for a in arguments if "=" not in a]
    config = settings.load(Config, files, [a for a in arguments if "=" in a])
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
    patches = (model.image_size // model.patch_size) ** 2
    visible = visible_patches(patches, model.mask_ratio)
    if not 0 < visible < patches:
        raise UsageError(f"model.mask_ratio={model.mask_ratio} leaves {visible} of {patches} patches visible; "
                         "at least one must be visible and one hidden")  # fmt: skip
    if train.global_batch % train.workers:
        raise UsageError(f"train.global_batch={train.global_batch} is not divisible by train.workers={train.workers}")
    per_worker = train.global_batch // train.workers
    if train.micro_batch is not None and per_worker % train.micro_batch:
        raise UsageError(f"train.micro_batch={train.micro_batch} does not divide the {per_worker} tiles that each of "
                         f"{train.workers} workers takes of train.global_batch={train.global_batch}")  # fmt: skip
    _check_sets(config)
    if model.backend == "minkowski" and train.gpus:
        raise UsageError("model.backend=minkowski runs on CPUs only; set train.gpus=false or model.backend=packed")
    if model.backend == "triton" and train.gpus is False:
        raise UsageError("model.backend=triton runs on GPUs only; set train.gpus=true or model.backend=packed")
    if train.steps is not None and train.epochs is not None:
        raise UsageError("give train.steps or train.epochs, not both")
    input_of(config)
    normalised_targets(config)


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


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Patches left visible: the whole part of patches x (1 - ratio), as published (19 of 49 at 0.6)."""
    return int(round(patches * (1 - mask_ratio), 6))


def micro_batch_of(config: Config) -> int:
    """Tiles per forward pass: as set, or the largest divisor of a worker's share that is at most 64."""
    share = config.train.global_batch // config.train.workers
    if config.train.micro_batch is not None:
        return config.train.micro_batch
    return max(d for d in range(1, min(share, MAX_AUTO_MICRO_BATCH) + 1) if share % d == 0)


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


def _chosen(config: Config, name: str, where: str, table: tuple[Modality, ...]) -> Modality:
    try:
        modality = get(name, table)
        bands = config.model.bands.get(name)
        if bands is not None and modality.kind is not Kind.CONTINUOUS:
            raise ValueError(f"{name} is categorical and has no bands to choose")
        return modality.default_bands() if bands is None else modality.select(bands)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
