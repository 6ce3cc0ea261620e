"""The environment of train workers keeps what was freed: a thread that takes it again meets hardly any page faults."""

import os
import platform
import subprocess
import sys

import pytest

from mmearth_ray.train.allocator import KEEP_FREED_MEMORY

GREEDY = {"MALLOC_TRIM_THRESHOLD_": "1000000", "MALLOC_MMAP_THRESHOLD_": "1000000"}
"""Gives every large tensor back to the system at once."""

FAULTS = """
import resource
import threading

import torch

torch.set_num_threads(1)
MB = (4, 24, 8, 16, 12, 20, 4, 8)  # 96 in all


def work():
    for _ in range(20):  # until the heap no longer grows
        kept = [torch.ones(mb * 2**18) for mb in MB]
        del kept
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        kept = [torch.ones(mb * 2**18) for mb in MB]
        del kept
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def _faults(settings: dict[str, str]) -> int:
    """Page faults of a new process with those settings, in the later rounds of its thread."""
    others = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))
    }
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=others | settings)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_that_a_thread_freed_is_used_again_without_faults() -> None:
    assert 10 * _faults(KEEP_FREED_MEMORY) < _faults(GREEDY)
