"""Points of a sweep on disk: a JSON file for each, complete or absent, finished or failed.

A file is named by the point and by a digest of all that gives its numbers their meaning: the point itself, the machine that
the command runs on (device and cores), PyTorch's version, and the source text of what is measured.  Another machine, PyTorch
or model is measured anew; an edit elsewhere in the project is not.  On a cluster of unlike machines, give each kind a
directory of its own: which of them a point will run on is not known before.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import benchmarks
import mmearth_ray
from benchmarks.sweep_point import Measurement, Point
from mmearth_ray.errors import DataError
from mmearth_ray.files import atomic_text, write_failure
from mmearth_ray.model.encoder import SIZES

MEASURED = ("model/*.py", "losses.py", "modalities.py", "objective.py")
MEASURING = ("computations.py", "masked_dense.py", "plain.py", "subject.py", "sweep_point.py", "timing.py")
"""Sources of what is measured, in the package, and of how, in the benchmarks."""


@dataclass(frozen=True)
class Record:
    """A point, what is needed to measure it again, and its numbers or why there are none."""

    point: Point
    about: dict[str, Any]
    result: Measurement | None
    failure: str = ""

    @property
    def machine(self) -> str:
        """What the numbers were measured on."""
        return f"{self.about['device']}, {self.about['cores']} cores"

    @property
    def time(self) -> str:
        """When it was measured: UTC, ISO 8601."""
        return self.about["time"]


class Store:
    """The records of a directory.  `about`: the circumstances of this process."""

    def __init__(self, directory: Path, about: dict[str, Any]) -> None:
        self.folder = directory / "points"
        self.meaning = {name: about[name] for name in ("device", "cores", "torch")} | {"sources": sources_digest()}

    def path(self, point: Point) -> Path:
        """Where a point's record belongs."""
        text = json.dumps({"point": asdict(point), **self.meaning}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{point.size}-{point.image}-{point.patch}-{digest}.json"

    def is_finished(self, point: Point) -> bool:
        """Whether the point has its numbers: no file, half a file and a failure all mean that it has not."""
        record = read(self.path(point))
        return record is not None and record.point == point and record.result is not None

    def write(self, record: Record) -> None:
        """Write a record.  Raises DataError if the disk does not take it."""
        path = self.path(record.point)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(write_failure(path.parent, error)) from error
        atomic_text(path, json.dumps(asdict(record), indent=1) + "\n")


def read(path: Path) -> Record | None:
    """The record in a file; None where there is none, or none that is whole."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(path.read_text(encoding="utf-8"))
        result = None if entry["result"] is None else Measurement(**entry["result"])
        record = Record(Point(**entry["point"]), entry["about"], result, entry["failure"])
        if record.machine and record.time and (result or record.failure):
            return record
    return None


def read_all(directory: Path) -> list[Record]:
    """The records of a directory, small models before large ones.

    Of a point that was measured more than once on a machine, with other steps or versions, the newest.
    """
    found = [record for path in sorted(directory.glob("points/*.json")) if (record := read(path))]
    newest = {_place(record): record for record in sorted(found, key=lambda record: record.time)}
    return [newest[place] for place in sorted(newest)]


def _place(record: Record) -> tuple[Any, ...]:
    point = record.point
    size = [*SIZES, point.size].index(point.size)
    return (record.machine, point.device, point.image, point.patch, point.backend, point.precision, size, point.batch)


@cache
def sources_digest() -> str:
    """A digest of the source text that the numbers depend on."""
    places = [(Path(mmearth_ray.__file__).parent, MEASURED), (Path(benchmarks.__file__).parent, MEASURING)]
    digest = hashlib.sha256()
    for root, patterns in places:
        for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
