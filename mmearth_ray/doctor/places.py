"""How fast places are: a temporary object written, read back and removed; shards read."""

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmearth_ray.copies import scratch, upload
from mmearth_ray.errors import DataError
from mmearth_ray.files import complete_or_absent, write_failure
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.storage import Location, read_ranges, remove

if TYPE_CHECKING:
    from upath import UPath

PROBE = 64 << 20
"""Bytes that are written and read: a few dozen requests' worth, so that one slow answer does not decide."""

BLOCK = 4 << 20


class Speed(NamedTuple):
    """Bytes, and the seconds that writing and reading them took; no seconds for what was not done."""

    size: int
    read: float
    write: float = 0.0

    def __str__(self) -> str:
        rates = {"written": self.write, "read": self.read}
        shown = " and ".join(f"{what} at {self.size / 1e6 / s:,.0f} MB/s" for what, s in rates.items() if s)
        return f"{self.size / 1e6:,.1f} MB {shown}"


_standing: dict[Location, list[Path]] = {}
"""Temporary objects that may be there now, and the directories that were made for each."""


@contextmanager
def standing(folder: Location) -> Iterator[Location]:
    """A place for a temporary object, whose name no other takes; what is there in the end goes, and the folder if it is new.

    Raises DataError if the folder cannot be made.
    """
    place = folder / f".mmearth-ray-doctor-{secrets.token_hex(4)}"
    missing = _missing(folder) if isinstance(folder, Path) else []
    with made(folder) if isinstance(folder, Path) else nullcontext():
        _standing[place] = missing
        try:
            yield place
        finally:
            with suppress(OSError):
                _clear(place)
                _standing.pop(place, None)


def _clear(place: Location) -> None:
    """Remove a temporary object, and what has its name in its own: half of it, or what other machines wrote beside it."""
    if not isinstance(place, Path):
        remove(place)
        return
    for path in place.parent.glob(f"*{place.name}*"):
        path.unlink(missing_ok=True)


def sweep(seconds: float = 10.0) -> list[Location]:
    """Remove what checks left that were given up or met a store that went away; what may still be there after so long."""

    def clear(place: Location, folders: list[Path]) -> None:
        with suppress(DataError, OSError):
            _clear(place)
            _remove_empty(folders)
            _standing.pop(place, None)

    waiting = [threading.Thread(target=clear, args=left, daemon=True) for left in list(_standing.items())]
    for thread in waiting:
        thread.start()
    end = time.monotonic() + seconds
    for thread in waiting:
        thread.join(max(0.0, end - time.monotonic()))
    return list(_standing)


def _missing(folder: Path) -> list[Path]:
    """Directories that are to be made for this one, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for path in folders:
            path.rmdir()


@contextmanager
def made(folder: Path) -> Iterator[Path]:
    """The folder, made if it is not there; what was made goes in the end, if nothing else was put there.

    Raises DataError if it cannot be made.
    """
    missing = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{write_failure(folder, error)}; correct the path, or its permissions") from error
    try:
        yield folder
    finally:
        _remove_empty(missing)


def write_and_read(folder: Location, size: int = PROBE) -> Speed:
    """Write a temporary object of that many bytes, read it and remove it.  Raises DataError."""
    with standing(folder) as place:
        return _local(place, size) if isinstance(place, Path) else _remote(place, size)


def _remote(place: "UPath", size: int) -> Speed:
    with scratch() as near:
        local = near / place.name
        _fill(local, size)
        begin = time.perf_counter()
        upload(local, place)
        written = time.perf_counter()
        (data,), _ = read_ranges(place, [(0, size)])
        end = time.perf_counter()
        if data != local.read_bytes():
            raise DataError(f"{place}: what was read is not what was written; do not use this store")
    return Speed(size, end - written, written - begin)


def _local(path: Path, size: int) -> Speed:
    begin = time.perf_counter()
    with complete_or_absent(path) as temporary:
        _fill(temporary, size)
    written = time.perf_counter()
    _read(path, size)
    return Speed(size, time.perf_counter() - written, written - begin)


def _fill(path: Path, size: int) -> None:
    """Write random bytes, which no disk compresses, and wait until they are on it."""
    block = os.urandom(min(size, BLOCK))
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, size: int) -> None:
    """Read the beginning of a file, from the disk where the system lets go of what it holds in memory.  Raises DataError."""
    try:
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
            left = size
            while left and (block := file.read(min(left, BLOCK))):
                left -= len(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from error
    if left:
        raise DataError(
            f"{path} ended {left:,} bytes early; the disk does not hold what was written, or the data set has changed"
        )


def read_shards(manifest: Manifest, size: int = PROBE) -> Speed:
    """Read the beginnings of shards, that many bytes in all or what there is.  Raises DataError."""
    begin, left = time.perf_counter(), size
    for shard in manifest.shards:
        place, take = manifest.directory / shard.file, min(left, shard.bytes)
        if isinstance(place, Path):
            _read(place, take)
        elif take:
            read_ranges(place, [(0, take)])
        left -= take
        if not left:
            break
    return Speed(size - left, time.perf_counter() - begin)
