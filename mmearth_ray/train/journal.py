"""Line files of a run (metrics, ledger): one JSON object a step, cut back to the restored step on resume."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS = "metrics.jsonl"
LEDGER = "ledger"


class Journal:
    """Appends one JSON object per line; `flush` makes what was written safe before a checkpoint relies on it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

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
