"""Tiles in two halves, each of whole blocks of places, so that neighbours are mostly in one.

Shapes: N tiles.
"""

import numpy as np

WIDEST, NARROWEST, BLOCKS = 1.0, 1 / 64, 16
"""Sides of blocks of places, degrees: halved from the widest on until there are so many blocks."""


def halves(where_2N: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Which places are tested, bool (N,), about half and whole blocks of them; and the side of a block in degrees.

    Blocks are as wide as there are enough of them; 0: where all places are the same, each tile is a block.  Neighbouring blocks
    touch, so a tile may be near one of the other half: enough to follow a run by, too little to compare encoders for good.
    """
    side, block_N = WIDEST, _blocks(where_2N, WIDEST)
    while block_N.max() + 1 < BLOCKS and side > NARROWEST:
        side /= 2
        block_N = _blocks(where_2N, side)
    if not block_N.any():
        side, block_N = 0.0, np.arange(len(block_N))
    sizes, counts = np.bincount(block_N), np.zeros(2, np.int64)
    order = np.random.default_rng([seed, len(sizes)]).permutation(len(sizes))
    tested = np.zeros(len(sizes), bool)
    for block in order[np.argsort(-sizes[order], kind="stable")].tolist():  # each to the smaller half, the largest first
        smaller = int(counts[1] < counts[0])
        tested[block] = smaller
        counts[smaller] += sizes[block]
    return tested[block_N], side


def _blocks(where_2N: np.ndarray, side: float) -> np.ndarray:
    """The number of the block of each place, int (N,); places that are not known are one block."""
    return np.unique(np.nan_to_num(np.floor(where_2N / side), nan=1e9), axis=1, return_inverse=True)[1].reshape(-1)
