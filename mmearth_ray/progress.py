"""A live line on a terminal, or a line now and then where the output is not one (a log file, a Ray job)."""

import sys
import time
from typing import TextIO


class ProgressLine:
    """Shows the latest text: rewrites one line on a terminal; elsewhere prints a line at most every `interval` seconds."""

    def __init__(self, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.interval = 0.2 if self.live else interval
        self.last_time = -float("inf")
        self.last_width = 0

    def show(self, text: str, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self.last_time < self.interval:
            return
        self.last_time = now
        if self.live:
            self.stream.write("\r" + text.ljust(self.last_width))
            self.last_width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End the live line, so that what is printed next starts on its own."""
        if self.live and self.last_width:
            self.stream.write("\n")
            self.stream.flush()
        self.last_width = 0


def duration(seconds: float) -> str:
    """`seconds` as people read it: 42 s, 3 min 5 s, 2 h 7 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def counted(count: int, what: str) -> str:
    """A count and its noun: 1 shard, 1,024 tiles."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
