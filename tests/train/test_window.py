"""Metrics that leave the device a window at a time: the same lines, and the same end where a loss is not finite."""

import time
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from command import metrics
from processes import Quiet, local_stream, settings, train
from safetensors.torch import load_file
from tiny_earth import make_data_set

from mmearth_ray.errors import DataError
from mmearth_ray.experiment import build_objective, open_experiment
from mmearth_ray.train import window
from mmearth_ray.train.clock import ASIDE, STAGES
from mmearth_ray.train.engine import DDPEngine, Engine
from mmearth_ray.train.engines import ENGINES
from mmearth_ray.train.loop import Worker, run
from mmearth_ray.train.peak import step_flops
from mmearth_ray.train.window import Found

LINES = ("step", "lr", "loss", "losses", "coverage")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=24, size=40, held_out=4)
    return folder


def _weights(run_directory: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run_directory / "checkpoints").glob("step-*")) / "model.safetensors")


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_do_not_depend_on_when_they_are_fetched(workers: int, shards: Path, tmp_path: Path) -> None:
    recipe = ("train.steps=7", f"train.workers={workers}", "checkpoint.every=5", "optimizer.lr=1e-3")
    for every in (1, 3):
        train(shards, tmp_path / str(every), *recipe, f"train.fetch_every={every}")
    often, seldom = (metrics(tmp_path / str(every)) for every in (1, 3))
    assert [entry["step"] for entry in seldom] == list(range(1, 8))
    assert [{k: entry[k] for k in LINES} for entry in often] == [{k: entry[k] for k in LINES} for entry in seldom]
    assert len({entry["tiles_per_second"] for entry in seldom}) == 4  # after steps 3, 5 (a checkpoint), 6 and 7
    finals = _weights(tmp_path / "1"), _weights(tmp_path / "3")
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


@pytest.mark.parametrize("every", [1, 3])
def test_the_stages_add_up_to_the_time_of_the_steps_and_to_all_the_time_there_was(
    every: int, shards: Path, tmp_path: Path
) -> None:
    recipe = ("train.micro_batch=4", "checkpoint.every=5", "validate.every=2", f"train.fetch_every={every}")
    begin = time.perf_counter()
    experiment = train(shards, tmp_path, *recipe, "train.steps=7", "log.peak_tflops=0.001")
    elapsed = time.perf_counter() - begin
    lines = metrics(tmp_path)
    for line in lines:
        assert set(line["seconds"]) == set(STAGES)
        assert all(
            line["seconds"][stage] > 0 for stage in ("data_wait", "to_device", "forward", "backward", "optimizer", "rest")
        )
        assert [stage for stage in ASIDE if line["seconds"][stage]] == {
            3: ["validation"], 5: ["validation"], 6: ["checkpoint"], 7: ["validation"],
        }.get(line["step"], [])  # fmt: skip
    assert 0 < sum(sum(line["seconds"].values()) for line in lines) < elapsed
    per_step = step_flops(experiment.config, experiment.spec.image_size, experiment.spec.patch_size) * 8
    fetched = [list(group) for _, group in groupby(lines, key=lambda line: line["mfu"])]
    assert [len(group) for group in fetched] == ([1] * 7 if every == 1 else [2, 1, 1, 1, 1, 1])
    for group in fetched:
        took = sum(line["seconds"][stage] for line in group for stage in STAGES if stage not in ASIDE)
        waited = sum(line["seconds"]["data_wait"] for line in group)
        for line in group:
            assert line["tiles_per_second"] == pytest.approx(8 * len(group) / took, rel=1e-3)
            assert line["mfu"] == pytest.approx(per_step * len(group) / took / 1e9, rel=1e-3)
            assert line["data_wait"] == pytest.approx(waited / took, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "engine",
    [name if name in ("ddp", "zero3") else pytest.param(name, marks=[pytest.mark.drill, pytest.mark.long]) for name in ENGINES],
)
def test_every_engine_tells_its_forward_from_its_backward_pass(engine: str, shards: Path, tmp_path: Path) -> None:
    if engine != "ddp":
        pytest.importorskip("deepspeed")
    train(shards, tmp_path, "train.workers=2", "train.steps=2", f"train.engine={engine}")
    for line in metrics(tmp_path):
        assert line["seconds"]["forward"] > 0
        assert line["seconds"]["backward"] > 0


def test_memory_is_that_of_the_fullest_worker(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(shards, tmp_path / "one", "train.steps=2")
    for line in metrics(tmp_path / "one"):
        assert 0.05 < line["memory_gb"]["resident"] < 50
        assert line["memory_gb"]["gpu_peak"] is None
    told = torch.tensor([0.0, 2e9, 3e9, 5e9, 1e9], dtype=torch.float64)  # of two workers: resident, on the GPU

    class Two:
        device, module = torch.device("cpu"), SimpleNamespace(weigh=lambda *_: torch.zeros(()))

        def all_sum(self, values: torch.Tensor) -> torch.Tensor:
            assert values[-4:].tolist() == [0, 0, 7, 9]
            return torch.cat([values[:-5], told])

    monkeypatch.setattr(window, "memory_in_use", lambda device: (7.0, 9.0))
    monkeypatch.setattr(
        window, "dist", SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2)
    )
    found = Found(torch.zeros(3, dtype=torch.float64), torch.ones(3), None, torch.ones(()), 4)
    fetched = window.fetch([found], cast(Engine, Two()))
    assert fetched.memory == {"resident": 5.0, "gpu_peak": 3.0}
    assert fetched.steps[0].faults == 0


def test_the_wish_to_stop_is_heard_when_metrics_are_fetched(shards: Path, tmp_path: Path) -> None:
    train(shards, tmp_path, "train.steps=9", "train.fetch_every=4", stop_after=1)
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2, 3, 4]
    assert max((tmp_path / "checkpoints").glob("step-*")).name == "step-00000004"


def test_the_first_step_that_was_not_finite_is_named_however_late_it_is_seen(shards: Path, tmp_path: Path) -> None:
    for every in (1, 6):
        arguments = ("optimizer.lr=1e18", "schedule.warmup_fraction=0", "train.steps=12", f"train.fetch_every={every}")
        config = settings(shards, tmp_path / str(every), *arguments)
        with pytest.raises(DataError, match="the loss of step 2 is not finite"):
            run(open_experiment(config, shards), Worker(0, 1, torch.device("cpu"), 1), local_stream, Quiet())


def test_after_a_gradient_that_is_not_finite_nothing_is_applied_any_more(shards: Path, tmp_path: Path) -> None:
    experiment = open_experiment(settings(shards, tmp_path), shards)
    engine = DDPEngine(build_objective(experiment), experiment.config.optimizer, torch.device("cpu"))

    def applied(value: float) -> bool:
        for parameter in engine.module.parameters():
            parameter.grad = torch.full_like(parameter, value)
        return bool(engine.step(0.1))

    assert applied(1e30)  # its square is no float32, it is one itself
    before = {name: weight.clone() for name, weight in engine.weights().items()}
    moments = {name: value.clone() for name, value in engine.moments().items()}
    assert [applied(value) for value in (np.inf, 1.0, np.nan)] == [False, False, False]
    assert all(torch.equal(weight, before[name]) for name, weight in engine.weights().items())
    assert all(torch.equal(value, moments[name]) for name, value in engine.moments().items())


def test_bf16_keeps_float32_weights_and_loses_little(shards: Path, tmp_path: Path) -> None:
    recipe = ("train.steps=6", "optimizer.lr=1e-3", "validate.every=6", "validate.tiles=4")
    for precision in ("fp32", "bf16"):
        train(shards, tmp_path / precision, *recipe, f"train.precision={precision}")
    exact, low = (metrics(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert [entry["loss"] for entry in exact] != [entry["loss"] for entry in low]
    for ours, theirs in zip(low, exact, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
    assert low[-1]["validation"]["loss"] == pytest.approx(exact[-1]["validation"]["loss"], rel=2e-2)
    assert {weight.dtype for weight in _weights(tmp_path / "bf16").values()} == {torch.float32}


def test_steps_before_the_one_that_was_not_finite_are_written_down(shards: Path, tmp_path: Path) -> None:
    arguments = ("optimizer.lr=1e18", "schedule.warmup_fraction=0", "train.steps=12", "train.fetch_every=6")
    with pytest.raises(DataError, match="the loss of step 2 is not finite"):
        run(open_experiment(settings(shards, tmp_path, *arguments), shards), Worker(0, 1, torch.device("cpu"), 1), local_stream,
            Quiet())  # fmt: skip
    assert [entry["step"] for entry in metrics(tmp_path)] == [1]
