"""What the processes of a command use: CPU seconds and memory by role, read from /proc (Linux only).

Ray starts its daemons and workers as descendants of the driver, so the tree below one process is all that a run takes from a
machine.  Roles follow from Ray's own process titles; a worker is `ray::IDLE` between its tasks.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds in one unit of utime and stime of /proc/PID/stat (proc(5))."""

DRIVER, WORKERS, TASKS, IDLE, DAEMONS = "driver", "train workers", "data tasks", "idle workers", "agents and monitors"
TITLES = {
    "ray::IDLE": IDLE,
    "ray::RayTrainWorker": WORKERS,
    "ray::_RayTrainWorker": WORKERS,
    "ray::MapBatches": TASKS,
    "ray::ReadRange": TASKS,
    "ray::DashboardAgent": DAEMONS,
    "ray::RuntimeEnvAgent": DAEMONS,
    "ray::": "actors",
}
"""Roles by how the title of a Ray process begins; the first that fits."""

PROGRAMS = {"gcs_server": "gcs", "raylet": "raylet"}
"""Roles by the name of the executable; the other processes of Ray are its agents and monitors."""


@dataclass
class Tree:
    """The processes below (and with) a root, watched by calling `look` now and then.

    `seconds[pid]`: user and system time so far, of ended processes up to the last look at them.  `peak`: the most bytes at
    one look, private pages of all processes and the shared memory of the one that maps most.
    """

    root: int
    seconds: dict[int, float] = field(default_factory=dict)
    roles: dict[int, str] = field(default_factory=dict)
    peak: int = 0

    def look(self) -> dict[int, float]:
        """Look at every process; returns a copy of `seconds`."""
        private, shared = 0, 0
        for pid in descendants(self.root):
            found = _usage(pid)
            if found is None:
                continue
            self.seconds[pid], anonymous, mapped = found
            private, shared = private + anonymous, max(shared, mapped)
            role = DRIVER if pid == self.root else role_of(_command(pid))
            if role != IDLE or pid not in self.roles:  # between tasks a process counts as what it ran last
                self.roles[pid] = role
        self.peak = max(self.peak, private + shared)
        return dict(self.seconds)

    def spent(self, before: Mapping[int, float], after: Mapping[int, float]) -> dict[str, float]:
        """CPU seconds by role between two looks."""
        total: dict[str, float] = {}
        for pid, seconds in after.items():
            role = self.roles[pid]
            total[role] = total.get(role, 0.0) + seconds - before.get(pid, 0.0)
        return total


def role_of(command: list[str]) -> str:
    """What a process is for, by its command line."""
    program = command[0] if command else ""
    for title, role in TITLES.items():
        if program.startswith(title):
            return role
    return PROGRAMS.get(Path(program).name, DAEMONS)


def descendants(root: int) -> list[int]:
    """The root and all processes below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _read(pid: int, name: str) -> str:
    """A file of /proc/PID; nothing where the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _command(pid: int) -> list[str]:
    return _read(pid, "cmdline").rstrip("\0").split("\0")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on; the second, a name in brackets, may hold anything."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _usage(pid: int) -> tuple[float, int, int] | None:
    """CPU seconds, and bytes of private and of shared memory; none for a process that is gone or going."""
    stat = _stat(pid)
    memory = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in _read(pid, "status").splitlines() if "Rss" in line}
    if not stat or not memory:
        return None
    return (int(stat[11]) + int(stat[12])) * TICK, memory["RssAnon"], memory["RssShmem"]
