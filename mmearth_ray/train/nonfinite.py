"""Steps whose loss or gradient is not finite: which tiles gave it, and whether the run goes on without them.

The engines leave the update of such a step out on every worker alike.  Only then are its tiles prepared once more, which
gives the same arrays, and every image's errors computed by themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmearth_ray.experiment import Experiment
from mmearth_ray.patience import note
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.train.engine import Engine, to_device
from mmearth_ray.train.engines import skips
from mmearth_ray.train.window import Sums

IN_A_ROW = 10
"""Steps that are left out one after the other before the run ends: it is the model then and not the data."""

NAMED = 8
"""Tiles of a step that are named."""


@dataclass(frozen=True)
class Blame:
    """What of a step was not finite: the losses of `targets`, or where there is none its gradient alone.

    tiles: how many give errors that are not finite.  ids: of the first of them.
    """

    targets: list[str] = field(default_factory=list)
    tiles: int = 0
    ids: list[str] = field(default_factory=list)

    def said(self, step: int, global_batch: int) -> str:
        """What happened, for people."""
        if not self.targets:
            return f"the gradient of step {step} is not finite, though its loss is: no tile is known to be the cause"
        more = f" and {self.tiles - len(self.ids)} more" if self.tiles > len(self.ids) else ""
        which = (
            f"tile{'s' if self.tiles > 1 else ''} {', '.join(self.ids)}{more}" if self.tiles else "none of its tiles by itself"
        )
        which = f"every one of its {which}" if 1 < self.tiles == global_batch else which
        return f"the loss of step {step} is not finite ({', '.join(self.targets)}), by {which}"


@dataclass
class Guard:
    """Judges steps when they are fetched; all workers do so together.

    warn: shows a line to people, on rank 0.
    skipped: steps of the run that were left out so far.  in_a_row: of those the last ones without a step between.
    """

    experiment: Experiment
    engine: Engine
    ranges: MicroBatches
    warn: Callable[[str], None]
    skipped: int = 0
    in_a_row: int = 0

    def judge(self, sums: list[Sums], entries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """The lines to write down, with what was left out, and why the run has to end, if it has to."""
        for number, (s, entry) in enumerate(zip(sums, entries, strict=True)):
            self.in_a_row = 0 if s.applied else self.in_a_row + 1
            if not s.applied:
                blame = self._blame(entry["step"], s)
                said = blame.said(entry["step"], self.ranges.global_batch)
                if end := self._end(said):
                    return entries[:number], end
                if self.ranges.rank == 0:
                    self.warn(f"{said}; its update was left out")
                self.skipped += 1
                entry["skipped"] = {"targets": blame.targets, "tiles": blame.tiles, "ids": blame.ids}
            entry["skipped_steps"] = self.skipped
        return entries, ""

    def _end(self, said: str) -> str:
        if not skips(self.experiment.config):
            return (f"{said}; nothing was saved after the last checkpoint; look at the tiles with `shards verify`, set "
                    "train.nonfinite=skip to leave such steps out, or use a lower optimizer.base_lr in a new run")  # fmt: skip
        if self.in_a_row >= IN_A_ROW:
            return (f"{said}, and so were the {IN_A_ROW - 1} steps before it, which were left out: that is the model and not "
                    "its data; use a lower optimizer.base_lr in a new run")  # fmt: skip
        return ""

    def _blame(self, step: int, sums: Sums) -> Blame:
        names = [m.name for m, e in zip(self.experiment.spec.targets, sums.errors.tolist(), strict=True) if not np.isfinite(e)]
        if not names:
            return Blame()
        begin = (step - 1) * self.ranges.global_batch
        odd = torch.zeros(self.ranges.global_batch, dtype=torch.int64)
        first = (step - self.ranges.first_step) * self.ranges.per_step
        mine = [self.ranges[number] for number in range(first, first + self.ranges.per_step)]
        for (start, stop), batch in zip(mine, self.experiment.source.batches(mine), strict=True):
            note(int(batch["faults"].sum()))
            errors_BT = self.engine.errors(to_device(batch, self.engine.device))
            odd[start - begin : stop - begin] = (~errors_BT.isfinite().all(1)).cpu()
        places = self.engine.all_sum(odd).nonzero().flatten().tolist()
        shown = [(begin + place, begin + place + 1) for place in places[:NAMED]]
        batches = list(self.experiment.source.batches(shown))
        note(sum(int(batch["faults"].sum()) for batch in batches))
        return Blame(names, len(places), [str(batch["id"][0]) for batch in batches])
