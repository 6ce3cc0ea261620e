"""Evaluations beside training: one request after the other, each in a process of its own, for which nobody waits.

Of requests that come while one is worked on, only the newest waits; the outcome of that one says which it replaced.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import mmearth_ray
from mmearth_ray.errors import DataError, one_line
from mmearth_ray.evaluate.during.requests import RESULT, Fill, Outcome, Request, restored, result_of, settle, write_request

COMMAND = (sys.executable, "-m", "mmearth_ray.evaluate.during.judge")
"""What a request is given to, with its folder and the number of this process."""

LOG = "log.txt"
"""In a request's folder: all that its process says."""

LOOK_SECONDS = 0.2
"""Between two looks at the process."""

FLUSH_SECONDS = 60.0
"""How long a checkpoint waits until a request is on disk, at most: a disk that takes longer fails the checkpoint itself."""


def environment(threads: int) -> dict[str, str]:
    """That of a process that evaluates: so many threads, no GPU, and this same package."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    paths = [str(Path(mmearth_ray.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **limits, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}


class Background:
    """The requests of a run, kept in the folder `place`, and the thread that sees to them.

    `limit`: seconds that a process may take.  `warn`: shows a line, from any thread.  `told`: steps whose outcomes are known
    already.  Nothing that goes wrong here raises, except in the constructor.
    """

    def __init__(
        self, place: Path, *, threads: int, limit: float, warn: Callable[[str], None], told: Collection[int] = ()
    ) -> None:
        self.place, self.limit, self.warn, self.environment = place, limit, warn, environment(threads)
        self.outcomes, self.waiting = restored(place, told)
        self.change = threading.Condition()
        self.given: tuple[int, Mapping[str, Any], Fill] | None = None
        self.passed_over: list[int] = []  # given, and replaced before they were on disk
        self.writing = self.closing = self.ended = False
        self.running: Request | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.since = 0.0
        self.thread = threading.Thread(target=self._run, name="evaluation", daemon=True)
        self.thread.start()

    def put(self, step: int, content: Mapping[str, Any], fill: Fill) -> None:
        """Ask for a step: `fill` is to put what it needs into its folder.  Waits for nothing, not even for the disk."""
        with self.change:
            if self.given:
                self.passed_over.append(self.given[0])
            self.given = step, content, fill
            self.change.notify_all()

    def flush(self) -> None:
        """Wait until what was given is on disk."""
        with self.change:
            self.change.wait_for(lambda: not (self.given or self.writing) or self.ended, FLUSH_SECONDS)

    def take(self) -> Outcome | None:
        """The outcome that has waited longest to be told, if there is one."""
        with self.change:
            return self.outcomes.pop(0) if self.outcomes else None

    def finish(self, seconds: float, stop: Callable[[], bool]) -> None:
        """Wait until all is done, so many seconds for each at most, after which what is left is given up.

        Once `stop` says so nothing is waited for; what is left stays for the next start.
        """
        deadline, waited_for = time.monotonic() + seconds, self.running
        while self._is_busy() and not stop():
            if self.running and self.running is not waited_for:  # each has the whole time
                deadline, waited_for = time.monotonic() + seconds, self.running
            if time.monotonic() >= deadline:
                self.close()
                for request in filter(None, (self.running, *self.waiting)):
                    self._fail(request, f"it was not done {seconds:g} s after the last step (eval.wait)")
                return
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """End the process and the thread; what is not done stays on disk."""
        with self.change:
            self.closing = True
            self.change.notify_all()
        self.thread.join(FLUSH_SECONDS)

    def _is_busy(self) -> bool:
        with self.change:
            return not self.ended and bool(self.given or self.writing or self.running or self.waiting)

    def _run(self) -> None:
        try:
            while not self.closing:
                self._write()
                self._look()
                self._begin()
                with self.change:
                    if not (self.given or self.closing):
                        self.change.wait(LOOK_SECONDS if self.running else None)
        except Exception as error:  # whatever it is: training goes on without evaluations
            self.warn(f"there are no more evaluations until the run is resumed ({one_line(error)}); training goes on")
        finally:
            self._kill()
            with self.change:
                self.ended = True
                self.change.notify_all()

    def _write(self) -> None:
        """Put what was given on disk, in the place of all that waits."""
        with self.change:
            if self.given is None:
                return
            (step, content, fill), self.given, self.writing = self.given, None, True
            skipped, self.passed_over = self.passed_over, []
        skipped = [*skipped, *(old for request in self.waiting for old in (*request.skipped, request.step))]
        try:
            request = write_request(self.place, step, skipped, content, fill)
            for replaced in self.waiting:
                shutil.rmtree(replaced.folder, ignore_errors=True)
            self.waiting = [request]
        except DataError as error:
            self._fail(Request(step, self.place / "never written"), str(error))
        finally:
            with self.change:
                self.writing = False
                self.change.notify_all()

    def _begin(self) -> None:
        """Start the process of what waits, unless one runs; what an earlier start has left a result of needs none."""
        while self.waiting and not self.running:
            with self.change:  # at no moment is it neither
                request = self.running = self.waiting.pop(0)
            if (request.folder / RESULT).exists():
                self._end(request)
                continue
            command, self.since = [*COMMAND, str(request.folder), str(os.getpid())], time.monotonic()
            try:
                with (request.folder / LOG).open("wb") as log:
                    self.process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
                    )
            except OSError as error:
                self._fail(request, f"its process could not be started: {one_line(error)}")

    def _look(self) -> None:
        """See what has become of the process."""
        if not self.running or not self.process:
            return
        code, request = self.process.poll(), self.running
        if code is None and time.monotonic() - self.since <= self.limit:
            return
        self._kill()
        if code is None:
            self._fail(request, f"it took more than {self.limit:g} s (eval.wait)")
        elif code:
            self._fail(request, why(code, request.folder / LOG))
        else:
            self._end(request)

    def _end(self, request: Request) -> None:
        try:
            self._settle(request, result_of(request))
        except DataError as error:
            self._fail(request, str(error))

    def _fail(self, request: Request, why: str) -> None:
        self.warn(f"the encoder of step {request.step} was not evaluated: {why}; training goes on")
        self._settle(request, {"step": request.step, "failed": why})

    def _settle(self, request: Request, outcome: Outcome) -> None:
        try:
            outcome = settle(self.place, request, outcome)
        except DataError as error:
            self.warn(f"the evaluation of step {request.step} is in the metrics alone: {error}")
        with self.change:
            self.outcomes.append(outcome)
            self.running = None if self.running is request else self.running

    def _kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def why(code: int, log: Path) -> str:
    """Why a process has failed: its signal, or the last line that it said."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    try:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        said = []
    return one_line(said[-1]).removeprefix("error: ") if said else f"its process ended with code {code}"
