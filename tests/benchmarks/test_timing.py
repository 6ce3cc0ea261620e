"""Taking time: turns, medians of per-round ratios, the best of several."""

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Laps, Stopwatch, best, ratio, seconds, take_turns

CPU = torch.device("cpu")


class Clock:
    """A clock that moves on only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def test_works_take_turns_and_the_warm_up_does_not_count(clock: Clock) -> None:
    order = []

    def work(name: str, duration: float, watch: Stopwatch) -> None:
        order.append(name)
        clock.now += duration * len(order)
        watch.lap("half")
        clock.now += 1
        watch.lap("rest")
        clock.now += 2
        watch.lap("half")

    works = {"a": lambda watch: work("a", 1, watch), "b": lambda watch: work("b", 10, watch)}
    laps = take_turns(works, 2, CPU)
    assert order == ["a", "b"] * 3
    assert laps == {
        "a": [{"half": 5, "rest": 1}, {"half": 7, "rest": 1}],
        "b": [{"half": 42, "rest": 1}, {"half": 62, "rest": 1}],
    }


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    fast: Laps = [{"x": 1.0}, {"x": 2.0}, {"x": 100.0}]
    slow: Laps = [{"x": 1.0, "y": 1.0}, {"x": 5.0, "y": 1.0}, {"x": 300.0, "y": 100.0}]
    assert ratio(slow, fast) == 3  # of 2, 3 and 4; the medians themselves are 6 and 2
    assert ratio(fast, slow) == 1 / 3
    assert seconds(slow) == 6
    assert seconds(slow, "y") == 1


def test_the_best_is_the_fastest_of_those_after_the_first(clock: Clock) -> None:
    durations = iter([0.1, 0.5, 0.3, 0.4, 0.2])
    assert best(lambda: setattr(clock, "now", clock.now + next(durations)), 3, CPU) == pytest.approx(0.3)


def test_slow_work_is_not_repeated_for_long(clock: Clock) -> None:
    done = []

    def work() -> None:
        done.append(1)
        clock.now += 3

    assert best(work, 5, CPU) == 3
    assert len(done) == 2
