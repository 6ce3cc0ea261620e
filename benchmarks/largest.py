"""The largest batch whose training step fits into a GPU's memory."""

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.computations import Subject, Work
from benchmarks.timing import Stopwatch

FINENESS = 16  # the batch is found to one part in so many


def largest_batch(subject: Subject, make: Callable[[Subject], Work]) -> int:
    """Tiles of the largest batch that a step takes; `make` gives the step of a subject."""
    return largest(lambda tiles: _fits(enlarge(subject, tiles), make), subject.tiles)


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that fits, by doubling, then halving the gap, to one part in `FINENESS`; 0 if `start` does not."""
    if not fits(start):
        return 0
    low = start
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(low // FINENESS, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def enlarge(subject: Subject, tiles: int) -> Subject:
    """The subject with that many tiles, repeating those it has."""
    times = -(-tiles // subject.tiles)
    batch = {name: x.repeat(times, *[1] * (x.ndim - 1))[:tiles] for name, x in subject.batch.items()}
    return replace(subject, batch=batch, totals=subject.totals * tiles // subject.tiles)


def _fits(subject: Subject, make: Callable[[Subject], Work]) -> bool:
    try:
        make(subject)(Stopwatch(subject.device))
        torch.cuda.synchronize(subject.device)
    except torch.OutOfMemoryError:
        return False
    finally:
        subject.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return True
