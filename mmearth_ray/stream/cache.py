"""The cache: bytes of remote shards kept in a local directory up to a limit; what was used longest ago goes first.

Entries are files named by a digest of what they hold, written atomically, so that many tasks and runs share a directory.
The order of use is the files' time of modification, which a hit renews.
"""

import hashlib
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from mmearth_ray.errors import DataError
from mmearth_ray.files import write_failure

SUFFIX = ".bytes"
UNFINISHED = ".tmp"
FILL = 0.9
"""Share of the limit up to which the directory is filled; the rest is for what other tasks write at the same time."""

SLACK = (1 - FILL) / (4 * (os.cpu_count() or 1))
"""Share of the limit that a process writes between two looks at what the directory holds: four on a core do not exceed it."""

STALE = 600.0
"""Seconds after which an unfinished entry is taken for what a killed writer left."""

CHECKSUM = 4
"""Bytes at the end of an entry: the CRC-32 of what comes before."""

_written: dict[str, int] = {}  # by directory: what this process wrote since it looked; -1 before the first look


@dataclass(frozen=True)
class Cache:
    """`directory` is made at the first write; `limit` in bytes."""

    directory: Path
    limit: int

    def get(self, *names: object) -> bytes | None:
        """What is kept under those names, or None if that is nothing, or damaged."""
        path = self._path(names)
        try:
            kept = path.read_bytes()
        except OSError:
            return None
        data, checksum = kept[:-CHECKSUM], kept[-CHECKSUM:]
        if checksum != _checksum(data):
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def put(self, data: bytes, *names: object) -> None:
        """Keep the bytes under those names, unless they alone would fill the directory.

        Nor are they kept where another process empties the directory meanwhile.  Raises DataError if the directory cannot be
        written or its disk is full.
        """
        entry = data + _checksum(data)
        if len(entry) > FILL * self.limit:
            return
        path = self._path(names)
        writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"  # several threads of a process write
        temporary = path.with_name(f".{path.name}.{writer}{UNFINISHED}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._make_room(len(entry))
            temporary.write_bytes(entry)
            with suppress(FileNotFoundError):
                temporary.replace(path)
        except OSError as error:
            raise DataError(f"data.cache={self.directory}: {write_failure(path, error)}") from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def drop(self, *names: object) -> None:
        """Forget what is kept under those names."""
        with suppress(OSError):
            self._path(names).unlink(missing_ok=True)

    def check(self) -> None:
        """Raise DataError if nothing can be written to the directory."""
        self.put(b"", "check")
        self.drop("check")

    def _path(self, names: tuple[object, ...]) -> Path:
        text = "\x1f".join(map(str, names)).encode()
        return self.directory / f"{hashlib.blake2b(text, digest_size=20).hexdigest()}{SUFFIX}"

    def _make_room(self, size: int) -> None:
        key = str(self.directory)
        written = _written.get(key, -1)
        if written >= 0 and written + size <= SLACK * self.limit:
            _written[key] = written + size
            return
        entries = sorted(self._entries(), key=lambda entry: entry[0])
        held, now = sum(length for _, length, _ in entries), time.time()
        for used, length, path in entries:
            if held + size <= FILL * self.limit:
                break
            if path.suffix == SUFFIX or now - used > STALE:
                path.unlink(missing_ok=True)
                held -= length
        _written[key] = size

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of everything that is kept, or being written, or was when its writer was killed."""
        found = []
        with os.scandir(self.directory) as scan:
            for entry in scan:
                with suppress(FileNotFoundError):  # another task removed it
                    if entry.name.endswith((SUFFIX, UNFINISHED)):
                        status = entry.stat()
                        found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return found


def _checksum(data: bytes) -> bytes:
    return isal_zlib.crc32(data).to_bytes(CHECKSUM, "little")
