"""Where a step's time goes: at every moment one stage runs, so the stages of a step add up to its wall time.

On a GPU the stages are told apart by events in the stream, which nothing waits for: their times are the device's own, read
when the metrics are fetched.  What the host does while the device works costs nothing there, and shows as nothing.
"""

import time
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch

Stage = Literal["data_wait", "to_device", "forward", "backward", "optimizer", "checkpoint", "validation", "evaluation",
                "figure", "rest"]  # fmt: skip

STAGES: tuple[Stage, ...] = get_args(Stage)
"""`data_wait`: for the next batches.  `backward`: with the sums over workers that run beside it.  `evaluation`: handing the
encoder over to the process that evaluates it.  `rest`: agreeing on counts, which waits for the slowest worker, fetching and
writing metrics, and whatever else there is."""

ASIDE: tuple[Stage, ...] = ("checkpoint", "validation", "evaluation", "figure")
"""Stages between two steps that are no part of the speed of training.  They are in the times of the step that follows."""


class Clock:
    """Divides a worker's time into stages, and the stages among steps.

    `now` takes a moment, `between` gives the milliseconds from one moment to another once both have come.
    """

    def __init__(self, now: Callable[[], Any], between: Callable[[Any, Any], float]) -> None:
        self.now, self.between = now, between
        self.moments: list[tuple[Stage, Any]] = [("rest", now())]
        self.ends: list[int] = []

    @classmethod
    def of(cls, device: torch.device) -> "Clock":
        """The clock of what computes: events of a GPU's current stream, the host's own clock for a CPU."""
        if device.type == "cuda":
            return cls(_record, lambda begin, end: begin.elapsed_time(end))
        return cls(time.perf_counter, lambda begin, end: 1e3 * (end - begin))

    def enter(self, stage: Stage) -> None:
        """From now on time is that stage's."""
        self.moments.append((stage, self.now()))

    def end_step(self) -> None:
        """The step is done; what comes belongs to the next one."""
        self.ends.append(len(self.moments))
        self.enter("rest")

    def read(self) -> list[dict[Stage, float]]:
        """Seconds of every stage of the steps that ended since the last call.  Their ends must have come on the device."""
        steps, first = [], 0
        for end in self.ends:
            seconds = dict.fromkeys(STAGES, 0.0)
            for (stage, begin), (_, after) in zip(self.moments[first:end], self.moments[first + 1 : end + 1], strict=True):
                seconds[stage] += self.between(begin, after) / 1e3
            steps.append(seconds)
            first = end
        self.moments, self.ends = self.moments[first:], []
        return steps


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return cast(torch.cuda.Event, event)
