"""Where rank 0 writes what happened: metrics.jsonl, and from the same lines Weights & Biases and TensorBoard, if asked for.

The file is the truth, and training waits for it.  A tracker runs in a thread of its own: training never waits for one, and one
that fails says so once and is left out for the rest of this start.  The last step that each tracker took is in a file of its
own: what it lacks when a run is resumed, for whatever reason, is fed to it from the metrics, up to the restored step; what it
has already it does not get again.
"""

import json
import os
import queue
import re
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from mmearth_ray import settings
from mmearth_ray.errors import one_line
from mmearth_ray.experiment import Experiment
from mmearth_ray.files import atomic_text
from mmearth_ray.train.journal import METRICS, Journal, lines

TENSORBOARD = "tensorboard"
WANDB_STATE = "wandb.json"
SENT = "trackers"
"""Folder in the run directory with a file for each tracker: the last step that it took."""

WAITING = 10_000
"""Lines that wait for a tracker, at most: some 20 MB, or minutes of a step that takes milliseconds."""

CLOSE_SECONDS = 30.0
"""How long the end of a run waits for a tracker that is still sending."""

INIT_SECONDS = 25.0
"""How long Weights & Biases is tried before it is given up: less than the end of a short run waits for it."""

FIGURE = "reconstruction"


class Tracker(Protocol):
    """A place that metrics are sent to.  `first`: the first step that it lacks."""

    first: int

    def log(self, step: int, values: dict[str, float]) -> None:
        """The numbers of a step; steps ascend."""

    def figure(self, step: int, path: Path) -> None:
        """A PNG drawn after that step, the last one logged."""

    def close(self, failed: bool) -> None:
        """The end of this start; `failed` where training ended by an error."""


class Metrics:
    """The lines of a run and everything fed from them.  `warn`: shows a line to people, from any thread."""

    def __init__(self, experiment: Experiment, done: int, warn: Callable[[str], None]) -> None:
        self.journal = Journal(experiment.run / METRICS)
        self.feeds = [Feed(name, start, experiment.run, done, warn) for name, start in asked_for(experiment, done)]

    def write(self, entry: dict[str, Any]) -> None:
        """One line.  Raises OSError if the file cannot take it; no tracker's error comes through."""
        self.journal.write(entry)
        for feed in self.feeds:
            feed.put(partial(feed.log, entry))

    def amend(self, more: dict[str, Any]) -> dict[str, Any] | None:
        """Add to the last line; see `Journal.amend`."""
        if line := self.journal.amend(more):
            for feed in self.feeds:
                feed.put(partial(feed.log, {"step": line["step"], **more}))
        return line

    def figure(self, path: Path, step: int) -> None:
        """A figure that was drawn after the last line."""
        for feed in self.feeds:
            feed.put(lambda tracker: tracker.figure(step, path) if step >= tracker.first else None)

    def flush(self) -> None:
        """Make the lines safe before a checkpoint relies on them."""
        self.journal.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for feed in self.feeds:
            feed.end(failed=kind is not None)
        for feed in self.feeds:
            feed.join()
        self.journal.__exit__(kind, error, trace)


class Sent:
    """The last step that a tracker took, 0 before any: written in place, so that it is right however the process ends."""

    def __init__(self, run: Path, name: str) -> None:
        self.path = run / SENT / re.sub(r"\W+", "-", name.lower())
        self.handle: int | None = None

    def read(self) -> int:
        try:
            return int(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def write(self, step: int) -> None:
        if self.handle is None:
            self.path.parent.mkdir(exist_ok=True)
            self.handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(self.handle, b"%012d\n" % step, 0)

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


class Feed:
    """Hands lines to a tracker in a thread of its own, and stops where it fails or does not keep up."""

    def __init__(self, name: str, start: Callable[[], Tracker], run: Path, done: int, warn: Callable[[str], None]) -> None:
        self.name, self.start, self.metrics, self.done, self.warn = name, start, run / METRICS, done, warn
        self.sent = Sent(run, name)
        self.waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING)
        self.broken = self.failed = False
        self.thread = threading.Thread(target=self._run, name=f"feed {name}", daemon=True)
        self.thread.start()

    def put(self, item: Callable[[Tracker], None] | None) -> None:
        """Leave something for the tracker; waits for nothing."""
        if self.broken:
            return
        try:
            self.waiting.put_nowait(item)
        except queue.Full:
            self._give_up(f"{WAITING:,} lines wait for it")

    def end(self, failed: bool) -> None:
        """Nothing comes any more."""
        self.failed = failed
        self.put(None)

    def join(self) -> None:
        """Wait a while until everything has been sent."""
        self.thread.join(0 if self.broken else CLOSE_SECONDS)
        if self.thread.is_alive() and not self.broken:
            self._give_up(f"it has not taken everything within {CLOSE_SECONDS:g} s")

    def _run(self) -> None:
        try:
            tracker = self.start()
            self.sent.write(tracker.first - 1)
            for entry in lines(self.metrics, tracker.first, self.done):
                self.log(entry, tracker)
            while not self.broken and (item := self.waiting.get()) is not None:
                item(tracker)
            tracker.close(self.failed)
        except Exception as error:  # whatever a tracker's library raises: training goes on without it
            self._give_up(one_line(error))
        finally:
            self.sent.close()

    def log(self, entry: dict[str, Any], tracker: Tracker) -> None:
        """Give the tracker the numbers of a line, unless it has them."""
        if entry["step"] >= tracker.first:
            tracker.log(entry["step"], dict(numbers(entry)))
            self.sent.write(entry["step"])

    def _give_up(self, why: str) -> None:
        if not self.broken:
            self.broken = True
            self.warn(f"{self.name} gets no more of this run until it is resumed ({why}); training goes on, and "
                      f"{self.metrics} holds everything")  # fmt: skip


def numbers(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line by name, those of inner objects as OUTER/INNER; what is null, a list or text has none."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and prefix + name != "step":
            yield prefix + name, value


def asked_for(experiment: Experiment, done: int) -> list[tuple[str, Callable[[], Tracker]]]:
    """The trackers that the settings ask for: their names, and what starts them."""
    found: list[tuple[str, Callable[[], Tracker]]] = []
    if experiment.config.log.wandb != "disabled":
        wandb = "Weights & Biases"
        found.append((wandb, lambda: WandB(experiment, Sent(experiment.run, wandb).read())))
    if experiment.config.log.tensorboard:
        board = "TensorBoard"
        found.append((board, lambda: TensorBoard(experiment, min(done, Sent(experiment.run, board).read()))))
    return found


def remember_run(experiment: Experiment) -> None:
    """Note in the run directory the run's id on Weights & Biases, once."""
    path = experiment.run / WANDB_STATE
    if experiment.config.log.wandb != "disabled" and not path.exists():
        atomic_text(path, json.dumps({"id": uuid.uuid4().hex[:12]}) + "\n")


class WandB:
    """A run on Weights & Biases, the same one for all starts.

    Online the service knows which steps it has; offline each start leaves a folder of its own below `wandb/`, which
    `wandb sync` sends in their order.  What was sent before, up to the step `sent`, is not sent again though the run went back:
    it ignores steps that do.
    """

    def __init__(self, experiment: Experiment, sent: int) -> None:
        os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"} | os.environ  # no reports to its makers
        import wandb

        self.wandb, wanted = wandb, experiment.config.log
        state = json.loads((experiment.run / WANDB_STATE).read_text(encoding="utf-8"))
        online = wanted.wandb == "online"
        self.run = wandb.init(
            id=state["id"], resume="allow" if online else None, reinit="create_new", mode="online" if online else "offline",
            project=wanted.project, entity=wanted.entity or None, group=wanted.group or None, tags=wanted.tags,
            config=asdict(experiment.config), allow_val_change=True, dir=experiment.run,
            settings=wandb.Settings(console="off", init_timeout=INIT_SECONDS),
        )  # fmt: skip
        self.first = max(1, self.run.step) if online else sent + 1

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def figure(self, step: int, path: Path) -> None:
        self.run.log({FIGURE: self.wandb.Image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files for TensorBoard, one for each start; what an earlier one holds after the step `held` is taken back."""

    def __init__(self, experiment: Experiment, held: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from torch.utils.tensorboard import SummaryWriter

        folder = experiment.run / TENSORBOARD
        resumed = any(folder.glob("events.*"))
        self.summary = Summary
        self.first = held + 1
        self.writer = SummaryWriter(str(folder), purge_step=self.first if resumed else None)
        self.writer.add_text("config", "\n".join("    " + line for line in settings.to_yaml(experiment.config).splitlines()))

    def log(self, step: int, values: dict[str, float]) -> None:
        self._add([self.summary.Value(tag=name, simple_value=value) for name, value in values.items()], step)

    def figure(self, step: int, path: Path) -> None:
        png = path.read_bytes()
        width, height = struct.unpack(">II", png[16:24])  # of the first chunk, as PNG has it
        image = self.summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        self._add([self.summary.Value(tag=FIGURE, image=image)], step)

    def _add(self, values: list[Any], step: int) -> None:
        self.writer._get_file_writer().add_summary(self.summary(value=values), step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()
