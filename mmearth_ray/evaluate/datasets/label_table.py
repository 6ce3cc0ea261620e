"""The table of labels beside image files: a CSV with the columns file, label and, where given, split or fold."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmearth_ray.errors import DataError, UsageError, one_line
from mmearth_ray.evaluate.datasets.task import SPLITS, Goal

SEPARATOR = ";"
"""Between the classes of an image that has several."""

SPELLINGS = {**{split: split for split in SPLITS}, "val": "valid", "validation": "valid"}
MOST_FOLDS = 100


@dataclass(frozen=True)
class LabelTable:
    """`files`: as they are written, `lines`: where.  `splits`: of each image, or None; `folds`: of each, -1 without folds."""

    path: Path
    lines: list[int]
    files: list[str]
    labels: list[str]
    splits: list[str] | None
    folds: np.ndarray

    @property
    def fold_count(self) -> int:
        return int(self.folds.max(initial=-1)) + 1


def read_table(path: Path) -> LabelTable:
    """Raises DataError, naming the line, for a table that cannot be read or lacks something."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or []]
            rows = [(reader.line_num, dict(zip(columns, map(_text, row.values()), strict=False))) for row in reader]
    except FileNotFoundError as error:
        raise DataError(f"there is no table {path}; name it by table=, a CSV with the columns file and label") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV in UTF-8 ({one_line(error)})") from error
    lacking = [name for name in ("file", "label") if name not in columns]
    if lacking or not rows:
        raise DataError(f"{path} has {'no column ' + lacking[0] if lacking else 'no row'}; a CSV with file, label and, if "
                        "known, split or fold is needed")  # fmt: skip
    if len(set(columns)) < len(columns):
        raise DataError(f"{path} has a column twice ({', '.join(columns)})")
    for line, row in rows:
        if not row.get("file") or "label" not in row:
            raise DataError(f"{path}, line {line}: no {'label' if row.get('file') else 'file'} is given")
    has_folds = "fold" in columns
    if has_folds and (both := next((line for line, row in rows if row.get("split")), None)) is not None:
        raise DataError(f"{path}, line {both}: a split is given beside a fold; with folds every image is tested in its turn: "
                        "leave one of the two columns out")  # fmt: skip
    return LabelTable(
        path=path,
        lines=[line for line, _ in rows],
        files=[row["file"] for _, row in rows],
        labels=[row["label"] for _, row in rows],
        splits=[_split(path, line, row) for line, row in rows] if "split" in columns and not has_folds else None,
        folds=np.array([_fold(path, line, row) if has_folds else -1 for line, row in rows], np.int64),
    )


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _split(path: Path, line: int, row: dict[str, str]) -> str:
    given = row.get("split", "")
    if given.lower() not in SPELLINGS:
        raise DataError(f"{path}, line {line}: the split is '{given}'; it must be one of {', '.join(SPLITS)}")
    return SPELLINGS[given.lower()]


def _fold(path: Path, line: int, row: dict[str, str]) -> int:
    given = row.get("fold", "")
    if not given.isdecimal() or int(given) >= MOST_FOLDS:
        raise DataError(f"{path}, line {line}: the fold is '{given}'; it must be a whole number of 0..{MOST_FOLDS - 1}")
    return int(given)


def encoded(table: LabelTable, goal: Goal, classes: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of a goal whose labels are no maps, as a `Block` takes them, and the classes: those given, or those that occur.

    Raises UsageError for classes that a regression has not, DataError, naming the line, for a label that is none of them.
    """
    if goal is Goal.REGRESSION:
        if len(classes) > 1:
            raise UsageError(f"classes=[{','.join(classes)}]: a regression has no classes; name the quantity alone, or nothing")
        numbers = [_number(table, line, text) for line, text in zip(table.lines, table.labels, strict=True)]
        return np.array(numbers), tuple(classes) or ("value",)
    several = goal is Goal.MULTI
    named = [[part.strip() for part in text.split(SEPARATOR) if part.strip()] if several else [text] for text in table.labels]
    names = tuple(classes) or _ordered({name for some in named for name in some})
    places = {name: place for place, name in enumerate(names)}
    for line, some in zip(table.lines, named, strict=True):
        for name in some:
            if name not in places or not name:
                raise DataError(f"{table.path}, line {line}: the label '{name}' is none of the classes {', '.join(names)}")
    if not several:
        return np.array([places[some[0]] for some in named]), names
    labels = np.zeros((len(named), len(names)), np.int64)
    for row, some in enumerate(named):
        labels[row, [places[name] for name in some]] = 1
    return labels, names


def _ordered(names: set[str]) -> tuple[str, ...]:
    """In the order of the alphabet, or of numbers where all are."""
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if all(n.isdecimal() for n in names) else str))


def _number(table: LabelTable, line: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{table.path}, line {line}: the label '{text}' is no finite number")
    return value
