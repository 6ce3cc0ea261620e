"""Trackers that fail, hang or are left out for a while: training goes on as if they were not there, and they miss nothing."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from command import metrics
from processes import Quiet
from tracked import entry, opened, write

from mmearth_ray.experiment import Experiment
from mmearth_ray.train import trackers
from mmearth_ray.train.journal import METRICS
from mmearth_ray.train.trackers import Metrics


class Listener:
    """A tracker that keeps what it is given, and fails where it is told to."""

    def __init__(self, first: int = 1, fails_at: int = 0) -> None:
        self.first, self.fails_at = first, fails_at
        self.steps: list[int] = []
        self.closed: bool | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("the network\nis away")
        self.steps.append(step)

    def figure(self, step: int, path: Path) -> None:
        pass

    def close(self, failed: bool) -> None:
        self.closed = failed


def use(monkeypatch: pytest.MonkeyPatch, **starts: Any) -> None:
    monkeypatch.setattr(trackers, "asked_for", lambda experiment, done: list(starts.items()))


def test_a_tracker_that_fails_says_so_in_one_line_and_nothing_else_changes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    well, ill = Listener(), Listener(fails_at=2)

    def never() -> Listener:
        raise OSError("no space left on the disk")

    use(monkeypatch, Well=lambda: well, Ill=lambda: ill, Never=never)
    experiment = opened(shards, tmp_path / "run")
    write(experiment, 0, range(1, 6))
    assert [json.loads(line) for line in (experiment.run / METRICS).read_text().splitlines()] == [entry(s) for s in range(1, 6)]
    assert (well.steps, well.closed) == ([1, 2, 3, 4, 5], False)
    assert (ill.steps, ill.closed) == ([1], None)
    warned = sorted(capsys.readouterr().err.splitlines())
    assert len(warned) == 2
    assert warned[0].startswith("warning: Ill gets no more of this run until it is resumed (the network is away); training")
    assert warned[1].startswith("warning: Never gets no more of this run until it is resumed (no space left on the disk);")


@pytest.mark.parametrize("fails_at", [1, 2, 5, 9])
def test_what_a_tracker_missed_it_gets_when_the_run_is_resumed_and_nothing_twice(
    fails_at: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost after step 6, resumed from 4, while the tracker fails at a step; resumed once without it, and at last with it."""
    experiment = opened(shards, tmp_path / "run")
    held: dict[int, float] = {}

    class Keeper(Listener):
        """A tracker that takes back what it holds after the restored step, or one that takes no step twice."""

        def __init__(self, first: int) -> None:
            super().__init__(first, fails_at)

        def log(self, step: int, values: dict[str, float]) -> None:
            super().log(step, values)
            assert step not in held
            held[step] = values["start"]

    def asked(experiment: Experiment, done: int) -> list[tuple[str, Any]]:
        return [("Keeper", lambda: Keeper(trackers.Sent(experiment.run, "Keeper").read() + 1))]

    monkeypatch.setattr(trackers, "asked_for", asked)
    write(experiment, 0, range(1, 7), start=1)
    write(experiment, 4, range(5, 8), start=2)
    use(monkeypatch)
    write(experiment, 7, range(8, 10), start=3)
    fails_at = 0
    monkeypatch.setattr(trackers, "asked_for", asked)
    write(experiment, 9, range(10, 12), start=4)
    assert list(held) == list(range(1, 12))
    file = {entry["step"]: entry["start"] for entry in metrics(experiment.run)}
    assert all(held[step] == start for step, start in file.items() if step not in (5, 6))  # it may have had these before


def test_a_process_that_is_killed_has_noted_what_was_sent(tmp_path: Path) -> None:
    sent = trackers.Sent(tmp_path, "Weights & Biases")
    assert sent.read() == 0
    program = f"import os, pathlib; from mmearth_ray.train.trackers import Sent; sent = Sent(pathlib.Path({str(tmp_path)!r}), "
    program += "'Weights & Biases'); [sent.write(step) for step in (7, 123, 45)]; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert sent.read() == 45
    assert [path.name for path in (tmp_path / "trackers").iterdir()] == ["weights-biases"]


def test_training_does_not_wait_for_a_tracker_that_hangs(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free, hanging = threading.Event(), Listener()

    def hang() -> Listener:
        free.wait(60)
        return hanging

    monkeypatch.setattr(trackers, "WAITING", 3)
    use(monkeypatch, Hanging=hang)
    experiment = opened(shards, tmp_path / "run")
    write(experiment, 0, range(1, 8))
    assert [json.loads(line)["step"] for line in (experiment.run / METRICS).read_text().splitlines()] == list(range(1, 8))
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: Hanging gets no more of this run until it is resumed (3 lines wait for it);")
    assert not hanging.steps
    free.set()


def test_the_end_of_a_run_waits_for_what_is_still_being_sent_but_not_for_ever(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = threading.Event()
    slow, stuck = Listener(), Listener()
    slow.close = lambda failed: setattr(slow, "closed", failed)
    stuck.close = lambda failed: setattr(stuck, "closed", free.wait(60))
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    use(monkeypatch, Slow=lambda: slow, Stuck=lambda: stuck)
    experiment = opened(shards, tmp_path / "run")
    write(experiment, 0, range(1, 101))
    assert slow.steps == list(range(1, 101))
    assert slow.closed is False
    (warning,) = capsys.readouterr().err.splitlines()
    assert "Stuck gets no more of this run until it is resumed (it has not taken everything within 0.5 s)" in warning
    free.set()


def test_a_run_that_ends_by_an_error_is_marked_so(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    use(monkeypatch, Listener=lambda: listener)
    experiment = opened(shards, tmp_path / "run")
    with pytest.raises(ZeroDivisionError), Metrics(experiment, 0, Quiet().warn):
        _ = 1 / 0
    assert listener.closed is True
