"""The regression gate: ratios of a fresh result against those of the last committed one.

    python -m benchmarks.gate [key=value ...]      --help lists the keys

For every theme and kind of hardware in benchmarks/results/ the newest result that differs from what is committed is compared
with the newest committed one.  Only ratios count, as they were measured side by side; rates depend on the day.  A ratio that is
worse by more than the tolerance fails the gate, and so does one that a row had and has no longer.  Rows are told apart by
their texts and whole numbers (what was measured, on what); numbers with a point are what was measured.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmearth_ray import settings
from mmearth_ray.errors import DataError, run_command
from mmearth_ray.settings import key

RATIOS = {
    "times plain": True,
    "times masked-dense": True,
    "times eager": True,
    "memory of plain": False,
    "times as long as packed": True,
    "times packed": True,
    "end to end / bare": True,
    "end to end / DDP": True,
    "DDP / bare": True,
    "of bare processes": True,
    "efficiency against 1": True,
    "times as fast": True,
    "share of the bytes": False,
}
"""Columns that are ratios, and whether more is better."""

NAME = re.compile(r"(?P<series>.+)_(?P<date>\d{4}-\d\d-\d\d)\.json")

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    tolerance: float = key(0.15, "how much worse a ratio may be, as a share of it", at_least=0, below=1)
    results: str = key("benchmarks/results", "folder of the results, in a git repository")


@dataclass(frozen=True)
class Regression:
    """A ratio that is worse than allowed, more than `allowed` where less is better, less where more is; or missing now."""

    name: str
    before: float
    now: float | None
    allowed: float

    def __str__(self) -> str:
        now = "missing" if self.now is None else f"{self.now:.3g}"
        return f"{self.name}: before {self.before:.3g}, now {now}, allowed {self.allowed:.3g}"


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    folder, failed = Path(options.results), False
    if not _in_git(folder):
        print(f"skipped, {folder} is in no git repository: there is nothing to compare with")
        return 0
    for series, fresh, committed in pairs(folder):
        reason = why_not(fresh, committed)
        if reason or fresh is None or committed is None:
            print(f"{series}: skipped, {reason}")
            continue
        found = regressions(committed["rows"], fresh["rows"], options.tolerance)
        compared = len(list(_ratios(committed["rows"], fresh["rows"])))
        print("\n".join([f"{series}: {compared} ratios compared, {len(found)} worse", *(f"  {r}" for r in found)]))
        failed |= bool(found)
    return int(failed)


def regressions(before: Sequence[Result], now: Sequence[Result], tolerance: float) -> list[Regression]:
    """Ratios of rows that both results have, missing now or worse by more than the tolerance."""
    found = []
    for name, better_up, old, new in _ratios(before, now):
        allowed = old * (1 - tolerance) if better_up else old * (1 + tolerance)
        if new is None or ((new < allowed) if better_up else (new > allowed)):
            found.append(Regression(name, old, new, allowed))
    return found


def _ratios(before: Sequence[Result], now: Sequence[Result]) -> Iterator[tuple[str, bool, float, float | None]]:
    """Every ratio that a row of both had before: its name, whether more is better, its value before and now."""
    old = {_identity(row): row for row in before}
    for row in now:
        known = old.get(_identity(row), {})
        for column, better_up in RATIOS.items():
            a, b = _number(known.get(column)), _number(row.get(column))
            if a is not None:
                yield f"{' '.join(map(str, _identity(row)))}, {column}", better_up, a, b


def _number(value: Any) -> float | None:
    """The value if it is a finite number; a ratio that is not has not been measured."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _identity(row: Result) -> tuple[Any, ...]:
    return tuple(value for column, value in row.items() if isinstance(value, str | int) and column not in RATIOS)


def why_not(fresh: Result | None, committed: Result | None) -> str:
    """Why the two cannot be compared; empty if they can."""
    if committed is None:
        return "nothing is committed to compare with"
    if fresh is None:
        return "nothing was measured since the last commit"
    before, now = committed["about"].get("device"), fresh["about"].get("device")
    if before != now:
        return f"it was measured on {now}, the committed one on {before}"
    if not {_identity(row) for row in committed["rows"]} & {_identity(row) for row in fresh["rows"]}:
        return "they have no row in common"
    if not list(_ratios(committed["rows"], fresh["rows"])):
        return "the rows they have in common have no known column of ratios in the committed one"
    return ""


def pairs(folder: Path) -> Iterator[tuple[str, Result | None, Result | None]]:
    """Theme and hardware, the newest result that is not committed as it stands, and the newest committed one."""
    committed = {name: text for name in _git(folder, "ls-tree", "--name-only", "HEAD", "./").splitlines()
                 if NAME.fullmatch(name) for text in [_git(folder, "show", f"HEAD:./{name}")]}  # fmt: skip
    here = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if NAME.fullmatch(path.name)}
    fresh = {name: text for name, text in here.items() if committed.get(name) != text}
    series = sorted({NAME.sub(r"\g<series>", name) for name in committed | here})
    for each in series:
        yield each, _newest(each, fresh), _newest(each, committed)


def _newest(series: str, texts: Mapping[str, str]) -> Result | None:
    names = sorted(name for name in texts if NAME.sub(r"\g<series>", name) == series)
    if not names:
        return None
    try:
        found = json.loads(texts[names[-1]])
        return found if isinstance(found, dict) and {"about", "rows"} <= found.keys() else None
    except json.JSONDecodeError as error:
        raise DataError(f"the result {names[-1]} is not JSON: {error}") from error


def _in_git(folder: Path) -> bool:
    return any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents))


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise DataError(f"git cannot tell what is committed in {folder}: {reason.strip().splitlines()[0]}") from error


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
