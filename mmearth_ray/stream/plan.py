"""The plan: which samples make step t, as a pure function of (group sizes, seed, t).

An epoch is one global sequence: the row groups permuted by (seed, epoch), their chosen rows in order, or mixed within
windows of so many row groups.  Positions count samples over all epochs, so nothing is dropped at an epoch's end.  Steps are
1-based: step t covers positions [(t - 1) G, t G) of global batch G, of which rank r of W takes its contiguous W-th part.
Resuming is starting at a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmearth_ray.stream.draws import permutation


@dataclass(frozen=True, eq=False)
class Slice:
    """Samples of one row group, in the given epoch.  `rows`: which of its chosen rows, int64."""

    epoch: int
    group: int
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a data set's samples.

    `group_sizes` (groups,): chosen rows of each row group, all at least 1.  `window`: consecutive row groups of an epoch
    whose rows are mixed; with 1 they stay in order.
    """

    group_sizes: np.ndarray
    seed: int
    window: int = 1

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return int(self.group_sizes.sum())

    def slices(self, start: int, stop: int) -> Iterator[Slice]:
        """The slices of row groups that hold positions start..stop-1, in order, over as many epochs as it takes."""
        position = start
        while position < stop:
            epoch, within = divmod(position, self.samples)
            order, ends = _epoch(self, epoch)
            place = int(np.searchsorted(ends, within, side="right"))
            first = place // self.window * self.window
            begin, end = _span(ends, first, first + self.window)
            last = min(end, within + stop - position)
            yield from self._window(epoch, order, ends, first, within - begin, last - begin)
            position += last - within

    def _window(self, epoch: int, order: np.ndarray, ends: np.ndarray, first: int, start: int, stop: int) -> Iterator[Slice]:
        """Places start..stop-1 of the window that begins with the first-th group of the epoch."""
        if self.window == 1:
            yield Slice(epoch, int(order[first]), np.arange(start, stop))
            return
        begin, end = _span(ends, first, first + self.window)
        places = begin + _mixed(end - begin, self.seed, epoch, first // self.window)[start:stop]
        holders = np.searchsorted(ends, places, side="right")
        cuts = np.flatnonzero(np.diff(holders)) + 1
        for part in np.split(np.arange(len(places)), cuts):
            holder = int(holders[part[0]])
            yield Slice(epoch, int(order[holder]), places[part] - _span(ends, holder, holder + 1)[0])


def _span(ends: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """Where the groups first..last-1 of an epoch begin and end in it."""
    return int(ends[first - 1]) if first else 0, int(ends[min(last, len(ends)) - 1])


@lru_cache(maxsize=16)
def _epoch(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups in the order of that epoch, and the position within the epoch at which each ends."""
    order = _order(len(plan.group_sizes), plan.seed, epoch)
    return order, np.cumsum(plan.group_sizes[order])


@lru_cache(maxsize=8)
def _mixed(length: int, seed: int, epoch: int, window: int) -> np.ndarray:
    return permutation(length, "window", seed, epoch, window)


@lru_cache(maxsize=4)  # of the process: a plan may travel to a data task anew
def _order(groups: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(groups, "order", seed, epoch)


@dataclass(frozen=True)
class MicroBatches:
    """The (start, stop) position ranges of a worker's micro-batches for steps first..last, as trained on; made on demand."""

    first_step: int
    last_step: int
    global_batch: int
    workers: int
    rank: int
    micro_batch: int

    @property
    def per_step(self) -> int:
        return self.global_batch // self.workers // self.micro_batch

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step + 1) * self.per_step

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        step, part = divmod(index, self.per_step)
        begin = (self.first_step + step - 1) * self.global_batch + self.rank * (self.global_batch // self.workers)
        start = begin + part * self.micro_batch
        return start, start + self.micro_batch
