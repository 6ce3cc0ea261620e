"""What the processes of a run and its object store hold, seen from outside while the run goes on."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from command import descendants, title_of

TRAINER, DATA_TASK, SPILLER, RAYLET = "ray::RayTrainWorker", "_Prepare", "SpillWorker", "raylet/raylet "
STORE, BESIDE_STORE = "/dev/shm/plasma", "/plasma"
"""Files that objects are in, and those that Ray makes elsewhere where the store is full."""


class Sample(NamedTuple):
    """Bytes at one moment, when so many steps were done.

    `trainers`, `data_tasks`: by process, what it holds beside the pages of the object store that it has mapped.
    `store`: memory that the object store ever took from the system, which it never gives back.
    `spilled`: whether objects went to disk since the last look for want of room.
    """

    step: int
    trainers: dict[int, int]
    data_tasks: dict[int, int]
    store: int
    spilled: bool


class Watch:
    """Looks at a pretraining process, which has started a Ray of its own, and at everything below it."""

    def __init__(self, pid: int) -> None:
        self.pid, self.data_tasks = pid, set[int]()

    def look(self, step: int) -> Sample:
        """What is held now.  A process that was once seen at a data task is one, also while it waits for another."""
        titles = {child: title_of(child) for child in descendants(self.pid)}
        self.data_tasks |= {child for child, title in titles.items() if DATA_TASK in title}
        raylets = [child for child, title in titles.items() if RAYLET in title]
        files = [file for raylet in raylets for file in files_of(raylet)]
        return Sample(
            step,
            {child: own_memory(child) for child, title in titles.items() if title.startswith(TRAINER)},
            {child: own_memory(child) for child in titles if child in self.data_tasks},
            sum(size for name, size in files if name.startswith(STORE)),
            any(BESIDE_STORE in name and not name.startswith(STORE) for name, _ in files)
            or any(SPILLER in title for title in titles.values()),
        )


def own_memory(pid: int) -> int:
    """Resident bytes without shared memory; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssFile:")))


def files_of(pid: int) -> list[tuple[str, int]]:
    """(name, bytes that it takes) of the open files of a process; none if it is gone."""
    found = []
    with suppress(OSError):  # the process is gone
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # the file is closed
                found.append((str(file.readlink()), file.stat().st_blocks * 512))
    return [(name, size) for name, size in found if name.startswith("/")]
