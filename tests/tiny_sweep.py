"""A sweep of points that cost nothing: numbers made up, and a runner that hands them out and counts what it was asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.record import circumstances
from benchmarks.sweep_point import Measurement, Point
from benchmarks.sweep_store import Record

TINY = Point("atto", 16, 8, 2, "packed", "fp32", "cpu", steps=1, plain=True)
POINTS = [TINY, replace(TINY, size="femto"), replace(TINY, size="pico")]
NUMBERS = Measurement(3_000_000, 4_000_000, 8.0, 10.0, 20.0, 5.0, 70_000_000, 0.5, 4.0, 3.5)
ABOUT = circumstances("benchmarks.sweep")


class Runner:
    """Measures nothing: hands out the same numbers, a reason for `failing` sizes, and counts what it was asked for."""

    def __init__(self, failing: Sequence[str] = (), stop_after: int | None = None) -> None:
        self.failing, self.stop_after = failing, stop_after
        self.asked: list[str] = []

    def __call__(self, points: Sequence[Point]) -> Iterator[tuple[Point, dict[str, Any], Measurement | str]]:
        for number, point in enumerate(points):
            if number == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(point.size)
            if point.size in self.failing:
                yield point, {}, "its process <died> | twice"
            else:
                yield point, {"threads": 2}, NUMBERS


def make_record(time: int = 1, **changes: Any) -> Record:
    """A record of the tiny point with changes: of the point, of its numbers, or of its circumstances."""
    point = {name: value for name, value in changes.items() if name in asdict(TINY)}
    numbers = {name: value for name, value in changes.items() if name in asdict(NUMBERS)}
    facts = {name: value for name, value in changes.items() if name not in {**asdict(TINY), **asdict(NUMBERS)}}
    return Record(replace(TINY, **point), ABOUT | {"time": f"{time:04d}"} | facts, replace(NUMBERS, **numbers))
