"""What is asked of a plan, in the words of `pretrain`, and what is found for a size of the encoder."""

from dataclasses import dataclass, replace

from mmearth_ray.config import most_workers
from mmearth_ray.errors import UsageError
from mmearth_ray.keys import Config
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.plan.fit import Fit, flops_per_tile, largest, of
from mmearth_ray.plan.memory import ENGINES, SPARE
from mmearth_ray.plan.passes import Passes, follow
from mmearth_ray.settings import key, section

ALL = "all"


@dataclass(frozen=True)
class Plan:
    """What only a plan knows."""

    sizes: list[str] = key([], "encoder sizes; all: every one; empty: model.size", among=(*SIZES, ALL))
    engines: list[str] = key([], "engines that may be chosen, the simplest that fits; empty: any, or train.engine alone where "
                                 "that is not ddp", among=tuple(ENGINES))  # fmt: skip
    gpu: str = key("NVIDIA A100-SXM4-80GB", "the GPU's name as nvidia-smi gives it, for the time")
    memory_gb: float = key(80.0, "memory of one GPU, GB", above=0)
    spare: float = key(SPARE, "share of it that is left to CUDA, its libraries and gaps", at_least=0, below=1)
    tiles: int = key(1_200_000, "tiles to train on; MMEarth's by default", at_least=1)
    mfu: float = key(0.2, "share of the GPU's peak that is reached: read it from a short run's metrics", above=0, at_most=1)


@dataclass(frozen=True)
class Options(Config):
    """The settings of a run and those of its plan.

    A GPU for each of `train.workers`, of the most if they may change; where `train.micro_batch` is null, the largest that fits.
    """

    plan: Plan = section(Plan)

    @property
    def sizes(self) -> list[str]:
        return list(SIZES) if ALL in self.plan.sizes else list(dict.fromkeys(self.plan.sizes)) or [self.model.size]

    @property
    def gpus(self) -> int:
        return most_workers(self)

    @property
    def share(self) -> int:
        """Tiles of a worker in a step."""
        return self.train.global_batch // self.gpus

    @property
    def room(self) -> float:
        """Bytes that tensors may take."""
        return self.plan.memory_gb * 1e9 * (1 - self.plan.spare)


@dataclass(frozen=True)
class Planned:
    """What was found for a size.  `fits`: per engine the largest micro-batch that fits; `least`: the most sharing engine, one
    tile at a time."""

    size: str
    parameters: int
    flops: float
    fits: dict[str, Fit]
    least: Fit

    @property
    def chosen(self) -> Fit | None:
        """The simplest engine that fits."""
        return next(iter(self.fits.values()), None)


def plan(options: Options, size: str) -> Planned:
    """What a size takes.  Raises UsageError where no engine that may be chosen trains with these settings."""
    engines = engines_of(options)
    sized = replace(options, model=replace(options.model, size=size))
    passes = follow(sized)
    found = {name: _fit(options, name, passes) for name in engines}
    return Planned(
        size, sum(passes[0].parameters), flops_per_tile(sized),
        fits={name: fit for name, fit in found.items() if fit},
        least=of(engines[-1], passes, options.train.micro_batch or 1, options.share, options.gpus),
    )  # fmt: skip


def engines_of(options: Options) -> list[str]:
    """The engines that may be chosen, the simplest first.  Raises UsageError if none of them trains with these settings."""
    train = options.train
    asked = options.plan.engines or (list(ENGINES) if train.engine == "ddp" else [train.engine])
    whole = "model.image_sizes" if options.model.image_sizes else "train.compile=true" if train.compile else ""
    able = ["ddp"] if whole else ["zero2", "zero3"] if train.offload else list(ENGINES)
    if not (found := [name for name in able if name in asked]):
        raise UsageError(f"plan.engines={asked}: {whole or 'train.offload=true'} is for {' and '.join(able)} alone; add it, or "
                         "leave one of them out")  # fmt: skip
    return found


def _fit(options: Options, engine: str, passes: list[Passes]) -> Fit | None:
    train = options.train
    if train.micro_batch is None:
        return largest(engine, passes, options.share, options.gpus, options.room, offload=train.offload)
    fit = of(engine, passes, train.micro_batch, options.share, options.gpus)
    return fit if fit.memory.on_gpu(offload=train.offload) <= options.room else None
