"""What the plan's command prints: what fits, what every engine holds, steps, time, and the command that starts the run."""

import shlex

from mmearth_ray.config import sizes_of, steps_of
from mmearth_ray.errors import UsageError
from mmearth_ray.plan.fit import Fit
from mmearth_ray.plan.planned import Options, Planned
from mmearth_ray.progress import counted
from mmearth_ray.train.peak import peak_by_name


def report(options: Options, found: list[Planned], words: list[str]) -> list[str]:
    """The lines that the command prints, which was given those words.  Raises UsageError if nothing fits."""
    if not any(planned.chosen for planned in found):
        raise UsageError(_nothing_fits(options, min(found, key=lambda planned: _taken(options, planned.least))))
    asked, train, known = options.plan, options.train, options.log.peak_tflops
    peak = known * 1e12 if known else peak_by_name(asked.gpu, train.precision)
    steps = steps_of(train, asked.tiles)
    crops = " and ".join(str(size) for size, _ in dict.fromkeys(sizes_of(options.model)))
    extras = {"activation checkpointing": train.activation_checkpointing, "offloading": train.offload}
    kind = ", ".join([train.precision, *(name for name, on in extras.items() if on)])
    lines = [
        f"{counted(options.gpus, 'GPU')} of {asked.memory_gb:g} GB, {options.room / 1e9:.1f} GB of each for tensors; "
        f"tiles of {crops} px, {kind}",
        f"{steps:,} steps of {train.global_batch:,} tiles, {steps * train.global_batch / asked.tiles:.3g} epochs of "
        f"{asked.tiles:,} tiles",
        "",
    ]
    rows = [_summary(options, planned, steps, peak) for planned in found]
    micro = "train.micro_batch" if train.micro_batch else "the largest micro-batch that fits"
    lines += [*_aligned(rows), "", f"GB on one GPU at its fullest moment, with {micro}:", ""]
    lines += _aligned([_split(options, planned.size, fit) for planned in found for fit in planned.fits.values()])
    lines.append("")
    if peak:
        lines.append(f"Time: at {asked.mfu:.0%} of {peak / 1e12:g} TFLOP/s (plan.mfu=); a short run's metrics tell what it is.")
    else:
        lines.append(f"No time: the peak of plan.gpu='{asked.gpu}' in {train.precision} is not known; give log.peak_tflops=.")
    return lines + _command(found, words)


def _taken(options: Options, fit: Fit) -> float:
    return fit.memory.on_gpu(offload=options.train.offload)


def _summary(options: Options, planned: Planned, steps: int, peak: float | None) -> dict[str, str]:
    fit = planned.chosen
    row = {"size": planned.size, "parameters": f"{planned.parameters / 1e6:.1f} M", "GFLOP/tile": f"{planned.flops / 1e9:.1f}"}
    if fit is None:
        return row | {"engine": "none fits", "GB": f"{_taken(options, planned.least) / 1e9:.1f} at least"}
    row |= {"engine": fit.engine, "micro-batch": f"{fit.micro_batch} x {fit.micro_batches}", "GB": _gb(_taken(options, fit))}
    if peak:
        seconds = steps * options.train.global_batch * planned.flops / (options.gpus * peak * options.plan.mfu)
        row["time"] = f"{seconds / 3600:.1f} h"
    return row


def _split(options: Options, size: str, fit: Fit) -> dict[str, str]:
    parts = {name: _gb(value) for name, value in vars(fit.memory).items()}
    host = {"on the host": parts.pop("optimizer")} if options.train.offload else {}
    row = {"size": size, "engine": fit.engine, "micro-batch": str(fit.micro_batch)}
    return {**row, **parts, "total": _gb(_taken(options, fit)), **host}


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


def _command(found: list[Planned], words: list[str]) -> list[str]:
    """How to start the run, where one size was asked for: the same words, and what was found."""
    if len(found) != 1 or not (fit := found[0].chosen):
        return []
    chosen = {"model.size": found[0].size, "train.engine": fit.engine, "train.micro_batch": fit.micro_batch}
    ours = tuple(f"{name}=" for name in chosen)
    kept = [word for word in words if not is_plans(word) and not word.startswith(ours)]
    told = [f"{name}={value}" for name, value in chosen.items()]
    return ["", f"python -m mmearth_ray.pretrain {shlex.join([*kept, *told])}"]


def is_plans(word: str) -> bool:
    """Whether a word of the command is for the plan alone."""
    return word.startswith("plan.") and "=" in word


def _nothing_fits(options: Options, planned: Planned) -> str:
    least, train = planned.least, options.train
    whole = bool(options.model.image_sizes or train.compile)
    changes = ["more plan.memory_gb"]
    changes += ["plan.engines=[zero3]" if least.engine == "ddp" and not whole else "more train.workers"]
    changes += [] if train.activation_checkpointing else ["train.activation_checkpointing=true"]
    changes += [] if train.precision == "bf16" else ["train.precision=bf16"]
    return (
        f"nothing fits: {planned.size} with {least.engine} needs {_taken(options, least) / 1e9:.1f} GB for micro-batches of "
        f"{least.micro_batch}, and a GPU has room for {options.room / 1e9:.1f} GB; give {', '.join(changes)}"
    )
