"""Batches handed from one process to another through shared memory: what a hand-over costs at least.

A ring of slots in one piece of shared memory; a batch is written into a free slot, array after array, and the consumer gets
arrays that lie in the slot, which is free again when it takes the next batch.
"""

import multiprocessing
import pickle
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Semaphore
from typing import Any

from mmearth_ray.errors import DataError

SLOTS = 4
ALIGNMENT = 64


def from_process(work: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], slot_bytes: int) -> Generator[Any, None, None]:
    """What `work(*arguments)` yields in a process of its own, each item of at most `slot_bytes`.

    Ends when that ends, and raises DataError where it fails.
    """
    context = multiprocessing.get_context("spawn")
    memory = SharedMemory(create=True, size=SLOTS * slot_bytes)
    free, full = context.Semaphore(SLOTS), context.Semaphore(0)
    notes, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(work, arguments, memory.name, slot_bytes, free, full, sender), daemon=True)
    process.start()
    sender.close()
    try:
        number = 0
        while full.acquire() and (note := notes.recv()) is not None:
            if isinstance(note, str):
                raise DataError(f"the process that reads failed: {note}")
            yield _unpack(memory, number % SLOTS * slot_bytes, *note)
            number += 1
            free.release()
    finally:
        process.terminate()
        process.join()
        memory.unlink()
        with suppress(BufferError):  # arrays still lie in it: the memory goes with the last of them
            memory.close()


def _serve(
    work: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], name: str, slot_bytes: int, free: Semaphore,
    full: Semaphore, notes: Any,
) -> None:  # fmt: skip
    """The other process: fill slots as they become free.  After the last item it says None, after a failure what it was."""
    memory, end = SharedMemory(name), None
    try:
        for number, item in enumerate(work(*arguments)):
            free.acquire()
            notes.send(_pack(item, memory, number % SLOTS * slot_bytes, slot_bytes))
            full.release()
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    finally:
        notes.send(end)
        full.release()
        memory.close()


def _pack(item: Any, memory: SharedMemory, start: int, slot_bytes: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Write the arrays of an item into its slot.  Returns everything else of it, and each array's place and bytes."""
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(item, protocol=5, buffer_callback=buffers.append)
    places, at = [], 0
    for buffer in buffers:
        raw = buffer.raw()
        if at + raw.nbytes > slot_bytes:
            raise ValueError(f"an item needs more than its slot of {slot_bytes} bytes")
        _bytes_of(memory)[start + at : start + at + raw.nbytes] = raw
        places.append((at, raw.nbytes))
        at += -(-raw.nbytes // ALIGNMENT) * ALIGNMENT
    return rest, places


def _unpack(memory: SharedMemory, start: int, rest: bytes, places: list[tuple[int, int]]) -> Any:
    held = _bytes_of(memory)
    return pickle.loads(rest, buffers=[held[start + at : start + at + size] for at, size in places])


def _bytes_of(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None, "the memory was closed"
    return memory.buf
