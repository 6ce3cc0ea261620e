"""Plan a run before renting GPUs: python -m mmearth_ray.plan key=value ...

Per size: parameters, an engine and a micro-batch that fit into a GPU, what they hold there, steps and time.  Nothing is
trained and no GPU is needed: memory is counted on tensors without values, of the packed backend with all modalities.
"""

import re
import sys
from dataclasses import dataclass, replace

from mmearth_ray import config as configuration
from mmearth_ray import settings
from mmearth_ray.errors import UsageError, run_command
from mmearth_ray.keys import Config
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.plan.fit import Fit, flops_per_tile, largest, of, steps_of
from mmearth_ray.plan.memory import ENGINES
from mmearth_ray.plan.passes import Passes, follow
from mmearth_ray.settings import key
from mmearth_ray.train.peak import peak_by_name


@dataclass(frozen=True)
class Options:
    sizes: list[str] = key(list(SIZES), "encoder sizes", among=tuple(SIZES))
    image_size: int = key(112, "side of the crop that the model sees, px", at_least=8)
    patch_size: int = key(16, "side of a patch, px", among=(8, 16, 32))
    image_sizes: list[int] = key([], "image sizes that steps take in turn; only ddp trains them", at_least=8)
    mask_ratio: float = key(0.6, "share of patches that are hidden", above=0, below=1)
    global_batch: int = key(4096, "tiles per step over all GPUs", at_least=1)
    gpus: int = key(8, "GPUs, one worker each", at_least=1)
    gpu: str = key("NVIDIA A100-SXM4-80GB", "the GPU's name as nvidia-smi gives it, for the time")
    memory_gb: float = key(80.0, "memory of one GPU, GB", above=0)
    spare: float = key(0.1, "share of it that is left to CUDA, its libraries and gaps", at_least=0, below=1)
    precision: str = key("bf16", "of matrices and convolutions", among=("fp32", "bf16"))
    engines: list[str] = key(list(ENGINES), "engines that may be chosen, the simplest that fits", among=tuple(ENGINES))
    micro_batch: int | None = key(None, "tiles per forward pass; null: the most that fit", at_least=1)
    activation_checkpointing: bool = key(False, "compute the activations of blocks twice rather than keep them")
    tiles: int = key(1_200_000, "tiles to train on; MMEarth's by default", at_least=1)
    epochs: float = key(200.0, "passes over the tiles, 200 as published", above=0)
    mfu: float = key(0.2, "share of the GPU's peak that is reached: read it from a short run's metrics", above=0, at_most=1)
    peak_tflops: float | None = key(None, "that peak, TFLOP/s; null: known for common GPUs", above=0)

    @property
    def room(self) -> float:
        """Bytes that tensors may take."""
        return self.memory_gb * 1e9 * (1 - self.spare)

    @property
    def share(self) -> int:
        """Tiles of a worker in a step."""
        return self.global_batch // self.gpus


@dataclass(frozen=True)
class Planned:
    """What was found for a size.  `fits`: per engine the largest micro-batch that fits; `least`: the most sharing engine, one
    tile at a time."""

    config: Config
    parameters: int
    flops: float
    fits: dict[str, Fit]
    least: Fit

    @property
    def size(self) -> str:
        return self.config.model.size

    @property
    def chosen(self) -> Fit | None:
        """The simplest engine that fits."""
        return next(iter(self.fits.values()), None)


def main(arguments: list[str]) -> int:
    """The command.  Returns the exit code; raises UsageError for the caller to report."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    if not options.sizes or not options.engines:
        raise UsageError("sizes and engines must each name at least one")
    print("\n".join(report(options, [plan(options, size) for size in dict.fromkeys(options.sizes)])))
    return 0


def plan(options: Options, size: str) -> Planned:
    """What a size takes.  Raises UsageError for settings that do not fit each other."""
    config = config_of(options, size)
    engines = [name for name in ENGINES if name in options.engines and not (options.image_sizes and name != "ddp")]
    if not engines:
        raise UsageError(f"engines={options.engines}: image_sizes are trained by ddp alone; add it, or set image_sizes=[]")
    passes = follow(config)
    found = {name: _fit(options, name, passes) for name in engines}
    return Planned(
        config, sum(passes[0].parameters), flops_per_tile(config),
        fits={name: fit for name, fit in found.items() if fit},
        least=of(engines[-1], passes, options.micro_batch or 1, options.share, options.gpus),
    )  # fmt: skip


def _fit(options: Options, engine: str, passes: list[Passes]) -> Fit | None:
    if options.micro_batch is None:
        return largest(engine, passes, options.share, options.gpus, options.room)
    fit = of(engine, passes, options.micro_batch, options.share, options.gpus)
    return fit if fit.memory.total <= options.room else None


def config_of(options: Options, size: str) -> Config:
    """The settings of the run that is planned.  Raises UsageError, in the words of these options, where they do not fit."""
    defaults = Config()
    model = replace(
        defaults.model, size=size, image_size=options.image_size, patch_size=options.patch_size,
        image_sizes=options.image_sizes, mask_ratio=options.mask_ratio,
    )  # fmt: skip
    train = replace(
        defaults.train, global_batch=options.global_batch, workers=[options.gpus], micro_batch=options.micro_batch,
        precision=options.precision, activation_checkpointing=options.activation_checkpointing,
    )  # fmt: skip
    config = replace(defaults, model=model, train=train)
    try:
        configuration.check(config)
    except UsageError as error:
        raise UsageError(re.sub(r"\b(?:model|train)\.", "", str(error).replace("train.workers", "gpus"))) from error
    return config


def report(options: Options, found: list[Planned]) -> list[str]:
    """The lines that the command prints.  Raises UsageError if nothing fits."""
    if not any(planned.chosen for planned in found):
        raise UsageError(_nothing_fits(options, min(found, key=lambda planned: planned.least.memory.total)))
    peak = options.peak_tflops * 1e12 if options.peak_tflops else peak_by_name(options.gpu, options.precision)
    steps = steps_of(options.epochs, options.tiles, options.global_batch)
    crops = " and ".join(map(str, options.image_sizes or [options.image_size]))
    lines = [
        f"{options.gpus} GPUs of {options.memory_gb:g} GB, {options.room / 1e9:.1f} GB of each for tensors; tiles of {crops} px"
        f", {options.precision}" + (", activation checkpointing" if options.activation_checkpointing else ""),
        f"{options.tiles:,} tiles x {options.epochs:g} epochs / {options.global_batch:,} tiles a step = {steps:,} steps",
        "",
    ]
    rows = [_summary(options, planned, steps, peak) for planned in found]
    lines += [*_aligned(rows), "", "GB on one GPU at its fullest moment, with the largest micro-batch that fits:", ""]
    lines += _aligned([_split(planned.size, fit) for planned in found for fit in planned.fits.values()])
    lines.append("")
    if peak:
        lines.append(f"Time: at {options.mfu:.0%} of {peak / 1e12:g} TFLOP/s (mfu=); a short run's metrics tell what it is.")
    else:
        lines.append(f"No time: the peak of gpu='{options.gpu}' in {options.precision} is not known; give peak_tflops=.")
    return lines + _commands(options, found)


def _summary(options: Options, planned: Planned, steps: int, peak: float | None) -> dict[str, str]:
    fit = planned.chosen
    row = {"size": planned.size, "parameters": f"{planned.parameters / 1e6:.1f} M", "GFLOP/tile": f"{planned.flops / 1e9:.1f}"}
    if fit is None:
        return row | {"engine": "none fits", "GB": f"{planned.least.memory.total / 1e9:.1f} at least"}
    row |= {"engine": fit.engine, "micro-batch": f"{fit.micro_batch} x {fit.micro_batches}", "GB": _gb(fit.memory.total)}
    if peak:
        seconds = steps * options.global_batch * planned.flops / (options.gpus * peak * options.mfu)
        row["time"] = f"{seconds / 3600:.1f} h"
    return row


def _split(size: str, fit: Fit) -> dict[str, str]:
    memory = fit.memory
    parts = {name: _gb(value) for name, value in vars(memory).items()}
    return {"size": size, "engine": fit.engine, "micro-batch": str(fit.micro_batch), **parts, "total": _gb(memory.total)}


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _aligned(rows: list[dict[str, str]]) -> list[str]:
    """A table of text, numbers to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = ("size", "engine")
    return [
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(names, row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]


def _commands(options: Options, found: list[Planned]) -> list[str]:
    """How to start the run, where one size was asked for."""
    if len(found) != 1 or not (fit := found[0].chosen):
        return []
    model = {"size": found[0].size, "image_size": options.image_size, "patch_size": options.patch_size}
    model |= {"mask_ratio": options.mask_ratio} if options.mask_ratio != Config().model.mask_ratio else {}
    model |= {"image_sizes": f"[{','.join(map(str, options.image_sizes))}]"} if options.image_sizes else {}
    train = {
        "global_batch": options.global_batch, "workers": options.gpus, "micro_batch": fit.micro_batch, "engine": fit.engine,
        "precision": options.precision, "epochs": f"{options.epochs:g}", "gpus": "true",
    }  # fmt: skip
    train |= {"activation_checkpointing": "true"} if options.activation_checkpointing else {}
    words = [f"model.{name}={value}" for name, value in model.items()] + [
        f"train.{name}={value}" for name, value in train.items()
    ]
    return ["", f"python -m mmearth_ray.pretrain {' '.join(words)} data.shards=..."]


def _nothing_fits(options: Options, planned: Planned) -> str:
    least = planned.least
    changes = ["more memory_gb"]
    changes += ["engines=[zero3]" if least.engine == "ddp" and not options.image_sizes else "more gpus"]
    changes += [] if options.activation_checkpointing else ["activation_checkpointing=true"]
    changes += [] if options.precision == "bf16" else ["precision=bf16"]
    return (
        f"nothing fits: {planned.size} with {least.engine} needs {least.memory.total / 1e9:.1f} GB for micro-batches of "
        f"{least.micro_batch}, and a GPU has room for {options.room / 1e9:.1f} GB; give {', '.join(changes)}"
    )


def entry() -> int:
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(entry())
