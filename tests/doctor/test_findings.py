"""Checks run one after the other: none stops the others by what it raises, or by not ending."""

import threading
from collections.abc import Iterator

from mmearth_ray.doctor.findings import Check, Finding, NotChecked, examine, summary, told


def fine(case: list[str]) -> Iterator[Finding]:
    case.append("fine")
    yield Finding("ok", "one", "is well")


def raising(case: list[str]) -> Iterator[Finding]:
    yield Finding("warning", "two", "is half well")
    raise OSError("a long\n story")


def lacking(case: list[str]) -> Iterator[Finding]:
    raise NotChecked("there is no cluster")
    yield


def test_every_check_has_its_say_whatever_others_raise() -> None:
    case: list[str] = []
    checks = [Check("two", raising), Check("three", lacking), Check("one", fine), Check("one", fine, None)]
    assert list(examine(case, checks)) == [
        ("warning", "two", "is half well"),
        ("failed", "two", "a long story"),
        ("warning", "three", "not checked: there is no cluster"),
        ("ok", "one", "is well"),
        ("ok", "one", "is well"),
    ]
    assert case == ["fine", "fine"]


def test_a_check_that_does_not_end_is_given_up_and_what_it_found_before_is_kept() -> None:
    release = threading.Event()

    def hanging(case: list[str]) -> Iterator[Finding]:
        yield Finding("ok", "link", "is up")
        release.wait(60)
        yield Finding("ok", "link", "is fast")

    found = list(examine([], [Check("link", hanging, 0.2), Check("one", fine)]))
    release.set()
    assert [str(finding).split(maxsplit=2) for finding in found] == [
        ["ok", "link", "is up"],
        ["failed", "link", "did not end within 0.2 s; what it waits for would block the run as well"],
        ["ok", "one", "is well"],
    ]


def test_the_summary_counts_each_level() -> None:
    assert summary([]) == "0 failed, 0 warnings, 0 ok"
    findings = [Finding("ok", "a", ""), Finding("failed", "b", ""), Finding("warning", "c", ""), Finding("ok", "d", "")]
    assert summary(findings) == "1 failed, 1 warning, 2 ok"


def test_errors_are_told_of_what_caused_them() -> None:
    class Outer(Exception):
        cause = ValueError("bad\n  value")

    assert told(Outer("ray::Member.join() Traceback")) == "bad value"
    assert told(KeyError()) == "KeyError"
    assert len(told(ValueError("x" * 999))) == 300
