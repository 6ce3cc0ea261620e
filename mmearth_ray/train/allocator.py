"""The C library's allocator, told to keep what was freed.

glibc gives the top of its heap back to the system as soon as 64 MB of it are free, and every page is then a fault again.  A
training step frees and takes the same large tensors over and over: 25,000 faults a step of 16 tiles (atto, 112 px), which
cost it 4 to 10 % of its time on two cores.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST = 2**31 - 1  # an int in C; no block of this size or less is mapped on its own


def keep_freed_memory() -> bool:
    """Make the process reuse its freed memory, up to the most it ever used.  False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
