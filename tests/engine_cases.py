"""What engines are compared by: a tiny objective, driven through some steps under an engine and a layout."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tiny_objective import make_batch, make_objective
from torch import Tensor

from mmearth_ray.config import load
from mmearth_ray.train import checkpoint, zero
from mmearth_ray.train.checkpoint import State
from mmearth_ray.train.commit import Keeping, begin
from mmearth_ray.train.engine import MOMENTS, DDPEngine, first_said
from mmearth_ray.train.engines import build_engine
from mmearth_ray.train.parts import Team, fill
from mmearth_ray.train.zero import ZeroEngine

TILES = 8
RATE = 1e-2


@dataclass(frozen=True)
class Case:
    """An engine and how it is asked to work: `settings` are of its run, at the step `spoilt` a gradient of the first worker is
    `by`, and the step `left_out` is not made.

    `resumes`: the folder of a checkpoint to go on from.  `saves`: where to leave one in the end.  `kept_whole`, `live`: as in
    `zero`; with 0, stage 3 parts even the smallest parameter.
    """

    engine: str
    micro_batches: int = 1
    steps: int = 2
    settings: tuple[str, ...] = ()
    spoilt: int = 0
    by: float = float("inf")
    left_out: int = 0
    resumes: str = ""
    saves: str = ""
    kept_whole: int = 0
    live: int = 2_000

    def file(self, workers: int) -> str:
        spoilt = f"{self.spoilt}by{self.by:g}without{self.left_out}"
        parts = [workers, self.engine, self.micro_batches, self.steps, *self.settings, spoilt, self.resumes, self.saves]
        return "-".join(map(str, parts)).replace("/", "_") + ".pt"


def build(case: Case, workers: int, folder: Path) -> DDPEngine | ZeroEngine:
    """The case's engine with the tiny objective."""
    zero.KEPT_WHOLE, zero.LIVE = case.kept_whole, case.live
    micro = TILES // workers // case.micro_batches
    layout = [f"train.global_batch={TILES}", f"train.workers={workers}", f"train.micro_batch={micro}"]
    config = load([f"train.engine={case.engine}", *layout, *case.settings])
    objective = make_objective()
    if not case.resumes:
        return cast(DDPEngine | ZeroEngine, build_engine(objective, config, torch.device("cpu"), workers))
    torch.nn.init.zeros_(objective.model.decoder.mask_token)
    with checkpoint.opened(folder / case.resumes) as (weights, moments):
        fill(objective, weights)
        engine = cast(DDPEngine | ZeroEngine, build_engine(objective, config, torch.device("cpu"), workers))
        engine.restore(moments)
    return engine


def drive(engine: DDPEngine | ZeroEngine, rank: int, workers: int, case: Case, steps: range) -> list[dict[str, Any]]:
    """What every step found: the loss before it, and whether it was applied."""
    found = []
    for step in steps:
        if step == case.left_out:
            continue
        batch, size = make_batch(TILES, seed=step), TILES // workers // case.micro_batches
        totals = engine.module.valid_counts(batch).sum(0)
        errors, share = torch.zeros(len(totals)), 1 / workers / case.micro_batches
        if step == case.spoilt and rank == 0:
            share = case.by  # the gradient of each log-variance, and about that of all
        for number in range(case.micro_batches):
            first = (rank * case.micro_batches + number) * size
            mine = {name: values[first : first + size] for name, values in batch.items()}
            errors += engine.backward(mine, totals, share, last=number == case.micro_batches - 1)
        weighed_with = engine.log_variances()
        applied = bool(engine.step(RATE))
        loss = engine.module.weigh(engine.all_sum(errors), totals, 1.0, weighed_with)
        found.append({"loss": float(loss), "applied": applied})
    return found


def run_cases(rank: int, workers: int, folder: Path, cases: list[Case]) -> None:
    """Run each case, and leave behind what it found, for `result`."""
    for case in cases:
        engine = build(case, workers, folder)
        done = int(case.resumes.rpartition("-")[2] or 0)
        found: dict[str, Any] = {"steps": drive(engine, rank, workers, case, range(done + 1, done + 2))}
        found["first"] = {name: value.clone() for name, value in engine.moments().items() if name.startswith(MOMENTS[0])}
        found["steps"] += drive(engine, rank, workers, case, range(done + 2, done + case.steps + 1))
        found["weights"] = {name: value.clone() for name, value in engine.weights().items()}
        found["groups"] = [(g["lr"], g["weight_decay"], *g["betas"]) for g in engine.optimizer.param_groups]
        found["counts"] = [float(state["step"]) for state in engine.optimizer.state.values()]
        found["own_counts"] = len({id(state["step"]) for state in engine.optimizer.state.values()})
        found["deepspeed"] = "deepspeed" in sys.modules
        if case.saves:
            team = Team(rank, workers, partial(first_said, engine, rank, workers))
            step = done + case.steps
            state = State(step, step * TILES, {}, {}, {})
            begin(folder / case.saves, state, engine.weights(), engine.moments(), Keeping(keep=1, team=team)).commit()
        if rank == 0:
            torch.save(found, folder / case.file(workers))
        close(engine)


def close(engine: DDPEngine | ZeroEngine) -> None:
    if isinstance(engine, ZeroEngine):
        engine.engine.destroy()


def result(folder: Path, workers: int, case: Case) -> dict[str, Any]:
    return torch.load(folder / case.file(workers), weights_only=True)


def losses(found: dict[str, Any]) -> list[float]:
    return [step["loss"] for step in found["steps"]]


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest distance of a tensor, relative to the norm of the expected one, and whose it is."""
    assert found.keys() == expected.keys()
    floor = 1e-9
    return max((float((found[name] - value).norm() / (value.norm() + floor)), name) for name, value in expected.items())
