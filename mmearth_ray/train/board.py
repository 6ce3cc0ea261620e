"""The line between a run's workers and its driver: progress and warnings one way, the wish to stop the other, and an error
that is final."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmearth_ray.progress import ProgressLine, duration
from mmearth_ray.train.room import FAULTS


class Board:
    """An actor between rank 0 and the driver."""

    def __init__(self) -> None:
        self.progress: dict[str, Any] = {}
        self.stop = False
        self.fatal = ""
        self.warnings: list[str] = []

    def exchange(self, progress: dict[str, Any] | None, warnings: Sequence[str], before: int) -> bool:
        """Rank 0's side: leave the latest progress and the warnings that follow so many earlier ones, learn whether to stop."""
        self.progress = progress or self.progress
        self.warnings[before:] = warnings  # what comes again, as an answer was lost, is the same
        return self.stop

    def look(self, stop: bool, seen: int) -> tuple[dict[str, Any], str, list[str]]:
        """The driver's side: leave the wish to stop, learn the progress, the final error, if there is one, and the warnings
        after those it has seen."""
        self.stop = self.stop or stop
        return self.progress, self.fatal, self.warnings[seen:]

    def fail(self, message: str) -> None:
        self.fatal = self.fatal or message


def new_board() -> Any:
    """A board beside the driver, so that no machine but the driver's own can take it along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(Board)
    return actor.options(scheduling_strategy=here).remote()


class Silent:
    """The control of workers other than rank 0."""

    def tell(self, progress: dict[str, Any]) -> None:
        pass

    def should_stop(self) -> bool:
        return False

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def warn(self, text: str) -> None:
        pass


class BoardLine:
    """Rank 0's line to the board, kept up by a thread so that a step never waits for it.

    A worker that is asked to stop while it waits for data, and still waits `patience` seconds later, is killed: it would not
    hear.  All else that it may wait for ends by itself.
    """

    def __init__(self, board: Any, patience: float) -> None:
        self.board, self.patience = board, patience
        self.progress: dict[str, Any] | None = None
        self.stop: bool = False
        self.warnings: list[str] = []
        self.delivered = 0
        self.waits_since = math.inf
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._keep_up, daemon=True)
        self.thread.start()

    def tell(self, progress: dict[str, Any]) -> None:
        self.progress = progress

    def should_stop(self) -> bool:
        return self.stop

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.waits_since = time.monotonic()
        try:
            yield
        finally:
            self.waits_since = math.inf

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def close(self) -> None:
        """Leave the last progress behind and end the thread."""
        self.closing.set()
        self.thread.join(timeout=10)

    def _keep_up(self) -> None:
        asked_at = math.inf
        while True:
            last = self.closing.wait(0.5)
            with suppress(*FAULTS):  # one that passes; if the board is gone, so is the driver
                new = self.warnings[self.delivered :]
                self.stop = bool(ray.get(self.board.exchange.remote(self.progress, new, self.delivered)))
                self.delivered += len(new)
            if last:
                return
            now = time.monotonic()
            asked_at = min(asked_at, now) if self.stop else math.inf
            if now - max(asked_at, self.waits_since) > self.patience:
                os.kill(os.getpid(), signal.SIGKILL)


class Stop:
    """The wish to stop for good, which SIGTERM is."""

    def __init__(self) -> None:
        self.asked = False
        self.previous: Any = None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    def _ask(self, *_: object) -> None:
        self.asked = True


class Watch:
    """The driver's side while a group of workers runs: shows progress, passes on the wish to stop, for good or for a change.

    `better()` says whether another number of workers would do now; the workers then save and stop, to be started anew.
    """

    def __init__(self, board: Any, last_step: int, stop: Stop, better: Callable[[], bool]) -> None:
        self.board, self.last_step, self.stop, self.better = board, last_step, stop, better
        self.line = ProgressLine()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._keep_up, daemon=True)
        self.changing, self.shown, self.fatal, self.warned = False, (0, False), "", 0

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.thread.join(timeout=10)
        self.line.close()

    def _keep_up(self) -> None:
        started: tuple[float, int] | None = None
        while True:
            last = self.closing.wait(0.5)
            with suppress(Exception):  # of Ray's private parts or a fault that passes: there is another look
                self.changing = self.changing or (not last and self.better())
            try:
                wish = self.stop.asked or self.changing
                progress, self.fatal, warnings = ray.get(self.board.look.remote(wish, self.warned))
            except FAULTS:
                if last:
                    return
                continue
            self.warned += len(warnings)
            for text in warnings:
                self.line.close()
                print(f"warning: {text}", file=sys.stderr, flush=True)
            new = (progress.get("step", 0), "evaluation" in progress)  # the last step's comes again with its evaluation
            if new != self.shown:
                if started is None:
                    started = (time.monotonic(), progress["step"])
                self.shown = new
                told = last or bool({"validation", "evaluation"} & progress.keys()) or progress["step"] == self.last_step
                self.line.show(progress_text(progress, self.last_step, started), force=told)
            if last:
                return


def progress_text(progress: dict[str, Any], steps: int, started: tuple[float, int]) -> str:
    """The live line: step, loss, held-out loss and kNN score where they are new, tiles per second, share of the time spent
    waiting for data, time left."""
    since, first = started
    trained, rate = progress["step"] - first, progress["tiles_per_second"]
    parts = [f"step {progress['step']:,}/{steps:,}", f"loss {_shown(progress['loss'])}"]
    if "validation" in progress:
        parts.append(f"held out {_shown(progress['validation']['loss'])}")
    if (score := progress.get("evaluation", {}).get("knn")) is not None:
        parts.append(f"kNN {score:.3f}")
    parts += [f"{rate:,.{0 if rate >= 10 else 1}f} tiles/s", f"data wait {progress['data_wait']:.0%}"]
    if trained and progress["step"] < steps:
        parts.append(f"{duration((time.monotonic() - since) / trained * (steps - progress['step']))} left")
    return "  ".join(parts)


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
