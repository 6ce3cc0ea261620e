"""The checkpoints of a run as it goes: at most one is on its way while steps are taken."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol, Self

import torch

from mmearth_ray.experiment import Experiment, fixed_settings, versions
from mmearth_ray.train.checkpoint import State, directory_of
from mmearth_ray.train.commit import Begun, Keeping, begin
from mmearth_ray.train.nonfinite import Guard
from mmearth_ray.train.outputs import description_of
from mmearth_ray.train.ownership import require_claim
from mmearth_ray.train.parts import Team

LOOK_SECONDS = 0.2
"""Between two looks at whether all files have arrived, where nothing else is to be done."""


class Kept(Protocol):
    """What a run writes beside its checkpoints, and needs when it goes on from one."""

    def flush(self) -> None:
        """Make safe what was written, before a checkpoint relies on it."""


class Saver:
    """What all workers of a run keep checkpoints with, each calling the same methods between the same steps.

    `saved`: the steps that the newest committed checkpoint has done.  Its methods raise DataError as `commit` does.
    """

    def __init__(self, experiment: Experiment, guard: Guard, team: Team, saved: int) -> None:
        self.experiment, self.guard, self.saved = experiment, guard, saved
        kept, mark = experiment.config.checkpoint, experiment.claim.replace("/", "-")
        self.keeping = Keeping(kept.keep, kept.keep_every, team, partial(require_claim, experiment), mark)
        self.begun: tuple[int, Begun] | None = None

    def begin(self, step: int, journals: Sequence[Kept]) -> None:
        """Make the journals safe on every worker, then write or begin to upload the checkpoint of a step."""
        self.settle(wait=True)
        for journal in journals:
            journal.flush()
        config, engine = self.experiment.config, self.guard.engine
        state = State(
            step=step, position=step * config.train.global_batch,
            settings=fixed_settings(config), identity=self.experiment.identity, versions=versions(),
            description=description_of(self.experiment, step).to_json(),
            skipped_steps=self.guard.skipped, skipped_in_a_row=self.guard.in_a_row,
        )  # fmt: skip
        self.begun = step, begin(directory_of(config), state, engine.weights(), engine.moments(), self.keeping)
        self.settle()

    def settle(self, *, wait: bool = False) -> None:
        """Commit what was begun, once the files of all workers have arrived, or after waiting for them.

        Uploads of tensors may take longer than a collective operation is given.
        """
        if self.begun is None:
            return
        step, begun = self.begun
        while self.guard.engine.all_sum(torch.tensor([not begun.arrived()], dtype=torch.int64)).item():
            if not wait:
                return
            time.sleep(LOOK_SECONDS)
        self.begun = None
        begun.commit()
        self.saved = step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.begun is not None:
            self.begun[1].close()
