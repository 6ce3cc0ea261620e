"""The C library's allocator in train workers, told to keep what was freed.

A training step frees and takes the same large tensors over and over.  glibc gives the top of its heap back to the system
as soon as 64 MB of it are free, and every page is then a fault again: 25,000 faults a step of 16 tiles (atto, 112 px),
which cost it 4 to 10 % of its time on two cores.
"""

KEEP_FREED_MEMORY: dict[str, str] = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
    "MALLOC_MMAP_THRESHOLD_": str(16 * 2**30),
}
"""Environment with which a process keeps its freed memory, up to the most it ever used; mallopt(3) names the variables.

glibc reads them when a process starts; other C libraries ignore them.  Trimming begins at 4 GB of free memory at the heap's
end, and no tensor below 16 GB is mapped on its own.  One arena, because Ray Train runs the training function in a thread,
whose own arena would be made of heaps of 64 MB that are unmapped once they are empty, whatever the thresholds.
"""
