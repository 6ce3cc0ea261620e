"""Evaluations of a run: they change nothing, nobody waits for them, and every one is told once, whatever happens to the run."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stand_in_judge
import torch
from command import losses, metrics, wait_for
from groups import in_a_group
from processes import Quiet, local_stream, settings, train
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_earth import make_data_set

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.during import background
from mmearth_ray.experiment import Experiment, check_resume, fixed_settings, open_experiment
from mmearth_ray.objective import ENCODER
from mmearth_ray.train.evaluating import FOLDER, KEY, check_evaluation, is_due
from mmearth_ray.train.loop import Worker, run

RECIPE = ("optimizer.lr=1e-3", "checkpoint.every=2", "checkpoint.keep=0", "validate.tiles=0", "model.targets=[sentinel2,biome]")
COMMAND = (sys.executable, "-I", "-S", stand_in_judge.__file__)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=56, size=40, held_out=20)
    return folder


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "COMMAND", COMMAND)
    monkeypatch.setattr(background, "LOOK_SECONDS", 0.02)


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """All that the metrics tell of evaluations, in the order of steps."""
    told = [line[KEY] for line in metrics(folder) if KEY in line]
    return sorted((o for last in told for o in (last, *last.pop("earlier", ()))), key=lambda o: o["step"])


def digest_of(checkpoint: Path) -> str:
    """Of the encoder's weights as an exported model holds them."""
    with safe_open(checkpoint / "model.safetensors", framework="np") as file:
        names = sorted(name for name in file.keys() if name.startswith(ENCODER))  # noqa: SIM118  (no mapping)
        digest = hashlib.sha256()
        for name in names:
            digest.update(file.get_tensor(name).tobytes())
    return digest.hexdigest()


def evaluated_and_not(rank: int, workers: int, shards: Path, folder: Path, engines: tuple[str, ...]) -> None:
    """A run of each engine with evaluations and one without, which is hidden from the other by nothing but its directory."""
    background.COMMAND, background.LOOK_SECONDS = COMMAND, 0.02
    for engine in engines:
        for name, more in (("with", ("eval.every=2",)), ("without", ())):
            place = folder / f"{engine}-{name}"
            place.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            arguments = ("train.steps=5", f"train.engine={engine}", f"train.workers={workers}", *RECIPE, *more)
            experiment = open_experiment(settings(shards, place, *arguments), shards)
            run(experiment, Worker(rank, workers, torch.device("cpu"), 1), local_stream, Quiet())
            (place / f"random-{rank}").write_text(str(torch.rand(4).tolist()))


def assert_alike(folder: Path, engine: str, workers: int) -> None:
    ours, plain = folder / f"{engine}-with", folder / f"{engine}-without"
    assert losses(ours) == losses(plain)
    for step in (2, 4, 5):
        for name in ("model.safetensors", "optimizer.safetensors"):
            place = Path("checkpoints") / f"step-{step:08d}" / name
            assert (ours / place).read_bytes() == (plain / place).read_bytes()
    for rank in range(workers):
        assert (ours / f"random-{rank}").read_text() == (plain / f"random-{rank}").read_text()
    found = outcomes(ours)
    assert {o["step"] for o in found} | {s for o in found for s in o.get("skipped", ())} == {2, 4, 5}
    for outcome in found:
        assert outcome["weights"] == digest_of(ours / "checkpoints" / f"step-{outcome['step']:08d}")
    assert not outcomes(plain)
    assert not (plain / FOLDER).exists()


def test_one_worker_trains_bit_for_bit_as_without_evaluations(shards: Path, tmp_path: Path) -> None:
    evaluated_and_not(0, 1, shards, tmp_path, ("ddp",))
    assert_alike(tmp_path, "ddp", 1)


def test_two_workers_do_so_whatever_part_of_the_model_each_holds(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    in_a_group(2, tmp_path, evaluated_and_not, shards, tmp_path, ("ddp", "zero3"))
    for engine in ("ddp", "zero3"):
        assert_alike(tmp_path, engine, 2)


@pytest.mark.parametrize("do", ["hang", "crash"])
def test_whatever_becomes_of_an_evaluation_training_ends_well(
    do: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6):
        monkeypatch.setenv(f"STAND_IN_{step}", do)
    train(shards, tmp_path / "run", "train.steps=6", "eval.every=2", "eval.wait=1.5", *RECIPE)
    assert len(losses(tmp_path / "run")) == 6
    assert (tmp_path / "run" / "exported" / "encoder.safetensors").exists()
    found = outcomes(tmp_path / "run")
    assert {o["step"] for o in found} | {s for o in found for s in o.get("skipped", ())} == {2, 4, 6}
    assert all("failed" in outcome for outcome in found)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == len(found)
    assert all("was not evaluated: " in line and line.endswith("; training goes on") for line in said)


def test_no_step_waits_for_an_evaluation(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation of step 2 ends only once the last step is done: a run that waited for it would never get there."""
    monkeypatch.setenv("STAND_IN_2", "wait")
    monkeypatch.setenv("STAND_IN_UNTIL", str(tmp_path / "checkpoints" / "step-00000008" / "state.json"))
    train(shards, tmp_path, "train.steps=8", "eval.every=2", *RECIPE)
    last = metrics(tmp_path)[-1]
    assert [line["step"] for line in metrics(tmp_path) if KEY in line] == [8]
    assert (last[KEY]["step"], last[KEY]["skipped"]) == (8, [4, 6])
    assert [outcome["step"] for outcome in last[KEY]["earlier"]] == [2]
    assert all("loss" in line for line in metrics(tmp_path))
    handed = [line["step"] for line in metrics(tmp_path) if line["seconds"]["evaluation"]]
    assert handed == [3, 5, 7]  # what is between two steps is in the times of the second


class Heard(Quiet):
    """A control that keeps what it is told."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__(last)
        self.warned: list[str] = []
        self.told: list[dict[str, Any]] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def tell(self, progress: dict[str, Any]) -> None:
        super().tell(progress)
        self.told.append(progress)


def opened(shards: Path, folder: Path, *arguments: str) -> Experiment:
    folder.mkdir(parents=True, exist_ok=True)
    return open_experiment(settings(shards, folder, *RECIPE, *arguments), shards)


def start(experiment: Experiment, last: int | None = None) -> Heard:
    control = Heard(last)
    run(experiment, Worker(0, 1, torch.device("cpu"), 1), local_stream, control)
    return control


def test_a_collapse_is_warned_of_and_kept(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_2", "collapse")
    control = start(opened(shards, tmp_path, "train.steps=2", "eval.every=2", "log.tensorboard=true"))
    (warning,) = control.warned
    assert warning.startswith("the encoder of step 2 has collapsed: all is one; see 'evaluation' in the metrics")
    assert control.told[-1][KEY]["collapsed"] is True
    (outcome,) = outcomes(tmp_path)
    assert (outcome["collapsed"], outcome["why"]) == (True, "all is one")
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    for name, value in (("step", 2), ("knn", 0.5), ("logistic", 0.25), ("collapsed", 1)):
        assert [(e.step, e.value) for e in board.Scalars(f"{KEY}/{name}")] == [(2, value)]


def test_a_stopped_run_waits_for_nothing_and_the_next_start_tells_what_was_left(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_2", "hang")
    arguments = ("train.steps=7", "eval.every=2")
    control = start(opened(shards, tmp_path, *arguments), last=3)
    assert not control.warned
    assert not outcomes(tmp_path)
    monkeypatch.delenv("STAND_IN_2")
    start(opened(shards, tmp_path, *arguments))
    assert_each_once(tmp_path, {2, 4, 6, 7})


def assert_each_once(folder: Path, steps: set[int]) -> None:
    """Every step in the metrics has one line, and every one of `steps` one outcome, or is told to have been skipped."""
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, lines[-1]["step"] + 1))
    found = outcomes(folder)
    told = [outcome["step"] for outcome in found] + [step for outcome in found for step in outcome.get("skipped", ())]
    assert sorted(told) == sorted(steps)
    kept = [path.name for path in (folder / FOLDER).glob("step-*")]
    assert sorted(kept) == [f"step-{outcome['step']:08d}.json" for outcome in found]


@pytest.mark.parametrize("restored", [0, 4])
def test_what_was_told_after_the_restored_step_is_told_again_and_not_twice(restored: int, shards: Path, tmp_path: Path) -> None:
    arguments = ("train.steps=8", "eval.every=2")
    start(opened(shards, tmp_path, *arguments, "train.stop_at=6"))
    assert_each_once(tmp_path, {2, 4, 6})
    for checkpoint in (tmp_path / "checkpoints").glob("step-*"):
        if int(checkpoint.name[-8:]) > restored:
            shutil.rmtree(checkpoint)
    start(opened(shards, tmp_path, *arguments))
    assert_each_once(tmp_path, {2, 4, 6, 8})


def test_a_finished_run_that_starts_again_tells_nothing_anew(shards: Path, tmp_path: Path) -> None:
    arguments = ("train.steps=4", "eval.every=2")
    start(opened(shards, tmp_path, *arguments))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    start(opened(shards, tmp_path, *arguments))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_evaluations_that_are_turned_off_leave_none_of_later_steps(shards: Path, tmp_path: Path) -> None:
    start(opened(shards, tmp_path, "train.steps=4", "eval.every=2", "train.stop_at=2"))
    assert (tmp_path / FOLDER / "step-00000002.json").exists()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    start(opened(shards, tmp_path, "train.steps=4"))
    assert not list((tmp_path / FOLDER).glob("step-*"))
    assert not outcomes(tmp_path)


def test_a_run_killed_at_once_goes_on_with_every_evaluation_told_once(shards: Path, tmp_path: Path) -> None:
    tests = Path(stand_in_judge.__file__).parent
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\n"
        "from processes import Quiet, local_stream, settings\n"
        "from mmearth_ray.evaluate.during import background\n"
        "from mmearth_ray.experiment import open_experiment\n"
        "from mmearth_ray.train.loop import Worker, run\n"
        "background.COMMAND, background.LOOK_SECONDS = tuple(sys.argv[5].split()), 0.02\n"
        "shards = Path(sys.argv[3])\n"
        "experiment = open_experiment(settings(shards, Path(sys.argv[4]), *sys.argv[6:]), shards)\n"
        "run(experiment, Worker(0, 1, torch.device('cpu'), 1), local_stream, Quiet())\n"
    )
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    arguments = ("train.steps=2000", "eval.every=3", *RECIPE, "checkpoint.every=5", "checkpoint.keep=1")
    command = [sys.executable, "-c", code, str(tests), str(tests.parent), str(shards), str(run_directory), " ".join(COMMAND)]
    output = tmp_path / "output"
    for lines in (8, 19):
        with output.open("w") as file, subprocess.Popen([*command, *arguments], stdout=file, stderr=file, text=True) as process:
            wait_for(lambda lines=lines: len(metrics(run_directory)) >= lines, f"step {lines}", process)
            os.kill(process.pid, signal.SIGKILL)
    reached = max(int(path.name[-8:]) for path in (run_directory / "checkpoints").glob("step-*"))
    experiment = open_experiment(settings(shards, run_directory, *arguments, f"train.stop_at={reached + 4}"), shards)
    start(experiment)
    assert_each_once(run_directory, {step for step in range(1, reached + 5) if step % 3 == 0})


def test_evaluations_are_due_every_few_steps_and_at_the_end(shards: Path, tmp_path: Path) -> None:
    experiment = opened(shards, tmp_path, "train.steps=7", "eval.every=3")
    assert [step for step in range(1, 8) if is_due(experiment, step)] == [3, 6, 7]
    assert not any(is_due(opened(shards, tmp_path, "train.steps=7"), step) for step in range(1, 8))


def test_how_a_run_is_evaluated_may_change_when_it_resumes(shards: Path, tmp_path: Path) -> None:
    first = opened(shards, tmp_path)
    other = opened(shards, tmp_path, "eval.every=2", "eval.tiles=64", "eval.label=eco_region", "eval.threads=2", "eval.wait=9")
    check_resume(other, fixed_settings(first.config), first.identity, tmp_path)


def test_without_anything_to_evaluate_on_nothing_starts(shards: Path, tmp_path: Path) -> None:
    make_data_set(tmp_path / "none", tiles=16, size=40)
    with pytest.raises(UsageError, match=r"eval\.every=2: no tile is held out"):
        train(tmp_path / "none", tmp_path / "run", "eval.every=2")
    assert not metrics(tmp_path / "run")
    assert check_evaluation(opened(shards, tmp_path / "other")) == ""
    said = check_evaluation(opened(shards, tmp_path / "other", "eval.every=2"))
    assert said.startswith("evaluated every 2 steps on tiny, held out, by biome: ")


def test_the_real_process_judges_the_encoder_of_a_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "COMMAND", (sys.executable, "-m", "mmearth_ray.evaluate.during.judge"))
    control = start(
        opened(shards, tmp_path, "train.steps=2", "eval.every=2", "model.image_sizes=[16,32]", "model.image_size=16")
    )
    (outcome,) = outcomes(tmp_path)
    assert not control.warned, control.warned
    assert 0 <= outcome["knn"] <= 1
    assert 0 <= outcome["logistic"] <= 1
    assert 1 < outcome["effective_rank"] < 20
    assert json.loads((tmp_path / FOLDER / "step-00000002.json").read_text()) == outcome
