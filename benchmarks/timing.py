"""Taking time: laps of a piece of work on a CPU or a GPU, and medians over rounds in which all take turns.

Everything that is compared is measured in one process, in turn, round after round.  A ratio is the median of the rounds' own
ratios, so that a machine whose speed drifts does not move it.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeVar

import torch

Name = TypeVar("Name")

WARM_UP = {"cpu": 1, "cuda": 3}
"""Rounds that do not count: on a GPU kernels are compiled and chosen in the first ones."""


class Stopwatch:
    """Laps in seconds.  On a GPU the marks are events in its stream, so that taking them does not hold up the work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.marks: list[float | torch.cuda.Event] = [self._now()]

    def lap(self, name: str) -> None:
        """End a lap.  Laps of the same name add up."""
        self.names.append(name)
        self.marks.append(self._now())

    def read(self) -> dict[str, float]:
        """Seconds by lap, after all work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        laps: dict[str, float] = {}
        for name, (begin, end) in zip(self.names, pairwise(self.marks), strict=True):
            laps[name] = laps.get(name, 0.0) + _between(begin, end)
        return laps

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - begin


Laps = list[dict[str, float]]
"""Seconds by lap, of every round that counts."""


def take_turns(works: Mapping[Name, Callable[[Stopwatch], None]], rounds: int, device: torch.device) -> dict[Name, Laps]:
    """The laps of each work in each round, after those of the warm-up, which do not count."""
    found: dict[Name, Laps] = {name: [] for name in works}
    for number in range(WARM_UP[device.type] + rounds):
        for name, work in works.items():
            watch = Stopwatch(device)
            work(watch)
            laps = watch.read()
            if number >= WARM_UP[device.type]:
                found[name].append(laps)
    return found


def seconds(laps: Laps, name: str | None = None) -> float:
    """Median over the rounds of one lap, or of all laps together."""
    return statistics.median(_of(lap, name) for lap in laps)


def ratio(above: Laps, below: Laps) -> float:
    """Median over the rounds of the time of the one over that of the other."""
    return statistics.median(_of(a) / _of(b) for a, b in zip(above, below, strict=True))


def _of(lap: Mapping[str, float], name: str | None = None) -> float:
    return sum(lap.values()) if name is None else lap[name]


LONGEST = 2.0
"""Seconds after which a repeat is the last."""


def best(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of the fastest of several repeats, after one that does not count: for what a machine can do at most."""
    work()
    found: list[float] = []
    while len(found) < repeats and sum(found) < LONGEST:
        watch = Stopwatch(device)
        work()
        watch.lap("work")
        found.append(watch.read()["work"])
    return min(found)
