"""Line files of a run (metrics, ledger): one JSON object a step, cut back to the restored step on resume."""

import json
import os
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
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
