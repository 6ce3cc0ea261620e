"""What a check finds, and running checks one after the other: none can stop or block the others."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

from mmearth_ray.errors import one_line

T = TypeVar("T")
Level = Literal["ok", "warning", "failed"]


class Finding(NamedTuple):
    """One line: how good it is, what was looked at, and the value with its bound and what to do."""

    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject:<16} {self.text}"


class NotChecked(Exception):
    """A check cannot look, for the reason given: something that it needs is not there."""


@dataclass(frozen=True)
class Check(Generic[T]):
    """A check of a case of type T: what it looks at, how, and after how many seconds it is given up.

    Without a limit it runs in the thread of the caller and has to see to its end itself.
    """

    subject: str
    look: Callable[[T], Iterable[Finding]]
    seconds: float | None = 60.0


def examine(case: T, checks: Iterable[Check[T]]) -> Iterator[Finding]:
    """The findings of every check, in order, as soon as each is done."""
    for check in checks:
        yield from _findings(check, case)


def _findings(check: Check[T], case: T) -> list[Finding]:
    found: list[Finding] = []

    def look() -> None:
        try:
            for finding in check.look(case):
                found.append(finding)
        except NotChecked as reason:
            found.append(Finding("warning", check.subject, f"not checked: {reason}"))
        except Exception as error:  # of whatever library: the next check is to run all the same
            found.append(Finding("failed", check.subject, told(error)))

    if check.seconds is None:
        look()
        return found
    thread = threading.Thread(target=look, name=check.subject, daemon=True)
    thread.start()
    thread.join(check.seconds)
    if thread.is_alive():
        hung = f"did not end within {check.seconds:g} s; what it waits for would block the run as well"
        return [*found, Finding("failed", check.subject, hung)]
    return found


def told(error: BaseException) -> str:
    """What went wrong, of an error of whatever library: one line of at most 300 characters.  Ray's name their cause."""
    cause = getattr(error, "cause", None)
    own = cause if isinstance(cause, BaseException) else error
    return one_line(own, 300)


def summary(findings: Iterable[Finding]) -> str:
    """How many findings there are of each level."""
    levels = [finding.level for finding in findings]
    counts = {level: levels.count(level) for level in ("failed", "warning", "ok")}
    return f"{counts['failed']} failed, {counts['warning']} warning{'' if counts['warning'] == 1 else 's'}, {counts['ok']} ok"
