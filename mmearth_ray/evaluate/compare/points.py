"""Points of a comparison on disk: a JSON file for each, with what was predicted beside it, complete or absent.

A point is one encoder, one protocol, one share of the labels, one seed.  Its file is named by a digest of everything that
decides its score, so a command that is started again finds what is done, and nothing else.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.features.encoders import Subject
from mmearth_ray.files import atomic_text, complete_or_absent, write_failure

FORM = 2
POINTS = "points"


@dataclass(frozen=True, eq=False)
class Point:
    """What is scored: `label` is what reports call the encoder; `fixed` is what all points of a comparison have in common.

    `seed` chooses the labels, and the weights that a protocol starts from.
    """

    label: str
    subject: Subject
    protocol: str
    fraction: float
    seed: int
    fixed: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Hex digest of all that decides the score; names and places are no part of it."""
        known = {"form": FORM, "subject": self.subject.digest, "protocol": self.protocol, "fraction": self.fraction,
                 "seed": self.seed, "fixed": dict(self.fixed)}  # fmt: skip
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        return f"{self.label}, {self.protocol}, {100 * self.fraction:g} % of labels, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a point.

    `metrics` of the whole test split, None where one is undefined; `low` and `high` of the primary one, over test images.
    `absent`: classes without a label in training.  Seconds: of computing features, per image (None where the encoder is
    trained itself), and of fitting.
    """

    metrics: dict[str, float | None]
    low: float | None
    high: float | None
    n_train: int
    n_valid: int
    n_test: int
    chosen: dict[str, Any]
    absent: tuple[str, ...]
    width: int
    seconds_features: float | None
    seconds_fit: float
    notes: tuple[str, ...] = ()
    machine: dict[str, Any] = field(default_factory=dict)


class Store:
    """The points below a folder."""

    def __init__(self, out: Path) -> None:
        self.folder = out / POINTS

    def is_done(self, point: Point) -> bool:
        """Whether the point has its score: no file, half a file and a failure all mean that it has not."""
        return self.read(point) is not None

    def read(self, point: Point) -> Result | None:
        """What came out of the point; None where nothing whole is there."""
        return _result(self._entry(point).get("result")) if self._arrays_path(point).is_file() else None

    def failure(self, point: Point) -> str:
        """Why the point has no score, one line; empty where it has one, or was never tried."""
        return str(self._entry(point).get("failure") or "")

    def arrays(self, point: Point) -> dict[str, np.ndarray]:
        """What was predicted.  Raises DataError if the file is damaged."""
        path = self._arrays_path(point)
        try:
            with np.load(path, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
        except Exception as error:  # whatever zip and npy files raise for a damaged one
            raise DataError(f"{path} is damaged; remove it, and the command computes it again") from error

    def write(self, point: Point, result: Result, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a score: the JSON comes last, and makes it complete.  Raises DataError if the disk does not take it."""
        self._make()
        with complete_or_absent(self._arrays_path(point)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        self._write_entry(point, {"result": asdict(result), "failure": ""})

    def write_failure(self, point: Point, failure: str, trace: str = "") -> None:
        """Keep why a point has no score; it is tried again when the command is started again."""
        self._make()
        self._write_entry(point, {"result": None, "failure": failure, "trace": trace})

    def clean(self) -> None:
        """Remove what processes that were killed have left half written."""
        for path in self.folder.glob(".*.tmp"):
            owner = re.search(r"\.(\d+)\.tmp$", path.name)
            if owner and not psutil.pid_exists(int(owner[1])):
                path.unlink(missing_ok=True)

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(write_failure(self.folder, error)) from error

    def _write_entry(self, point: Point, body: Mapping[str, Any]) -> None:
        subject = point.subject
        about = {"label": point.label, "subject": subject.spec, "digest": subject.digest, "protocol": point.protocol,
                 "fraction": point.fraction, "seed": point.seed, "fixed": dict(point.fixed)}  # fmt: skip
        text = json.dumps({"form": FORM, "point": about, **body}, indent=1)
        atomic_text(self.folder / f"{point.key}.json", text + "\n")

    def _entry(self, point: Point) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            entry = json.loads((self.folder / f"{point.key}.json").read_text(encoding="utf-8"))
            if isinstance(entry, dict) and entry.get("form") == FORM:
                return entry
        return {}

    def _arrays_path(self, point: Point) -> Path:
        return self.folder / f"{point.key}.npz"


def _result(found: Any) -> Result | None:
    with suppress(TypeError, KeyError):
        return Result(**{**found, "absent": tuple(found["absent"]), "notes": tuple(found["notes"])})
    return None
