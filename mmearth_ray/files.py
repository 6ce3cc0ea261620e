"""Files and folders that appear under their names complete, or not at all.

What has to do with local files only imports no package for object stores.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mmearth_ray.errors import DataError, UsageError

if TYPE_CHECKING:
    from upath import UPath

    from mmearth_ray.storage import Location

LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on a disk that has no locks (man 2 flock)."""


@contextmanager
def complete_or_absent(path: "Location") -> Iterator[Path]:
    """A temporary local path to write to: what is there takes the name when all went well, and is removed otherwise.

    Raises DataError if the disk or the store does not take it.
    """
    if not isinstance(path, Path):
        with _uploaded(path) as temporary:
            yield temporary
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(write_failure(path, error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _uploaded(place: "UPath") -> Iterator[Path]:
    from mmearth_ray.copies import scratch, upload

    with scratch() as folder:
        temporary = folder / place.name
        try:
            yield temporary
        except OSError as error:
            raise DataError(f"{write_failure(temporary, error)}, on its way to {place}") from error
        upload(temporary, place)


@contextmanager
def complete_or_absent_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder: what was there under its name before stays until the new one is complete.

    Raises DataError if the disk does not take it.
    """
    incoming, removed = (folder.with_name(f".{folder.name}.{os.getpid()}.{part}") for part in ("incoming", "removed"))
    try:
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        yield incoming
        for path in [*incoming.rglob("*"), incoming]:
            flush(path)
        if folder.exists():
            folder.replace(removed)
        incoming.replace(folder)
        flush(folder.parent)
    except OSError as error:
        raise DataError(write_failure(folder, error)) from error
    finally:
        if removed.exists() and not folder.exists():
            removed.replace(folder)
        for left in (incoming, removed):
            shutil.rmtree(left, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_failure(path: "Location", error: Exception) -> str:
    """One line on why a file could not be written, and what to do."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return f"no space left on the disk of {path.parent} while writing {path.name}; free some and run the command again"
    return f"cannot write {path}: {getattr(error, 'strerror', None) or error}"


def atomic_text(path: "Location", text: str) -> None:
    """Write a text file that is either complete or absent.  Raises DataError if the disk or the store does not take it."""
    with complete_or_absent(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path, does: str, key: str) -> Iterator[None]:
    """Hold a folder for this command alone; `does` and `key` tell another one what goes on there and which setting names it.

    Raises DataError if it cannot be made, UsageError if another command holds it.  A disk without locks, as some network
    disks are, lets both go on.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(write_failure(folder, error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another command {does} {folder}; wait for it, or use another {key}") from error
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise DataError(write_failure(folder, error)) from error
        yield
