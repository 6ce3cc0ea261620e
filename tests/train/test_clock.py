"""Where a step's time goes: every moment is counted once, whatever takes the moments."""

from types import SimpleNamespace

import pytest
import torch

from mmearth_ray.train import clock as module
from mmearth_ray.train.clock import STAGES, Clock, Stage


class Hands:
    """Moments that a test sets, in milliseconds."""

    def __init__(self) -> None:
        self.at = 0.0

    def clock(self) -> Clock:
        return Clock(lambda: self.at, lambda begin, end: end - begin)


def nonzero(seconds: dict) -> dict:
    return {stage: value for stage, value in seconds.items() if value}


def test_the_stages_of_a_step_add_up_to_all_the_time_since_the_step_before() -> None:
    hands = Hands()
    clock = hands.clock()
    stages: list[tuple[Stage, int]] = [
        ("data_wait", 3), ("forward", 10), ("backward", 30), ("forward", 37), ("backward", 61), ("rest", 64),
    ]  # fmt: skip
    for stage, until in stages:
        hands.at += 1.0 if stage == "data_wait" else 0.0  # before the first stage
        clock.enter(stage)
        hands.at = until
    clock.end_step()
    hands.at = 70
    clock.enter("checkpoint")
    hands.at = 100
    clock.enter("optimizer")
    hands.at = 101
    clock.end_step()
    first, second = clock.read()
    assert nonzero(first) == pytest.approx({"rest": 4e-3, "data_wait": 2e-3, "forward": 14e-3, "backward": 44e-3})
    assert nonzero(second) == pytest.approx({"rest": 6e-3, "checkpoint": 30e-3, "optimizer": 1e-3})
    assert set(first) == set(second) == set(STAGES)
    assert sum(first.values()) == pytest.approx(64e-3)
    assert sum(second.values()) == pytest.approx(37e-3)


def test_reading_in_between_loses_no_time_and_counts_none_twice() -> None:
    hands = Hands()
    clock, total = hands.clock(), 0.0
    for step in range(1, 8):
        clock.enter("forward")
        hands.at += step
        clock.enter("rest")
        hands.at += 0.5
        clock.end_step()
        if step % 3 == 0:
            clock.enter("validation")
            hands.at += 100
            total += sum(sum(s.values()) for s in clock.read())  # what came after the step's end stays for the next one
    steps = clock.read()
    assert len(steps) == 1
    assert nonzero(steps[0]) == pytest.approx({"validation": 0.1, "forward": 7e-3, "rest": 5e-4})
    assert total + sum(steps[0].values()) == pytest.approx(hands.at / 1e3)
    assert clock.read() == []
    assert len(clock.moments) == 1  # nothing piles up


def test_a_cpu_is_timed_by_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.25, 3.25])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    clock = Clock.of(torch.device("cpu"))
    clock.enter("forward")
    clock.end_step()
    assert nonzero(clock.read()[0]) == {"rest": 0.25, "forward": 2.0}


class Event:
    """A stand-in for a GPU's event, that knows how often someone waited for the device."""

    recorded: list["Event"]
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded.append(self)

    def elapsed_time(self, end: "Event") -> float:
        return 2.0 * (Event.recorded.index(end) - Event.recorded.index(self))

    def synchronize(self) -> None:
        Event.waits += 1


def test_a_gpu_is_timed_by_events_that_nothing_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.recorded = []
    monkeypatch.setattr(module.torch, "cuda", SimpleNamespace(Event=Event))
    clock = Clock.of(torch.device("cuda"))
    clock.enter("to_device")
    clock.enter("forward")
    clock.enter("backward")
    clock.enter("optimizer")
    clock.end_step()
    assert len(Event.recorded) == 6
    (seconds,) = clock.read()
    assert nonzero(seconds) == pytest.approx(dict.fromkeys(("rest", "to_device", "forward", "backward", "optimizer"), 2e-3))
    assert Event.waits == 0
