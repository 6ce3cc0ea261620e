"""Arrays whose memory is used again as soon as nobody holds them.

Batches and row groups are megabytes each and live for milliseconds.  The C library gives such memory back to the system,
which has to clear every page before it is used again: that took longer than filling the arrays did.
"""

import math
import sys
import threading

import numpy as np
from numpy.typing import DTypeLike

SMALL = 1 << 17
"""Bytes below which the C library keeps freed memory by itself (M_MMAP_THRESHOLD in mallopt(3))."""

LIMIT = 1 << 29
"""Bytes of blocks that a process keeps; arrays beyond are ordinary ones."""

_blocks: dict[int, list[np.ndarray]] = {}
_lock = threading.Lock()

FREE = 2
"""References to a block that only this module holds: its place in the list, and the argument of getrefcount."""


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of undefined values, like numpy.empty.  Its memory is free again once the array and all its views are gone."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size < SMALL:
        return np.empty(shape, kind)
    with _lock:
        block = _free_block(_rounded(size))
        return np.empty(shape, kind) if block is None else block[:size].view(kind).reshape(shape)


def _rounded(size: int) -> int:
    """The size, or up to a quarter more, so that few different ones occur."""
    step = 1 << (size.bit_length() - 3)
    return -(-size // step) * step


def _free_block(size: int) -> np.ndarray | None:
    blocks = _blocks.setdefault(size, [])
    for number in range(len(blocks)):
        if sys.getrefcount(blocks[number]) <= FREE:
            return blocks[number]
    if size + sum(length * len(kept) for length, kept in _blocks.items()) > LIMIT:
        return None
    blocks.append(np.empty(size, np.uint8))
    return blocks[-1]
