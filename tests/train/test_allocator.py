"""The allocator keeps what was freed: tensors of the size of the last ones cost no page faults."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys

import torch

from mmearth_ray.train.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**22) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, len(kept)


print(*[faults()[0] for _ in range(6)])
"""


def _faults(mode: str) -> list[int]:
    greedy = os.environ | {"MALLOC_TRIM_THRESHOLD_": "1000000", "MALLOC_MMAP_THRESHOLD_": "1000000"}  # gives all back, at once
    found = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True, env=greedy)
    return [int(n) for n in found.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_was_freed_is_used_again_without_faults() -> None:
    kept, plain = _faults("keep"), _faults("plain")
    assert min(plain) > 10_000  # 128 MB in pages of 4 kB
    assert kept[-1] < 100
