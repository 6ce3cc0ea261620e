"""The plan: which samples make step t, as a pure function of (group sizes, seed, t).

An epoch is one global sequence: the row groups permuted by (seed, epoch), their chosen rows in order.  Positions count
samples over all epochs, so nothing is dropped at an epoch's end.  Steps are 1-based: step t covers positions
[(t - 1) G, t G) of global batch G, of which rank r of W takes its contiguous W-th part.  Resuming is starting at a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmearth_ray.stream.draws import permutation


@dataclass(frozen=True)
class Slice:
    """Chosen rows first..last-1 of one row group, in the given epoch."""

    epoch: int
    group: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a data set's samples.  `group_sizes` (groups,): chosen rows of each row group, all at least 1."""

    group_sizes: np.ndarray
    seed: int

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
            group = int(order[place])
            size = int(self.group_sizes[group])
            first = within - (int(ends[place]) - size)
            last = min(size, first + stop - position)
            yield Slice(epoch, group, first, last)
            position += last - first


@lru_cache(maxsize=4)
def _epoch(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups in the order of that epoch, and the position within the epoch at which each ends."""
    order = permutation(len(plan.group_sizes), "order", plan.seed, epoch)
    return order, np.cumsum(plan.group_sizes[order])


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
