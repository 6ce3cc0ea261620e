"""What a run asks to be evaluated, and what came of it, on disk.

    step-00000100-1a2b3c4d/   a request: what it hands over with `request.json`, there as a whole or not at all
    step-00000100.json        its outcome: what was found, or why nothing was

A start that goes on from a step finds here what is still to be done, and what was done but is in no line of the metrics that
were kept.  No two starts write to the same request.
"""

import json
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmearth_ray.errors import DataError, one_line
from mmearth_ray.files import atomic_text, complete_or_absent_folder, write_failure

REQUEST, RESULT = "request.json", "result.json"
ENCODER = "encoder"
"""In a request's folder: the encoder, as an exported model."""

_NAME = re.compile(r"step-(\d{8})(-[0-9a-f]{8}|\.json)")

Outcome = dict[str, Any]
Fill = Callable[[Path], object]


@dataclass(frozen=True)
class Request:
    """One that is on disk.  `skipped`: steps before it whose requests it has replaced."""

    step: int
    folder: Path
    skipped: tuple[int, ...] = ()


def write_request(place: Path, step: int, skipped: Collection[int], content: Mapping[str, Any], fill: Fill) -> Request:
    """Write a request: `content`, and what `fill` puts into its folder.  Raises DataError if the disk does not take it."""
    folder = place / f"step-{step:08d}-{secrets.token_hex(4)}"
    with complete_or_absent_folder(folder) as incoming:
        fill(incoming)
        text = json.dumps({**content, "step": step, "skipped": sorted(skipped)})
        (incoming / REQUEST).write_text(text + "\n", encoding="utf-8")
    return Request(step, folder, tuple(sorted(skipped)))


def result_of(request: Request) -> Outcome:
    """What the process of a request has found.  Raises DataError if it left nothing."""
    try:
        return json.loads((request.folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"it left no {RESULT} ({one_line(error)})") from error


def settle(place: Path, request: Request, outcome: Outcome) -> Outcome:
    """Write the outcome of a request, with what it skipped, and remove the request.  Raises DataError if the disk is full."""
    outcome = outcome | ({"skipped": list(request.skipped)} if request.skipped else {})
    atomic_text(place / f"step-{request.step:08d}.json", json.dumps(outcome) + "\n")
    shutil.rmtree(request.folder, ignore_errors=True)
    return outcome


def cut_back(place: Path, done: int) -> None:
    """Remove what is there of steps after `done`, and what a kill left half written.  Raises DataError if that fails."""
    try:
        for step, path in _named(place):
            if step > done:
                _remove(path)
        for left in place.glob(".step-*"):
            _remove(left)
    except OSError as error:
        raise DataError(write_failure(place, error)) from error


def restored(place: Path, told: Collection[int]) -> tuple[list[Outcome], list[Request]]:
    """Outcomes that are not told, and requests without one, in the order of their steps."""
    outcomes: dict[int, Outcome] = {}
    for step, path in _named(place):
        if path.suffix:
            with suppress(OSError, ValueError):
                outcomes[step] = json.loads(path.read_text(encoding="utf-8"))
    requests = []
    for step, path in _named(place):
        if path.suffix:
            continue
        try:
            skipped = tuple(json.loads((path / REQUEST).read_text(encoding="utf-8"))["skipped"])
        except (OSError, ValueError, KeyError):
            skipped = None
        if step in outcomes or step in told or skipped is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            requests.append(Request(step, path, skipped))
    return [outcome for step, outcome in sorted(outcomes.items()) if step not in told], requests


def _named(place: Path) -> Iterator[tuple[int, Path]]:
    """Requests and outcomes with their steps, which ascend."""
    for path in sorted(place.glob("step-*")):
        if found := _NAME.fullmatch(path.name):
            yield int(found[1]), path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
