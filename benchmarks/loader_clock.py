"""Taking batches against the clock: consumers that do nothing else, in a stretch of time that all of them share.

Only the standard library is needed, so that loaders in other environments are timed by the same lines.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from zlib import crc32

LINGER = 0.6
"""Seconds that processes stay after the time that counts, so that who watches from outside sees all of it."""


@dataclass(frozen=True)
class Job:
    """One way of loading, to be measured in a process of its own on so many cores.

    `data`: directory, file or URL that the way reads; `image`, `patch` in px; `warm`: seconds after the first batch that do not
    count; `seconds`: how long counts at least; `meeting`: an empty folder where consumers meet.
    """

    way: str
    data: str
    cores: int
    image: int
    patch: int
    batch: int
    warm: float
    seconds: float
    meeting: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Job":
        return Job(**json.loads(text))


@dataclass(frozen=True)
class Taken:
    """What a consumer took.  Times in seconds of the system's monotonic clock, which all processes share.

    `asked`: when it began; `came`: (time, tiles) of each batch.  With tiles 0, the time since the last batch does not count.
    """

    asked: float
    came: list[tuple[float, int]]


@dataclass(frozen=True)
class Stretch:
    """What all consumers together got in the time that counts: from `begin` to `end`, so many tiles per second.

    `first`: seconds until the last consumer had its first batch; `spilled`: whether Ray's object store wrote to disk.
    """

    begin: float
    end: float
    tiles_per_second: float
    first: float
    spilled: bool = False


def take(tiles: Iterable[int], job: Job, rank: int = 0, count: int = 1) -> Taken:
    """Take batches, given by their numbers of tiles, until this and the other of `count` consumers have had enough."""
    asked, came, enough = time.monotonic(), list[tuple[float, int]](), False
    for number in tiles:
        now = time.monotonic()
        came.append((now, number))
        begin = came[0][0] + job.warm
        enough = enough or (now >= begin + job.seconds and sum(n > 0 and at > begin for at, n in came[-3:]) >= 2)
        if enough and _all_have(Path(job.meeting), rank, count):
            break
    return Taken(asked, came)


def _all_have(meeting: Path, rank: int, count: int) -> bool:
    """Whether all consumers have had enough, of which this is one."""
    if count == 1:
        return True
    (meeting / str(rank)).touch()
    return sum(1 for _ in meeting.iterdir()) >= count


def stretch(taken: Sequence[Taken], warm: float) -> Stretch:
    """The time that counts begins when the last consumer is warm and ends when the first one stops."""
    begin, end = max(t.came[0][0] + warm for t in taken), min(t.came[-1][0] for t in taken)
    first = max(t.came[0][0] - t.asked for t in taken)
    return Stretch(begin, end, sum(_rate(t, begin) for t in taken), first)


def _rate(taken: Taken, begin: float) -> float:
    """Tiles per second between the batch that a consumer held at that time and its last one."""
    held = sum(at <= begin for at, _ in taken.came) - 1
    came = taken.came[held:]
    paused = sum(at - before for (before, _), (at, tiles) in pairwise(came) if not tiles)
    return sum(tiles for _, tiles in came[1:]) / (came[-1][0] - came[0][0] - paused)


def pin(cores: int) -> None:
    """Keep this process and all that it starts on the last so many of its cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def box_of(tile: str, room: int) -> tuple[int, int]:
    """Offsets (top, left) below `room` of a tile's crop, for loaders that have no rule of their own."""
    number = crc32(tile.encode())
    return number % room, number // room % room
