"""Places: local paths and the URLs of object stores.

A place is a `pathlib.Path`, or a `UPath` for a URL that fsspec knows: s3://bucket/prefix through s3fs, which finds
credentials, region and endpoint where every AWS tool does (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, an instance's
role; FSSPEC_S3_ANON=true for public buckets).  Throttling, server errors, resets and truncated bodies are asked again (see
`patience`); nothing is remembered of what a store lists.
"""

import errno
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from upath import UPath

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.patience import PATIENCE, Absent, Patience, counted, explained, is_passing, patiently

Location = Path | UPath

PART = 8 << 20
"""Longer ranges are read as several requests at once: a store gives each connection only so much."""

BLOCK = 8 * PART
"""Bytes of a remote file that are held in memory while it is copied."""

REQUESTS = 16
"""Small objects that are asked for side by side."""

S3: dict[str, Any] = {
    "use_listings_cache": False,
    "max_concurrency": 4,  # parts of 50 MB that an upload holds in memory
    "config_kwargs": {
        "retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 30, "max_pool_connections": 64,
    },
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"s3": S3, "s3a": S3}
"""What the file system of a protocol is made with.  Only this module asks again, so that every fault is counted."""


def locate(text: str, key: str) -> Location:
    """The place that a setting names.  Raises UsageError for a URL whose protocol is unknown or has no package installed."""
    protocol, mark, rest = text.partition("://")
    if not mark:
        return Path(text).expanduser()
    if protocol == "file":
        return Path(rest)
    try:
        if not protocol:
            raise ValueError("no protocol is named")
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{key}={text}: {' '.join(str(error).split())}; use a path, s3://bucket/prefix or another URL that "
                         "fsspec knows") from error  # fmt: skip
    if not rest.strip("/"):
        raise UsageError(f"{key}={text}: names no bucket; write {protocol}://bucket/prefix")
    return UPath(text.rstrip("/"), **OPTIONS.get(protocol, {"use_listings_cache": False}))


def is_remote(place: Location) -> bool:
    return not isinstance(place, Path)


def filesystem(place: UPath) -> Any:
    """The place's fsspec file system, the same object for all places of a store, which keeps its connections."""
    system: Any = place.fs
    if hasattr(system, "retries"):  # s3fs asks again by itself, uncounted
        system.retries = 1
    return system


# ---- files and folders ----


@dataclass(frozen=True)
class Stamp:
    """What tells one content of a file from the next: its size, and the store's tag (S3: ETag) or time."""

    size: int
    tag: str


def stamp(place: UPath, patience: Patience = PATIENCE) -> Stamp:
    """The object's stamp as it is now.  Raises Absent and DataError."""
    return counted_stamp(place, patience)[0]


def counted_stamp(place: UPath, patience: Patience = PATIENCE) -> tuple[Stamp, int]:
    """The same, and how many requests failed before it came."""
    info, faults = counted(place, lambda: filesystem(place).info(place.path), patience)
    tag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created")
    return Stamp(int(info["size"] or 0), str(tag)), faults  # folders of some stores have no size


def exists(place: Location) -> bool:
    """Whether there is a file, or anything in a folder of that name.  Raises DataError."""
    if isinstance(place, Path):
        return place.exists()
    try:
        stamp(place)
    except Absent:
        return False
    return True


def is_file(place: Location) -> bool:
    """Whether there is a file of that name.  Raises DataError."""
    if isinstance(place, Path):
        return place.is_file()
    try:
        return patiently(place, lambda: filesystem(place).info(place.path))["type"] == "file"
    except Absent:
        return False


def sizes(folder: Location) -> dict[str, int]:
    """{name: bytes} of what lies directly in a folder, sub-folders included; nothing where there is no such folder."""
    if isinstance(folder, Path):
        return {entry.name: entry.stat().st_size for entry in folder.iterdir()} if folder.is_dir() else {}
    try:
        found = patiently(folder, lambda: filesystem(folder).ls(folder.path, detail=True))
    except Absent:
        return {}
    own = folder.path.strip("/")
    given = {entry["name"].strip("/"): int(entry["size"] or 0) for entry in found}
    return {name.rpartition("/")[2]: size for name, size in given.items() if name != own}


def names(folder: Location) -> list[str]:
    """Names of what lies directly in a folder, sorted; none where there is no such folder."""
    return sorted(sizes(folder))


def below(folder: UPath) -> list[str]:
    """Names of all files below a folder, relative to it, sorted."""
    start = folder.path.strip("/") + "/"
    try:
        found = patiently(folder, lambda: filesystem(folder).find(folder.path))
    except Absent:
        return []
    return sorted(path.strip("/").removeprefix(start) for path in found if path.strip("/").startswith(start))


def read_bytes(place: Location) -> bytes:
    """All of a small file.  Raises Absent and DataError."""
    if not isinstance(place, Path):
        return patiently(place, lambda: filesystem(place).cat_file(place.path, start=0))
    try:
        return place.read_bytes()
    except FileNotFoundError as error:
        raise Absent(f"{place} does not exist") from error
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error.strerror})") from error


def upload(local: Path, place: UPath) -> None:
    """Put a local file: a store shows it whole or not at all.  Raises DataError.

    Long files go in parts, each of which is asked for again by itself.
    """
    options = OPTIONS.get(place.protocol, {})
    if "config_kwargs" in options:
        retries = {"mode": "standard", "total_max_attempts": 4}
        place = UPath(place, **options | {"config_kwargs": options["config_kwargs"] | {"retries": retries}})
    patiently(place, lambda: filesystem(place).put_file(str(local), place.path))


def remove(place: Location) -> None:
    """Remove a file, or a folder with all it holds; nothing happens where there is none.  Raises DataError."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
        return
    system = filesystem(place)

    def drop(path: str) -> None:
        with suppress(Absent):
            patiently(place, lambda: system.rm_file(path))

    with suppress(Absent), ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(drop, patiently(place, lambda: system.find(place.path))))


@contextmanager
def at_hand(folder: Location, files: Iterable[str]) -> Iterator[Path]:
    """A local folder with those files: `folder` itself, or copies that go when they are no longer used.

    Raises Absent and DataError.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with TemporaryDirectory(prefix="mmearth-ray-") as local:
        for name in files:
            _download(folder / name, Path(local) / name)
        yield Path(local)


def _download(place: UPath, local: Path) -> None:
    size = stamp(place).size
    try:
        with local.open("wb") as file:
            for start in range(0, size, BLOCK):
                (data,), _ = read_ranges(place, [(start, min(start + BLOCK, size))])
                file.write(data)
    except OSError as error:
        raise DataError(f"cannot copy {place} to {local.parent} ({error.strerror or error}); free some space, or set TMPDIR "
                        "to a directory with more") from error  # fmt: skip


# ---- ranges ----


def read_ranges(place: UPath, ranges: Sequence[tuple[int, int]], patience: Patience = PATIENCE) -> tuple[list[bytes], int]:
    """The bytes start..stop-1 of each range, read side by side, and how many requests failed before they came.

    Only what failed is asked for again.  A shorter answer than asked for is a fault as well.  Raises Absent and DataError.
    """
    parts = [(start, min(start + PART, stop)) for begin, stop in ranges for start in range(begin, stop, PART)]
    found: dict[tuple[int, int], bytes] = {}
    faults = 0
    for attempt in range(patience.attempts):
        missing = [part for part in parts if part not in found]
        errors = []
        for part, answer in zip(missing, _ask(place, missing), strict=True):
            if isinstance(answer, Exception):
                errors.append(answer)
            elif len(answer) != part[1] - part[0]:
                errors.append(OSError(errno.EIO, f"{len(answer)} of {part[1] - part[0]} bytes came"))
            else:
                found[part] = answer
        if not errors:
            break
        faults += len(errors)
        lasting = [error for error in errors if not is_passing(error)]
        if lasting or attempt + 1 == patience.attempts:
            error = (lasting or errors)[0]
            raise explained(place, error, attempt + 1) from error
        time.sleep(patience.wait(attempt))
    return [_joined(found, begin, stop) for begin, stop in ranges], faults


def _ask(place: UPath, parts: Sequence[tuple[int, int]]) -> list[bytes | Exception]:
    starts, stops = [part[0] for part in parts], [part[1] for part in parts]
    try:
        return filesystem(place).cat_ranges([place.path] * len(parts), starts, stops, on_error="return")
    except Exception as error:  # of the connection as a whole
        return [error] * len(parts)


def _joined(found: dict[tuple[int, int], bytes], begin: int, stop: int) -> bytes:
    pieces = [found[start, min(start + PART, stop)] for start in range(begin, stop, PART)]
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def merged(ranges: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """The ranges in order, those joined between which at most `gap` bytes lie."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
