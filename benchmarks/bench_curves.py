"""Loss curves: training as it is optimised here, beside the plain published computation from the same weights and samples.

    python -m benchmarks.bench_curves [key=value ...]      --help lists the keys

Three runs go side by side through the embedded procedural Earth (or `data=DIR`): the objective, the plain computation, and
the plain one again with the tiles of every batch in reverse, which changes nothing but the order of its sums.  How far the
two plain runs drift apart is the noise that rounding makes; the optimised run must stay within it.
Everything in float32, in the order of the stream, with the recipe's learning rates; the plain computation takes what is
missing as the mean of its band, so the objective is told to do the same.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.plain import Plain
from benchmarks.record import circumstances, write
from benchmarks.shapes import parse_shape
from mmearth_ray import config as configuration
from mmearth_ray import settings
from mmearth_ray.config import learning_rate_of
from mmearth_ray.errors import run_command
from mmearth_ray.experiment import Experiment, build_objective, open_experiment
from mmearth_ray.keys import Config
from mmearth_ray.objective import Objective
from mmearth_ray.pretrain import shards_of
from mmearth_ray.settings import key
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.train.engine import parameter_groups
from mmearth_ray.train.loop import to_device
from mmearth_ray.train.schedule import learning_rate

SMOOTH = 10  # steps whose mean difference is compared


@dataclass(frozen=True)
class Options:
    data: str = key("embedded", "directory with shards, or 'embedded'")
    size: str = key("atto", "encoder size")
    shape: str = key("56/8", "image and patch size, as IMAGE/PATCH")
    steps: int = key(300, "training steps", at_least=SMOOTH)
    batch: int = key(16, "tiles per step", at_least=2)
    precision: str = key("fp32", "of the optimised run; the noise of bf16 is its own", among=("fp32", "bf16"))
    theme: str = key("curves", "first part of the result's name")
    save: bool = key(True, "write the result to benchmarks/results/")


class Runner:
    """One of the runs: its module, and how a batch becomes a loss."""

    def __init__(self, module: nn.Module, experiment: Experiment) -> None:
        self.module, self.losses = module, []
        recipe = experiment.config.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module, recipe.weight_decay), betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True
        )

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def step(self, batch: dict[str, Tensor], rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))


class Optimised(Runner):
    def __init__(self, objective: Objective, experiment: Experiment, precision: str) -> None:
        super().__init__(objective, experiment)
        self.objective, self.low = objective, precision == "bf16"

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        totals = self.objective.valid_counts(batch).sum(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            return self.objective(batch, totals, 1.0)[0]


class Published(Runner):
    def __init__(self, plain: Plain, experiment: Experiment, *, reverse: bool) -> None:
        super().__init__(plain, experiment)
        self.plain, self.reverse = plain, reverse

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        batch = {name: tensor.flip(0) for name, tensor in batch.items()} if self.reverse else batch
        return self.plain(self.plain.prepare(batch))[0]


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    image, patch = parse_shape(options.shape, "shape")
    about = circumstances("benchmarks.bench_curves")
    curves = train(options, image, patch)
    named = {"size": options.size, "image/patch": options.shape, "batch": options.batch, "precision": options.precision}
    row = named | compare(curves)
    print(row)
    if options.save:
        path = write(options.theme, about, [row])
        figure = path.with_suffix(".png")
        draw(curves, figure)
        print(f"written to {path} and {figure}")
    return 0 if row["within the noise"] == "yes" or options.precision == "bf16" else 1


def train(options: Options, image: int, patch: int) -> dict[str, np.ndarray]:
    """The losses of every step, by run."""
    config = _config(options, image, patch)
    experiment = open_experiment(config, *shards_of(config))
    objective = build_objective(experiment)
    runs = {
        "optimised": Optimised(objective, experiment, options.precision),
        "plain": Published(Plain(objective, batch_wide=False), experiment, reverse=False),
        "plain, tiles reversed": Published(Plain(objective, batch_wide=False), experiment, reverse=True),
    }
    ranges = MicroBatches(1, options.steps, global_batch=options.batch, workers=1, rank=0, micro_batch=options.batch)
    for step, batch in enumerate(experiment.source.batches(ranges[i] for i in range(len(ranges))), 1):
        tensors = to_device(batch, torch.device("cpu"))
        recipe = {"peak": learning_rate_of(config), "minimum": config.schedule.min_lr}
        rate = learning_rate(step, steps=options.steps, warmup_fraction=config.schedule.warmup_fraction, **recipe)
        for run in runs.values():
            run.step(tensors, rate)
        if step % 50 == 0:
            print(f"step {step}: " + ", ".join(f"{name} {run.losses[-1]:.6f}" for name, run in runs.items()), flush=True)
    return {name: np.array(run.losses) for name, run in runs.items()}


def _config(options: Options, image: int, patch: int) -> Config:
    return configuration.load([
        f"data.shards={options.data}", f"model.size={options.size}", f"model.image_size={image}", f"model.patch_size={patch}",
        "model.missing=mean", f"train.steps={options.steps}", f"train.global_batch={options.batch}",
    ])  # fmt: skip


def compare(curves: dict[str, np.ndarray]) -> dict[str, str | float | int]:
    """How far the runs are apart over the last steps, relative to the loss, and whether that is the noise of rounding.

    The noise is the drift between the two plain runs, at its largest so far; differences grow alike in all runs, because
    training amplifies them.
    """
    plain = curves["plain"]
    drift = {name: _drift(curves[name], plain) for name in ("optimised", "plain, tiles reversed")}
    noise = np.maximum.accumulate(drift["plain, tiles reversed"])
    ratio = drift["optimised"] / np.maximum(noise, np.finfo(np.float32).eps)
    return {
        "steps": len(plain),
        "first loss": float(plain[0]),
        "last loss, plain": float(plain[-SMOOTH:].mean()),
        "last loss, optimised": float(curves["optimised"][-SMOOTH:].mean()),
        "largest difference": float(drift["optimised"].max()),
        "largest difference of the plain runs": float(noise[-1]),
        "median of difference / noise": float(np.median(ratio)),
        "within the noise": "yes" if np.median(ratio) <= 2 and drift["optimised"].max() <= 3 * noise[-1] else "no",
    }


def _drift(curve: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean relative difference over windows of `SMOOTH` steps."""
    difference = np.abs(curve - reference) / np.abs(reference)
    return difference[: len(difference) // SMOOTH * SMOOTH].reshape(-1, SMOOTH).mean(1)


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """The curves above, their differences from the plain run below."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    styles = {"optimised": "-", "plain": "--", "plain, tiles reversed": ":"}
    for name, curve in curves.items():
        above.plot(np.arange(1, len(curve) + 1), curve, styles[name], label=name)
        if name != "plain":
            drift = _drift(curve, curves["plain"])
            below.semilogy(
                SMOOTH * np.arange(1, len(drift) + 1), np.maximum(drift, 1e-9), styles[name], label=f"{name} - plain"
            )
    above.set_ylabel("weighted loss")
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
