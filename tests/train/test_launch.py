"""When a run starts again and when it gives up, without a cluster."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ray.exceptions import RayError

from mmearth_ray.config import load
from mmearth_ray.errors import DataError
from mmearth_ray.experiment import Experiment
from mmearth_ray.keys import Config
from mmearth_ray.stream.pipeline import Share
from mmearth_ray.train import checkpoint, launch, room
from mmearth_ray.train.commit import Keeping, begin
from mmearth_ray.train.launch import CHANGE_SECONDS, LOOK_SECONDS, Change, Failures
from mmearth_ray.train.ownership import claim, require_claim
from mmearth_ray.train.room import Amount, Cluster, Room


def experiment(folder: Path, **train: Any) -> Experiment:
    config = load([f"run.directory={folder}", *(f"train.{key}={value}" for key, value in train.items())])
    return cast(Experiment, SimpleNamespace(config=config, run=folder))


def commit(folder: Path, step: int) -> None:
    state = checkpoint.State(step, 0, {}, {}, {})
    begin(folder / "checkpoints", state, {"w": torch.zeros(1)}, {}, Keeping()).commit()


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


ADVICE = "use a smaller train.micro_batch, train.activation_checkpointing=true or more train.workers"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 worker(s) were killed due to the node running low on memory.\nSee the docs", "the memory did not suffice: "),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "the memory did not suffice: "),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory", "the memory did not suffice: "),
        ("(1) the process was killed by the OOM killer due to high memory usage\n(2) or by something else",
         "if the kernel ended a worker for its memory, as dmesg would tell: "),
    ],
)  # fmt: skip
def test_the_end_for_want_of_memory_says_what_to_do(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Failures(experiment(tmp_path, max_failures=0)).add(RuntimeError(text))
    assert f"; {said}{ADVICE}; {tmp_path}/error.log tells more" in str(caught.value)


def test_other_ends_say_nothing_of_memory(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Failures(experiment(tmp_path, max_failures=0)).add(RuntimeError("the raylet is gone"))
    assert "train." not in str(caught.value)


@pytest.mark.parametrize("lost", ["nothing is there", "no file can be written"])
def test_a_log_that_cannot_be_written_leaves_the_reason(lost: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if lost == "no file can be written":
        (run / "error.log").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        Failures(experiment(run, max_failures=0)).add(RuntimeError("a worker died"))
    assert str(caught.value) == "training ended after 0 restarts: a worker died"


def test_the_newest_checkpoint_is_known_by_its_name(tmp_path: Path) -> None:
    commit(tmp_path, 4)
    commit(tmp_path, 12)
    (tmp_path / "checkpoints" / "step-00000012" / "state.json").write_text("{")
    assert launch._reached(experiment(tmp_path)) == 12


def test_each_group_after_the_first_takes_the_checkpoints_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    first = Started(load([f"run.directory={tmp_path}"]), tmp_path, claim(folder, "one", str(tmp_path)))
    rooms, groups = [], []

    def found_room(*_: Any, again: bool) -> Room:
        rooms.append(again)
        return ROOM

    def group(found: Experiment, *_: Any) -> bool:
        groups.append(found)
        require_claim(found)
        for late in groups[:-1]:
            with pytest.raises(DataError, match="taken over by a later group"):
                require_claim(late)
        if len(groups) == 2:
            raise RayError("a machine is out of reach")
        return len(groups) < 4

    for name, double in (
        ("uses_gpus", lambda _: False),
        ("wait_for_room", found_room),
        ("_run_group", group),
        ("ask_for", print),
        ("_hold_statistics_here", lambda: None),
    ):
        monkeypatch.setattr(launch, name, double)
    assert not launch.launch(cast(Experiment, first))
    assert len({found.claim for found in groups}) == 4
    assert groups[0] is first
    assert rooms == [False, True, True, True]


@pytest.mark.parametrize("error", [DataError("a shard is damaged"), RuntimeError("a worker died")])
def test_what_is_known_of_every_end_is_in_the_log_and_a_demand_not_taken_back_hides_none(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refused(bundles: list[dict[str, float]]) -> None:
        asked.append(bundles)
        raise ConnectionError("the cluster is gone")

    def group(*_: Any) -> bool:
        raise error

    config = load([f"run.directory={tmp_path}", "train.max_failures=0"])
    for name, double in (
        ("uses_gpus", lambda _: False),
        ("wait_for_room", lambda *_, again: ROOM),
        ("_run_group", group),
        ("_hold_statistics_here", lambda: None),
    ):
        monkeypatch.setattr(launch, name, double)
    monkeypatch.setattr(room, "request_resources", refused)
    with pytest.raises(DataError, match=str(error)):
        launch.launch(cast(Experiment, Started(config, tmp_path, "")))
    log = (tmp_path / "error.log").read_text()
    assert f"{type(error).__name__}: {error}" in log
    assert "in group" in log
    assert asked == [[]]


@dataclass(frozen=True)
class Started:
    """What of an experiment launching looks at."""

    config: Config
    run: Path
    claim: str


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


@pytest.mark.parametrize(
    ("workers", "joins", "told"), [("3", "", True), ("2", "", False), ("[1,3]", "", True), ("3", "h:1", False)]
)
def test_more_workers_than_cores_on_a_machine_of_its_own_are_told(
    workers: str, joins: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S",
                 "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"):  # fmt: skip
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(launch, "join_or_start", lambda cpus, address: None)
    launch.start_ray(load([f"train.workers={workers}", "train.global_batch=6", f"run.address={joins}"]))
    said = capsys.readouterr().err
    assert ("3 workers share the 2 cores of this machine, where fewer are as fast" in said) == told
    assert bool(said) == told
