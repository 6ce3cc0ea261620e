"""The progress line: rewritten on a terminal, now and then elsewhere; durations as people read them."""

import io

import pytest

from mmearth_ray import progress
from mmearth_ray.progress import ProgressLine, counted, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_log_gets_whole_lines_at_most_every_interval(clock: Clock) -> None:
    log = io.StringIO()
    line = ProgressLine(log, interval=10)
    for second, text in [(0, "one"), (5, "two"), (9.9, "three"), (10, "four"), (19, "five"), (20.5, "six")]:
        clock.now = 100.0 + second
        line.show(text)
    line.close()
    assert log.getvalue() == "one\nfour\nsix\n"


def test_a_forced_text_is_shown_at_once(clock: Clock) -> None:
    log = io.StringIO()
    line = ProgressLine(log, interval=10)
    line.show("one")
    line.show("two", force=True)
    assert log.getvalue() == "one\ntwo\n"


def test_a_terminal_line_is_rewritten_and_covers_what_was_longer_before(clock: Clock) -> None:
    terminal = Terminal()
    line = ProgressLine(terminal, interval=10)
    line.show("step 100")
    clock.now += 0.3
    line.show("done")
    clock.now += 0.1
    line.show("too soon")
    line.close()
    line.close()  # nothing is open any more
    assert terminal.getvalue() == "\rstep 100\rdone    \n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 0 min"),
     (7620, "2 h 7 min"), (90000, "25 h 0 min")],
)  # fmt: skip
def test_a_duration_reads_as_people_say_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_count_agrees_with_its_noun() -> None:
    assert [counted(n, "tile") for n in (0, 1, 2, 1024)] == ["0 tiles", "1 tile", "2 tiles", "1,024 tiles"]
