"""Evaluations of a run as it goes: workers hand over the encoder between two steps, the metrics tell later what came of it.

Nothing of training depends on it: no weight, no random number, and no waiting but that at the very end.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mmearth_ray.checkpoints.folder import Description, write_exported
from mmearth_ray.evaluate.during.background import Background
from mmearth_ray.evaluate.during.held_out import held_out_task, round_of
from mmearth_ray.evaluate.during.requests import ENCODER as ENCODER_FOLDER
from mmearth_ray.evaluate.during.requests import Outcome, cut_back
from mmearth_ray.experiment import Experiment
from mmearth_ray.objective import ENCODER
from mmearth_ray.progress import counted
from mmearth_ray.train.clock import Clock
from mmearth_ray.train.control import Control
from mmearth_ray.train.engine import Engine
from mmearth_ray.train.journal import METRICS, lines
from mmearth_ray.train.outputs import description_of
from mmearth_ray.train.parts import Team
from mmearth_ray.train.trackers import Metrics

FOLDER, KEY = "evaluation", "evaluation"
"""In the run directory: where evaluations are; in a line of the metrics: the outcome that came in last."""


class Evaluating:
    """What all workers evaluate with, each calling the same methods between the same steps; the first one sees to the rest.

    Raises UsageError and DataError if there is nothing to evaluate on.
    """

    def __init__(self, experiment: Experiment, engine: Engine, team: Team, done: int, control: Control) -> None:
        self.experiment, self.engine, self.control = experiment, engine, control
        self.background: Background | None = None
        self.content: dict[str, Any] = {}
        with team.together(experiment.run):
            if team.rank == 0:
                self._start(experiment.run / FOLDER, done)

    def _start(self, place: Path, done: int) -> None:
        cut_back(place, done)
        settings = self.experiment.config.eval
        if settings.every:
            task = held_out_task(self.experiment, place)
            self.content = {"task": str(task.folder), "tiles": settings.tiles, "threads": settings.threads}
            told = told_in(self.experiment.run, done)
            self.background = Background(
                place, threads=settings.threads, limit=settings.wait, warn=self.control.warn, told=told
            )

    def look(self, step: int, entries: list[dict[str, Any]], clock: Clock) -> None:
        """Hand over the encoder of a step, where it is due, and add to its line the outcome that waits to be told.

        The line of the last step gets those of the end.
        """
        if is_due(self.experiment, step):
            clock.enter("evaluation")
            self._hand_over(step)
            clock.enter("rest")
        if self.background and step < self.experiment.last_step and (outcome := self.background.take()):
            self._warn(outcome)
            entries[-1][KEY] = outcome

    def _hand_over(self, step: int) -> None:
        weights, held = self.engine.weights(), {}
        for name in weights:
            if name.startswith(ENCODER):
                tensor = weights[name]  # all workers ask for it, who may hold a part of it each
                if self.background:
                    held[name] = tensor.detach().to("cpu", torch.float32, copy=True)
        if self.background:
            description = replace(description_of(self.experiment, step), image_sizes=[])
            self.background.put(step, self.content, partial(_fill, description, held))

    def finish(self, metrics: Metrics | None) -> None:
        """Wait for what is not done, and add all that is not told to the last line.  The first worker alone has to wait."""
        if not (self.background and metrics):
            return
        self.background.finish(self.experiment.config.eval.wait, self.control.should_stop)
        outcomes = [*iter(self.background.take, None)]
        told = {KEY: outcomes[-1] | ({"earlier": outcomes[:-1]} if outcomes[1:] else {})} if outcomes else {}
        if told and (line := metrics.amend(told)):
            for outcome in outcomes:
                self._warn(outcome)
            self.control.tell(line)

    def flush(self) -> None:
        """Wait until what was handed over is on disk: the start that goes on from a checkpoint finds it there."""
        if self.background:
            self.background.flush()

    def _warn(self, outcome: Outcome) -> None:
        if outcome.get("collapsed"):
            self.control.warn(f"the encoder of step {outcome['step']} has collapsed: {outcome['why']}; see '{KEY}' in the "
                              "metrics, and whether the learning rate is too high")  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.background:
            self.background.close()


def is_due(experiment: Experiment, step: int) -> bool:
    """Whether the encoder is evaluated after this step: every few steps, and at the end of the run."""
    every = experiment.config.eval.every
    return bool(every) and (step % every == 0 or step == experiment.steps)


def check_evaluation(experiment: Experiment) -> str:
    """Get ready what the run is evaluated on, and say what that is; empty where it is not evaluated.

    Raises UsageError and DataError if there is nothing to evaluate on.
    """
    if not experiment.config.eval.every:
        return ""
    task = held_out_task(experiment, experiment.run / FOLDER)
    rows = round_of(task, experiment.config.eval.tiles)
    fitted = len(rows.train) + len(rows.valid)
    return (f"evaluated every {counted(experiment.config.eval.every, 'step')} on {task.info.name}: "
            f"{counted(task.info.outputs, 'output')}, {fitted:,} images to fit and {len(rows.test):,} to test")  # fmt: skip


def told_in(run: Path, done: int) -> set[int]:
    """The steps whose outcomes are in the metrics of a run up to the step `done`."""
    found = [line[KEY] for line in lines(run / METRICS, 1, done) if KEY in line]
    return {outcome["step"] for last in found for outcome in (last, *last.get("earlier", ()))}


def _fill(description: Description, encoder: dict[str, Tensor], folder: Path) -> None:
    write_exported(folder / ENCODER_FOLDER, description, encoder)
