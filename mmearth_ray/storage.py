"""Places: local paths and the URLs of object stores.

A place is a `pathlib.Path`, or a `UPath` for a URL that fsspec knows: s3://bucket/prefix through s3fs, which finds
credentials, region and endpoint where every AWS tool does (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, an instance's
role; FSSPEC_S3_ANON=true for public buckets).  Throttling, server errors, resets and truncated bodies are asked again (see
`patience`); nothing is remembered of what a store lists.
"""

import errno
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from upath import UPath

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.patience import PATIENCE, Absent, Patience, counted, explained, is_passing, patiently

Location = Path | UPath

PART = 8 << 20
"""Longer ranges are read as several requests at once: a store gives each connection only so much."""

REQUESTS = 16
"""Small objects that are asked for side by side."""

S3: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 20, "max_pool_connections": 64,
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


def request(place: UPath, patience: Patience, method: str, *arguments: Any, size: int = 0, **named: Any) -> Any:
    """What a method of the place's file system returns; given up if it takes too long for `size` bytes.

    The client's own limits do not cover all: nothing watches the sending of a request that nobody reads.
    """
    system = filesystem(place)
    limit = patience.limit(size)
    try:
        return getattr(system, method)(*arguments, **named, **({"timeout": limit} if system.async_impl else {}))
    except fsspec.FSTimeoutError as error:
        raise TimeoutError(f"no answer within {limit:.3g} s") from error


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
    info, faults = counted(place, lambda: request(place, patience, "info", place.path), patience)
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
        return patiently(place, lambda: request(place, PATIENCE, "info", place.path))["type"] == "file"
    except Absent:
        return False


def sizes(folder: Location) -> dict[str, int]:
    """{name: bytes} of what lies directly in a folder, sub-folders included; nothing where there is no such folder."""
    if isinstance(folder, Path):
        return {entry.name: entry.stat().st_size for entry in folder.iterdir()} if folder.is_dir() else {}
    try:
        found = patiently(folder, lambda: request(folder, PATIENCE, "ls", folder.path, detail=True))
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
        found = patiently(folder, lambda: request(folder, PATIENCE, "find", folder.path))
    except Absent:
        return []
    return sorted(path.strip("/").removeprefix(start) for path in found if path.strip("/").startswith(start))


def read_bytes(place: Location) -> bytes:
    """All of a small file.  Raises Absent and DataError."""
    if not isinstance(place, Path):
        return patiently(place, lambda: request(place, PATIENCE, "cat_file", place.path, start=0, size=PART))
    try:
        return place.read_bytes()
    except FileNotFoundError as error:
        raise Absent(f"{place} does not exist") from error
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error.strerror})") from error


def remove(place: Location) -> None:
    """Remove a file, or a folder with all it holds; nothing happens where there is none.  Raises DataError."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
        return

    def drop(path: str) -> None:
        with suppress(Absent):
            patiently(place, lambda: request(place, PATIENCE, "rm_file", path))

    with suppress(Absent), ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(drop, patiently(place, lambda: request(place, PATIENCE, "find", place.path))))


# ---- ranges ----


def read_ranges(place: UPath, ranges: Sequence[tuple[int, int]], patience: Patience = PATIENCE) -> tuple[list[bytes], int]:
    """The bytes start..stop-1 of each range, read side by side, and how many requests failed before they came.

    Only what failed is asked for again.  A shorter answer than asked for is a fault as well.  Raises Absent and DataError.
    """
    parts = [(start, min(start + PART, stop)) for begin, stop in ranges for start in range(begin, stop, PART)]
    found: dict[tuple[int, int], bytes] = {}
    began, attempt, faults = time.monotonic(), 0, 0
    while missing := [part for part in parts if part not in found]:
        errors = []
        for part, answer in zip(missing, _ask(place, missing, patience), strict=True):
            if isinstance(answer, Exception):
                errors.append(answer)
            elif len(answer) != part[1] - part[0]:
                errors.append(OSError(errno.EIO, f"{len(answer)} of {part[1] - part[0]} bytes came"))
            else:
                found[part] = answer
        faults += len(errors)
        lasting = [error for error in errors if not is_passing(error)]
        if errors and (lasting or not patience.pause(attempt, began)):
            error = (lasting or errors)[0]
            raise explained(place, error, attempt + 1) from error
        attempt += 1
    return [_joined(found, begin, stop) for begin, stop in ranges], faults


def _ask(place: UPath, parts: Sequence[tuple[int, int]], patience: Patience) -> list[bytes | Exception]:
    starts, stops = [part[0] for part in parts], [part[1] for part in parts]
    try:
        return request(
            place, patience, "cat_ranges", [place.path] * len(parts), starts, stops,
            on_error="return", size=sum(stops) - sum(starts),
        )  # fmt: skip
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
