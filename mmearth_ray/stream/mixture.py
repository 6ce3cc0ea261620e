"""The mixture: which data set a position of the stream belongs to, and which sample of that set it is.

Places repeat in blocks.  Each set has a fixed number of places in a block, spread over it as evenly as whole numbers allow,
so that every batch holds nearly the same mixture.  A set's own positions count up through the blocks without a gap: each set
has its own epochs, in its own order, whatever it is mixed with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESOLUTION = 1000
"""Places in a block of sets that are mixed by weight: shares are kept to a thousandth, and a set has at least one place."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """`places` (sets,): how many places of a block belong to each set, all at least 1."""

    places: tuple[int, ...]

    @property
    def pattern(self) -> np.ndarray:
        """int16 (block,): the set of each place."""
        return _block(self.places)[0]

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(set, first, last) for positions start..stop-1 in order: its own positions first..last-1, as long as they last."""
        if start >= stop:
            return
        if len(self.places) == 1:
            yield 0, start, stop
            return
        pattern, rank = _block(self.places)
        block, place = np.divmod(np.arange(start, stop), len(pattern))
        owner = pattern[place]
        own = block * np.asarray(self.places)[owner] + rank[place]
        cuts = np.flatnonzero(np.diff(owner)) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), stop - start], strict=True):
            yield int(owner[first]), int(own[first]), int(own[last - 1]) + 1


@lru_cache(maxsize=4)  # of the process: a source travels to every data task anew
def _block(places: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The set of each place of a block, int16, and how many earlier places belong to the same set, int64."""
    owners = np.repeat(np.arange(len(places), dtype=np.int16), places)
    # the i-th of n places of a set lies at (i + 1/2) / n of the block
    where = np.concatenate([(np.arange(n) + 0.5) / n for n in places])
    pattern = owners[np.argsort(where, kind="stable")]
    rank = np.empty(len(pattern), np.int64)
    for number, count in enumerate(places):
        rank[pattern == number] = np.arange(count)
    return pattern, rank


def by_size(samples: Sequence[int]) -> Mixture:
    """Every sample of every set once in a block: an epoch of all sets together."""
    return Mixture(tuple(samples) if len(samples) > 1 else (1,))


def by_weight(weights: Sequence[float]) -> Mixture:
    """Shares in proportion to the weights, whole numbers of a block by largest remainders."""
    if len(weights) == 1:
        return Mixture((1,))
    exact = np.asarray(weights, float) / sum(weights) * RESOLUTION
    places = np.maximum(1, np.floor(exact).astype(int))
    while (left := RESOLUTION - int(places.sum())) != 0:
        most = int(np.argmax((exact - places) * np.sign(left) - 1e9 * ((places == 1) & (left < 0))))
        places[most] += np.sign(left)
    return Mixture(tuple(places.tolist()))
