"""What a machine is: versions, GPUs, memory, disks, limits, and whether it sees the directories that the others see.

Looked at by the machine itself, as a Ray actor on every node; nothing here knows Ray.
"""

import hashlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from mmearth_ray import __version__
from mmearth_ray.files import write_failure

PACKAGES = ("torch", "ray", "deepspeed", "pyarrow", "numpy")
SHARED_MEMORY = Path("/dev/shm")

SCRATCH = "temporary files"
"""Name of the disk on which files lie that are on their way to a store, which every machine chooses by its TMPDIR."""


class Disk(NamedTuple):
    """A file system: where it was asked for, bytes in all, bytes free for this user."""

    path: str
    total: int
    free: int


class Gpu(NamedTuple):
    """A GPU as its driver names it: memory in bytes, compute capability as 8.9."""

    name: str
    memory: int
    capability: float
    driver: str


class Shared(NamedTuple):
    """A file that all machines must see: where, the digest of its content, and whether they must write beside it."""

    file: Path
    digest: str
    written: bool


@dataclass(frozen=True)
class Wanted:
    """What a machine is to look at: disks by what they are for, and by directory the file there that all must see."""

    disks: Mapping[str, Path]
    shared: Mapping[str, Shared] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What a machine says of itself.

    `memory` bytes; `unshared`: for each directory that was tried, why it is not the one of the others, "" if it is.
    """

    name: str
    versions: Mapping[str, str]
    cores: int
    memory: int
    open_files: int
    gpus: tuple[Gpu, ...]
    disks: Mapping[str, Disk]
    shared_memory: Disk | None
    unshared: Mapping[str, str] = field(default_factory=dict)


def look(wanted: Wanted, name: str = "") -> Machine:
    """Look at this machine."""
    shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    return Machine(
        name=name or socket.gethostname(),
        versions=versions(),
        cores=len(os.sched_getaffinity(0)),
        memory=_memory(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],  # Ray raises the soft limit itself
        gpus=gpus(),
        disks={use: disk_of(path) for use, path in {**_temporary(), **wanted.disks}.items()},
        shared_memory=disk_of(shared) if shared else None,
        unshared={folder: _unshared(shared) for folder, shared in wanted.shared.items()},
    )


def _temporary() -> dict[str, Path]:
    with suppress(OSError):
        return {SCRATCH: Path(tempfile.gettempdir())}
    return {}


def versions() -> dict[str, str]:
    """Versions of what a run computes with, without the build's tag (+cpu, +cu130); "none" for a package that is not there."""
    found = {"mmearth_ray": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = "none"
    return found


def disk_of(path: Path) -> Disk:
    """The file system of a path, or of the directory in which it would be made."""
    while not path.exists() and path != path.parent:
        path = path.parent
    usage = shutil.disk_usage(path)
    return Disk(str(path), usage.total, usage.free)


def _memory() -> int:
    """Bytes of memory, or of the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    for limit in limits:
        with suppress(OSError, ValueError):  # absent, or "max"
            total = min(total, int(limit.read_text()))
    return total


QUERY = "name,memory.total,compute_cap,driver_version"


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that the driver shows, also to a process that Ray has given none."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(read_gpu(line) for line in done.stdout.splitlines() if line.count(",") == QUERY.count(","))


def read_gpu(line: str) -> Gpu:
    """A line of nvidia-smi; what it cannot tell ([N/A], as memory of GPUs that share the host's) is 0."""
    name, memory, capability, driver = (part.strip() for part in line.split(","))
    return Gpu(name, int(_number(memory) * 2**20), _number(capability), driver)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def digest_of(file: Path) -> str:
    """Of the content of a file.  Raises OSError."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _unshared(shared: Shared) -> str:
    """Why this machine has another directory than the one that asks, or cannot write there; "" if all is well."""
    try:
        same = digest_of(shared.file) == shared.digest
    except OSError:
        same = False
    if not same:
        return f"does not see the {shared.file.name} that this command sees there; put it on storage that all machines share"
    if not shared.written:
        return ""
    own = shared.file.with_name(f"{shared.file.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        own.write_text("", encoding="utf-8")
    except OSError as error:
        return f"{write_failure(own, error)}; correct the permissions there"
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)
    return ""
