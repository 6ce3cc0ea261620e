"""Every setting of a pretraining run, with its default and meaning.

The defaults are the published recipe (MP-MAE; MMEarth-train commit 1f368b3) scaled to a laptop: its batch, length and
data set are in `configs/mmearth64_atto.yaml`.
"""

from dataclasses import dataclass

from mmearth_ray.modalities import DEFAULT_INPUT, tasks
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
    attempts: int = key(8, "times to ask a store that fails before the run ends, 8 over about 20 s; for a third of "
                        "train.hang_timeout at most", at_least=1, at_most=20)  # fmt: skip
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
    workers: list[int] = key([1], "train workers, each with an equal part of the global batch; [MIN,MAX]: as many as the "
                             "cluster has room for, changing with it", at_least=1)  # fmt: skip
    wait: float = key(60.0, "seconds to wait until the cluster has room for the (fewest) workers; more where nodes are "
                      "added on demand", at_least=0)  # fmt: skip
    gpus: bool | None = key(None, "one GPU per worker (nccl); default: if the cluster has enough")
    engine: str = key(
        "ddp", "what a worker holds: all (ddp), or a part of the optimizer's state (zero1), also of gradients (zero2), also of "
        "weights (zero3)", among=("ddp", "zero1", "zero2", "zero3"),
    )  # fmt: skip
    offload: bool = key(False, "keep the optimizer's state in the host's memory, for zero2 and zero3 on GPUs")
    activation_checkpointing: bool = key(False, "compute the activations of blocks twice rather than keep them")
    clip: float = key(0.0, "largest norm of all gradients together; 0, as published: any", at_least=0)
    precision: str = key("fp32", "of matrices and convolutions; bf16: autocast with float32 weights", among=("fp32", "bf16"))
    compile: bool = key(False, "torch.compile, after a check that loss and gradients stay; takes minutes and a C++ compiler")
    fetch_every: int | None = key(None, "steps whose metrics leave the device together, after which SIGTERM is heard; default: "
                                  "1 on a CPU, 10 on a GPU", at_least=1)  # fmt: skip
    averaging: str = key(
        "global", "what a loss is the mean of: the global batch, or as published each worker's micro-batch",
        among=("global", "local"),
    )  # fmt: skip
    nonfinite: str = key(
        "stop", "what a step does whose loss or gradient is not finite: end the run, or leave its update out, unless 10 in a "
        "row are so", among=("stop", "skip"),
    )  # fmt: skip
    ledger: bool = key(False, "write the ids of every step's tiles to ledger/rank-R.jsonl")
    stop_at: int | None = key(None, "save and exit after this step; the schedule keeps its length", at_least=1)
    max_failures: int = key(3, "times to start the workers again without a new checkpoint in between", at_least=0)
    hang_timeout: float = key(300.0, "seconds without a sign of life after which a worker is replaced; at least 150 where "
                              "shards or checkpoints are on a store, for which workers wait", above=0)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    every: int = key(100, "steps between checkpoints; one is always written at the end", at_least=1)
    keep: int = key(3, "newest checkpoints to keep; 0 keeps all", at_least=0)
    keep_every: int = key(0, "steps between checkpoints that are kept for ever beside those; 0: none", at_least=0)
    directory: str = key("", "where they are, a path or a URL such as s3://bucket/prefix, of this run alone; empty: "
                         "run.directory/checkpoints")  # fmt: skip


@dataclass(frozen=True)
class Validate:
    every: int = key(100, "steps between validations on the held-out tiles", at_least=1)
    tiles: int = key(512, "held-out tiles used, at most; 0 turns validation off", at_least=0)


@dataclass(frozen=True)
class Eval:
    every: int = key(0, "steps between evaluations of the encoder, frozen, on labelled images, by a process beside training; "
                     "0: none", at_least=0)  # fmt: skip
    label: str = key("", "what held-out tiles are told apart by, a modality of classes; empty: the first of whole tiles")
    task: str = key("", "folder of a labelled data set (`python -m mmearth_ray.evaluate convert-...`) to evaluate on; empty: "
                    "the held-out tiles of data.validate_where")  # fmt: skip
    tiles: int = key(512, "labelled images used, at most: half to fit, half to test", at_least=8)
    threads: int = key(1, "threads of the process that evaluates", at_least=1)
    wait: float = key(600.0, "seconds that an evaluation may take, and that the end of a run waits for the last", above=0)


@dataclass(frozen=True)
class Figure:
    every: int = key(0, "steps between reconstruction figures; 0: at the end only", at_least=0)
    tiles: int = key(2, "tiles shown; 0 draws no figure", at_least=0, at_most=4)


@dataclass(frozen=True)
class Log:
    wandb: str = key("disabled", "also send the metrics to Weights & Biases; offline: keep them for `wandb sync`, below "
                     "run.directory/wandb", among=("disabled", "online", "offline"))  # fmt: skip
    project: str = key("mmearth-ray", "project on Weights & Biases")
    entity: str = key("", "user or team on Weights & Biases; empty: your default one")
    group: str = key("", "group of runs on Weights & Biases; empty: none")
    tags: list[str] = key([], "tags of the run on Weights & Biases")
    tensorboard: bool = key(False, "also write the metrics for TensorBoard, to run.directory/tensorboard")
    peak_tflops: float | None = key(None, "what one device can do at best, TFLOP/s, to which mfu in the metrics relates; null: "
                                    "known for common GPUs, measured on CPUs", above=0)  # fmt: skip


@dataclass(frozen=True)
class Run:
    directory: str = key("runs/pretrain", "where everything about the run is written; the same again resumes it")
    id: str = key("", "name of the run, to which its checkpoints belong: with it, checkpoint.directory is resumed from another "
                  "run.directory, as on a fresh machine; empty: drawn once")  # fmt: skip
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
    eval: Eval = section(Eval)
    figure: Figure = section(Figure)
    log: Log = section(Log)
    run: Run = section(Run)
    seed: int = key(0, "seed of weights, order, crops and masks", at_least=0, below=2**63)
