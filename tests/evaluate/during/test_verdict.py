"""The verdict on an encoder: features fed as in pretraining, scores and health of just these, and errors that name the step."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_task import tiny_task

from mmearth_ray.checkpoints.folder import Description, statistics_by_product, write_exported
from mmearth_ray.checkpoints.load import load_encoder
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal, Task, load_task
from mmearth_ray.evaluate.datasets.writing import Block, write_task
from mmearth_ray.evaluate.during import judge
from mmearth_ray.evaluate.during.health import health_of
from mmearth_ray.evaluate.during.held_out import PRODUCT_OF_EACH, round_of
from mmearth_ray.evaluate.during.requests import ENCODER, REQUEST, RESULT
from mmearth_ray.evaluate.during.verdict import verdict_on
from mmearth_ray.evaluate.protocols.frozen import knn
from mmearth_ray.evaluate.protocols.logistic import logistic
from mmearth_ray.modalities import DEFAULT_INPUT, PRODUCTS, get
from mmearth_ray.model.dense import build_dense, start

DEPTHS, DIMS = (1, 1, 1, 1), (4, 8, 8, 16)


def request(folder: Path, task: Task, spoil: Callable[[dict[str, torch.Tensor]], Any] = len, tiles: int = 512) -> Path:
    """A request with a tiny encoder of random weights, whose products have other statistics each."""
    entry = get(DEFAULT_INPUT).default_bands()
    torch.manual_seed(0)
    module = build_dense(12, DEPTHS, DIMS, 8, "modified", None, num_classes=0, features_only=False, out_indices=None)
    start(module)
    weights = {f"model.encoder.{name}": 3 * value for name, value in module.state_dict().items()}
    spoil(weights)
    mean = np.array([[1000.0] * 12, [2000.0] * 12], np.float32)
    description = Description(
        size=None, depths=list(DEPTHS), dims=list(DIMS), patch_size=8, image_size=16, stem="modified", grn="image",
        input=entry.name, bands=list(entry.bands), units=list(entry.units), missing=list(entry.missing),
        statistics=statistics_by_product(mean, mean / 2), targets=[], target_bands={}, normalise_targets=[],
        weighting="unweighted", decoder_width=8, decoder_depth=1,
    )  # fmt: skip
    write_exported(folder / ENCODER, description, weights)
    content = {"step": 30, "skipped": [], "task": str(task.folder), "tiles": tiles, "threads": 1}
    (folder / REQUEST).write_text(json.dumps(content))
    return folder


def features(folder: Path, task: Task, products: list[str]) -> np.ndarray:
    """Of all images, one after the other."""
    encoder: Any = load_encoder(folder / ENCODER).eval()
    with torch.no_grad():
        rows = [encoder(encoder.normalise(p)(torch.from_numpy(task.images([i])))) for i, p in enumerate(products)]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("goal", [Goal.SINGLE, Goal.MULTI, Goal.REGRESSION])
def test_scores_and_health_are_those_of_the_encoders_features(goal: Goal, tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task", goal)
    folder = request(tmp_path / "request", task)
    found = verdict_on(folder)
    X, rows = features(folder, task, ["l2a"] * 60), round_of(task, 512)
    y = {name: task.labels(getattr(rows, name)) for name in ("train", "valid", "test")}
    K = task.info.outputs
    predicted = {
        "knn": knn(X[rows.train], y["train"], X[rows.test], goal, K).prediction,
        "logistic": logistic(X[rows.train], y["train"], X[rows.valid], y["valid"], X[rows.test], goal, K).prediction,
    }
    for name, prediction in predicted.items():
        assert found[name] == pytest.approx(scored(goal, y["test"], prediction), abs=1e-6)
    health = health_of(X)
    assert found["effective_rank"] == pytest.approx(health.effective_rank, rel=1e-4)
    assert found["feature_std"] == pytest.approx(health.feature_std, rel=1e-4)
    assert found["mean_cosine"] == pytest.approx(health.mean_cosine, abs=1e-5)
    assert (found["step"], found["fit_images"], found["test_images"]) == (30, 48, 12)
    assert found["metric"] == {"single-label": "accuracy", "multi-label": "micro_f1", "regression": "r2"}[goal]
    json.dumps(found, allow_nan=False)


def scored(goal: Goal, truth: np.ndarray, prediction: np.ndarray) -> float:
    if goal is Goal.SINGLE:
        return float(np.mean(truth == prediction))
    if goal is Goal.MULTI:
        said = prediction > 0.5
        return float(2 * (said & (truth > 0)).sum() / (said.sum() + truth.sum()))
    return float(1 - ((truth - prediction) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def test_every_image_is_normalised_by_the_statistics_of_its_product(tmp_path: Path) -> None:
    plain = tiny_task(tmp_path / "plain")
    products = [PRODUCTS[i % 2] for i in range(60)]
    info = replace(plain.info, product=None, origin={PRODUCT_OF_EACH: products})
    everything = np.arange(60)
    block = Block(plain.ids.tolist(), plain.split.tolist(), np.full(60, -1), plain.labels(everything), plain.images(everything))
    write_task(tmp_path / "mixed", info, [block])
    task = load_task(tmp_path / "mixed")
    folder = request(tmp_path / "request", task)
    found = verdict_on(folder)
    mixed, one = (health_of(features(folder, task, p)) for p in (products, ["l2a"] * 60))
    assert found["feature_std"] == pytest.approx(mixed.feature_std, rel=1e-4)
    assert found["feature_std"] != pytest.approx(one.feature_std, rel=1e-2)


def test_no_more_images_than_asked_for_are_looked_at(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task", images=200)
    found = verdict_on(request(tmp_path / "request", task, tiles=40))
    assert (found["fit_images"], found["test_images"]) == (20, 20)


def test_an_encoder_that_tells_nothing_apart_has_collapsed(tmp_path: Path) -> None:
    def constant(weights: dict[str, torch.Tensor]) -> None:
        weights["model.encoder.downsample_layers.2.1.weight"].zero_()
        weights["model.encoder.downsample_layers.2.1.bias"].fill_(1.0)

    found = verdict_on(request(tmp_path / "request", tiny_task(tmp_path / "task"), constant))
    assert found["collapsed"] is True
    assert "features vary by 0 between images" in found["why"]
    healthy = verdict_on(request(tmp_path / "healthy", load_task(tmp_path / "task")))
    assert healthy["collapsed"] is False
    assert "why" not in healthy


def test_features_that_are_not_finite_are_an_error_that_names_the_step(tmp_path: Path) -> None:
    def broken(weights: dict[str, torch.Tensor]) -> None:
        next(iter(weights.values())).fill_(torch.nan)

    with pytest.raises(DataError, match=r"encoder 'step 30' for image 'image-\d+' of the train split are not finite"):
        verdict_on(request(tmp_path / "request", tiny_task(tmp_path / "task"), broken))


def test_a_data_set_without_a_band_in_common_is_an_error(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task")
    folder = request(tmp_path / "request", task)
    everything = np.arange(60)
    info = replace(task.info, bands=tuple(f"other.{i}" for i in range(12)), product=None)
    block = Block(task.ids.tolist(), task.split.tolist(), np.full(60, -1), task.labels(everything), task.images(everything))
    write_task(tmp_path / "task", info, [block])
    with pytest.raises(UsageError, match="no band is common to both"):
        verdict_on(folder)


def run_judge(folder: Path, parent: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmearth_ray.evaluate.during.judge", str(folder), str(parent)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def test_the_process_writes_what_it_found_or_one_line(tmp_path: Path) -> None:
    folder = request(tmp_path / "request", tiny_task(tmp_path / "task"))
    done = run_judge(folder, os.getpid())
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / RESULT).read_text())
    assert found.pop("cpu_seconds") > 0
    assert found == verdict_on(folder)
    (folder / RESULT).unlink()
    (folder / ENCODER / "config.json").write_text("{")
    done = run_judge(folder, os.getpid())
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (folder / RESULT).exists()


def test_the_process_ends_with_the_one_that_asked() -> None:
    assert run_judge(Path("/nowhere"), 1).returncode in (1, 2)  # whose parent is another already
    child = "from mmearth_ray.evaluate.during.judge import end_with; end_with({})"
    parent = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}.format(os.getpid())])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        orphan = int(process.stdout.readline())
        assert Path(f"/proc/{orphan}").exists()
        process.kill()
    deadline = time.monotonic() + 60
    while _lives(orphan):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert judge.LOOK_SECONDS <= 1


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
