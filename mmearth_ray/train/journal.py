"""Line files of a run (metrics, ledger): one JSON object a step, cut back to the restored step on resume."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS = "metrics.jsonl"
LEDGER = "ledger"

LONGEST = 1 << 20
"""Bytes of a line, at most, where the last one is looked for."""


class Journal:
    """Appends one JSON object per line; `flush` makes what was written safe before a checkpoint relies on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def amend(self, more: dict[str, Any]) -> dict[str, Any] | None:
        """Add to the last line what it does not hold yet, and return it; None, and no change, if there is no such line.

        The line's bytes stay and more follow, so that there is no moment without it.
        """
        with self.path.open("rb+") as file:
            file.seek(-min(LONGEST, file.seek(0, os.SEEK_END)), os.SEEK_END)
            last = file.read().splitlines(keepends=True)[-1:]
            entry = _entry(last[0].decode()) if last else None
            if entry is None or more.keys() & entry.keys():
                return None
            file.seek(-len(last[0]), os.SEEK_END)
            file.write((json.dumps(entry | more) + "\n").encode())
            return entry | more

    def flush(self) -> None:
        os.fsync(self.file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()


def ledger_path(run: Path, rank: int) -> Path:
    return run / LEDGER / f"rank-{rank}.jsonl"


def cut_back(run: Path, step: int) -> None:
    """Drop every line after `step` (and a last line that a kill left unfinished) from the metrics and all ledgers."""
    for path in [run / METRICS, *sorted((run / LEDGER).glob("rank-*.jsonl"))]:
        if not path.exists():
            continue
        temporary = path.with_name(f".{path.name}.tmp")
        with path.open(encoding="utf-8") as old, temporary.open("w", encoding="utf-8") as new:
            new.writelines(line for line in old if (entry := _entry(line)) and entry["step"] <= step)
        temporary.replace(path)


def lines(path: Path, first: int, last: int) -> Iterator[dict[str, Any]]:
    """What a file holds of the steps from `first` to `last`, in order; nothing where there is no file."""
    if path.exists() and first <= last:
        with path.open(encoding="utf-8") as file:
            yield from (entry for line in file if (entry := _entry(line)) and first <= entry["step"] <= last)


def _entry(line: str) -> dict[str, Any] | None:
    """What a line holds; None for one that a kill left unfinished."""
    try:
        found = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
