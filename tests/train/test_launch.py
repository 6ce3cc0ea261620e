"""When a run starts again and when it gives up, without a cluster."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mmearth_ray.config import load
from mmearth_ray.errors import DataError
from mmearth_ray.experiment import Experiment
from mmearth_ray.stream.pipeline import Share
from mmearth_ray.train import checkpoint, launch
from mmearth_ray.train.launch import CHANGE_SECONDS, LOOK_SECONDS, Change, Failures
from mmearth_ray.train.room import Amount, Cluster, Room


def experiment(folder: Path, **train: Any) -> Experiment:
    config = load([f"run.directory={folder}", *(f"train.{key}={value}" for key, value in train.items())])
    return cast(Experiment, SimpleNamespace(config=config, run=folder))


def commit(folder: Path, step: int) -> None:
    state = checkpoint.State(step, 0, {}, {}, {})
    checkpoint.save(folder / "checkpoints", state, {"w": torch.zeros(1)}, {}, keep=0)


def test_failures_in_a_row_end_the_run_and_a_new_checkpoint_forgives_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = Failures(experiment(tmp_path, max_failures=2))
    for step in (4, 8, 12):
        failures.add(RuntimeError("a worker died"))
        failures.add(RuntimeError("a worker died"))
        commit(tmp_path, step)
    failures.add(RuntimeError("a worker died"))
    assert capsys.readouterr().err.splitlines()[-1] == "workers were lost (a worker died); going on after step 12"
    failures.add(RuntimeError("a worker died"))
    with pytest.raises(DataError, match=r"training ended after 2 restarts: out of memory; .*error.log tells more"):
        failures.add(RuntimeError("...\nout of memory"))
    assert "out of memory" in (tmp_path / "error.log").read_text()


class Cloud:
    """A cluster of one machine whose CPUs change, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.cpus, self.leaving = 0.0, 3.0, set[str]()
        monkeypatch.setattr(launch.time, "monotonic", lambda: self.now)
        self.asked: list[tuple[int, bool]] = []
        monkeypatch.setattr(launch, "cluster_now", self.cluster)
        monkeypatch.setattr(launch, "ask_for", lambda workers, gpus: self.asked.append((workers, gpus)))
        monkeypatch.setattr(launch, "draining", lambda: set(self.leaving))

    def cluster(self) -> Cluster:
        return Cluster((Amount(self.cpus, 0),), Amount(0, 0), 1e9)

    def looks(self, change: Change, seconds: float) -> list[bool]:
        found = []
        for _ in range(int(seconds / LOOK_SECONDS)):
            self.now += LOOK_SECONDS
            found.append(change())
        return found


ROOM = Room(2, Share(1, 1), Amount(0, 0))


def test_a_run_is_interrupted_only_for_room_that_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = Cloud(monkeypatch)
    change = Change(experiment(tmp_path, workers="[1,4]").config, ROOM, gpus=False)
    assert not any(cloud.looks(change, 60))
    cloud.cpus = 5
    assert not any(cloud.looks(change, CHANGE_SECONDS - LOOK_SECONDS))
    cloud.cpus = 4  # three workers do not divide the batch
    assert not any(cloud.looks(change, 60))
    cloud.cpus = 5
    assert cloud.looks(change, CHANGE_SECONDS + LOOK_SECONDS)[-1]


def test_a_fixed_number_of_workers_is_never_interrupted_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = Cloud(monkeypatch)
    change = Change(experiment(tmp_path, workers=2).config, ROOM, gpus=False)
    cloud.cpus = 64
    assert not any(cloud.looks(change, 100))


def test_a_machine_about_to_be_taken_away_interrupts_at_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = Cloud(monkeypatch)
    cloud.leaving = {"an idle machine, without which there is room enough"}
    change = Change(experiment(tmp_path, workers="[1,2]").config, ROOM, gpus=False)
    assert not any(cloud.looks(change, 60))
    cloud.cpus = 2  # what is left without it
    assert cloud.looks(change, LOOK_SECONDS) == [True]


def test_a_run_whose_data_tasks_have_lost_their_cpu_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = Cloud(monkeypatch)
    change = Change(experiment(tmp_path, workers=2).config, ROOM, gpus=False)
    cloud.looks(change, 10)
    cloud.cpus = 2
    assert not any(cloud.looks(change, CHANGE_SECONDS - LOOK_SECONDS))
    assert cloud.looks(change, 2 * LOOK_SECONDS)[-1]


def test_what_a_run_could_use_is_asked_for_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = Cloud(monkeypatch)
    cloud.looks(Change(experiment(tmp_path, workers="[1,4]").config, ROOM, gpus=False), 20)
    assert cloud.asked == [(4, False)] * 10
