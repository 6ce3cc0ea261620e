"""How long a store is waited for: attempts, their waits and the time they may take together; the clock is the test's own."""

import time
from collections.abc import Callable

import pytest

from mmearth_ray.errors import DataError
from mmearth_ray.patience import Patience, counted, note, patiently, take_noted


class Clock:
    """A time that passes only by waiting and asking."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.begun = 1000.0, list[float]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.pass_by)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds

    def failing(self, seconds: float) -> Callable[[], None]:
        """A request that fails after that time."""

        def call() -> None:
            self.begun.append(self.now)
            self.pass_by(seconds)
            raise TimeoutError("no answer")

        return call


@pytest.mark.parametrize("takes", [0.0, 1.0, 20.0, 30.0])
@pytest.mark.parametrize("attempts", [1, 8, 20])
@pytest.mark.parametrize("hang_timeout", [150.0, 300.0, 1200.0])
def test_a_store_that_stays_away_is_given_up_before_workers_are_taken_for_hung(
    hang_timeout: float, attempts: int, takes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, patience = Clock(monkeypatch), Patience(attempts, seconds=hang_timeout / 3)
    with pytest.raises(DataError, match=r"s3://b/x cannot be reached .*no answer"):
        patiently("s3://b/x", clock.failing(takes), patience)
    waited = clock.now - 1000.0
    assert waited <= hang_timeout / 3 + takes < hang_timeout / 1.5
    assert clock.begun[-1] - 1000.0 <= hang_timeout / 3
    if len(clock.begun) < attempts:  # then it was for the time: another wait would have been too long
        assert waited + patience.longest_wait > hang_timeout / 3
    if takes == 0 and attempts == 8:
        assert len(clock.begun) == 8
        assert 12.7 <= waited <= 25.4


def test_waits_are_not_begun_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(DataError, match=r"cannot be reached \(no answer\)"):
        counted("s3://b/x", clock.failing(0.0), Patience(first_wait=2.0, seconds=0.9))
    assert clock.now == 1000.0


def test_a_request_has_a_second_more_for_every_megabyte() -> None:
    assert Patience(request=30).limit(0) == 30
    assert Patience(request=30).limit(16_000_000) == 46


def test_faults_are_noted_until_they_are_taken_and_those_that_a_caller_counts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    take_noted()

    def third_time() -> str:
        clock.begun.append(clock.now)
        if len(clock.begun) % 3:
            raise ConnectionResetError("cut")
        return "found"

    assert counted("s3://b/x", third_time) == ("found", 2)
    assert take_noted() == 0
    assert patiently("s3://b/x", third_time) == "found"
    note(5)
    assert (take_noted(), take_noted()) == (7, 0)
