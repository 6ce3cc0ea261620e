"""Line files of a run (metrics, ledger): one JSON object a step, cut back to the restored step on resume."""

import json
import math
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
            new.writelines(line for line in old if _step_of(line) <= step)
        temporary.replace(path)


def lines(path: Path, first: int, last: int) -> Iterator[dict[str, Any]]:
    """What a file holds of the steps from `first` to `last`, in order; nothing where there is no file."""
    if path.exists() and first <= last:
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if first <= _step_of(line) <= last)


def last_step(path: Path) -> int:
    """The last step that a file holds a whole line of; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open(encoding="utf-8") as file:
        return int(max((step for line in file if (step := _step_of(line)) < math.inf), default=0))


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a kill left unfinished."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
