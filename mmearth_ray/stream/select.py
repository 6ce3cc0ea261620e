"""Selecting tiles: a `where` expression over the metadata of a data set, and the rows of its row groups that satisfy it.

Expressions have Python's form over id, split, product, date, latitude, longitude and source:
`split == 'train' and product == 'l2a' and -23.5 < latitude < 23.5 and date >= '2019-01-01'`, `id in ['12', '40']`,
`id in file('ids.txt')` (one id a line).  A comparison with an unknown (null) value is false.
"""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmearth_ray.errors import UsageError
from mmearth_ray.shards.metadata import COLUMNS
from mmearth_ray.stream.metadata import Metadata

AT_A_TIME = 1 << 16
"""Tiles whose metadata is compared at once."""

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


class NothingSelected(UsageError):
    """An expression that no tile of the data set satisfies."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen rows of a data set, row group by row group; row groups without one are left out.

    `shard`, `group` (groups,): which file and which of its row groups; `rows`: the chosen rows of each, concatenated,
    with `ends` (groups,) telling where each group's part ends.
    """

    shard: np.ndarray
    group: np.ndarray
    rows: np.ndarray
    ends: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All that tells which rows are chosen."""
        return self.shard, self.group, self.rows, self.ends

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def rows_of(self, index: int) -> np.ndarray:
        """Rows of the index-th row group, ascending."""
        begin = int(self.ends[index - 1]) if index else 0
        return self.rows[begin : int(self.ends[index])]


def select(metadata: Metadata, where: str, key: str = "data.where") -> Selection:
    """The rows for which `where` holds; errors name it by its setting, `key`.

    Raises UsageError for an expression that cannot be read, DataError if the data set's metadata cannot.
    """
    condition, shards = parse(where, key), metadata.manifest.shards
    sizes = np.array([size for record in shards for size in record.row_groups], np.int64)
    shard_of = np.array([shard for shard, record in enumerate(shards) for _ in record.row_groups], np.int32)
    group_in = np.array([group for record in shards for group in range(len(record.row_groups))], np.int32)
    stops = np.cumsum(sizes)
    rows = np.flatnonzero(_holds(condition, metadata.table))
    groups = stops.searchsorted(rows, "right")
    chosen, counts = np.unique(groups, return_counts=True)
    within = (rows - (stops - sizes)[groups]).astype(np.int32)
    return Selection(shard_of[chosen], group_in[chosen], within, np.cumsum(counts, dtype=np.int64))


def _holds(condition: "Condition", table: pa.Table) -> np.ndarray:
    """bool (rows,): where a condition holds; some rows at a time, since texts take several times their bytes as objects."""
    parts = [table.slice(start, AT_A_TIME) for start in range(0, max(1, table.num_rows), AT_A_TIME)]
    return np.concatenate([condition({name: _array(part.column(name)) for name in COLUMNS}) for part in parts])


def _array(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=object)
    return column.to_numpy()


Condition = Callable[[dict[str, np.ndarray]], np.ndarray]


def parse(where: str, key: str = "data.where") -> Condition:
    """A function from metadata columns to a boolean array.  Raises UsageError, naming what it does not understand."""
    try:
        tree = ast.parse(where.strip() or "True", mode="eval").body
    except SyntaxError as error:
        raise UsageError(f"{key}: cannot read \"{where}\" ({error.msg}); write for example split == 'train'") from error
    return _Parser(where.strip(), key).condition(tree)


class _Parser:
    """Turns the syntax tree of an expression into functions of the columns; anything but comparisons is refused."""

    def __init__(self, where: str, key: str) -> None:
        self.where, self.key = where, key

    def refuse(self, node: ast.AST, why: str) -> UsageError:
        part = ast.get_source_segment(self.where, node) or self.where
        return UsageError(f"{self.key}: '{part}' {why}; compare {', '.join(COLUMNS)} with values, joined by and, or, not")

    def condition(self, node: ast.expr) -> Condition:
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return lambda columns: join.reduce([part(columns) for part in parts])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            part = self.condition(node.operand)
            return lambda columns: ~part(columns)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            value = node.value
            return lambda columns: np.full(len(columns["id"]), value)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            parts = [self.comparison(left, op, right) for left, op, right in pairs]
            return lambda columns: np.logical_and.reduce([part(columns) for part in parts])
        raise self.refuse(node, "is no condition")

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Condition:
        if isinstance(op, ast.In | ast.NotIn):
            name, values = self.column(left), self.values(right)
            wanted = {self.typed(name, value, right) for value in values}
            inside: Condition = lambda columns: np.array([v in wanted for v in columns[name].tolist()], bool)  # noqa: E731
            if name == "date":
                inside = lambda columns: np.isin(columns[name], list(wanted))  # noqa: E731
            return inside if isinstance(op, ast.In) else lambda columns: _known(columns[name]) & ~inside(columns)
        compare = _COMPARE.get(type(op))
        if compare is None:
            raise self.refuse(left, "is compared in a way that is not understood")
        if isinstance(right, ast.Name) and not isinstance(left, ast.Name):
            name, value = self.column(right), self.typed(right.id, self.constant(left), left)
            return lambda columns: _compare(compare, columns[name], value, swapped=True)
        name, value = self.column(left), self.typed(self.column(left), self.constant(right), right)
        return lambda columns: _compare(compare, columns[name], value, swapped=False)

    def column(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name) or node.id not in COLUMNS:
            raise self.refuse(node, "is no column")
        return node.id

    def constant(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except (TypeError, ValueError) as error:
            raise self.refuse(node, "is no value") from error

    def values(self, node: ast.expr) -> list[Any]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "file" and len(node.args) == 1:
            path = Path(str(self.constant(node.args[0])))
            try:
                return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"{self.key}: cannot read the list {path}: {error}") from error
        values = self.constant(node)
        if not isinstance(values, list | tuple | set):
            raise self.refuse(node, "is no list")
        return list(values)

    def typed(self, name: str, value: Any, node: ast.expr) -> Any:
        """The value in the column's type: a number for places, a date for dates, text for the rest."""
        try:
            if name in ("latitude", "longitude"):
                return float(value)
            if name == "date" and not isinstance(value, str):
                raise TypeError("a number would count days since 1970")
            return np.datetime64(value, "D") if name == "date" else str(value)
        except (TypeError, ValueError) as error:
            raise self.refuse(node, f"cannot be compared with {name}") from error


def _compare(compare: Callable[[Any, Any], Any], column: np.ndarray, value: Any, *, swapped: bool) -> np.ndarray:
    """Elementwise, false where the column is null."""
    if column.dtype != object:
        return _known(column) & (compare(value, column) if swapped else compare(column, value))
    pairs = ((value, v) if swapped else (v, value) for v in column)
    return np.array([a is not None and b is not None and compare(a, b) for a, b in pairs], bool)


def _known(column: np.ndarray) -> np.ndarray:
    """Where the column is not null."""
    if column.dtype == object:
        return np.array([v is not None for v in column], bool)
    return ~(np.isnat(column) if column.dtype.kind == "M" else np.isnan(column))
