"""The loop: losses and gradients that do not know the number of workers, resuming without a trace, missing data."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import ledger, metrics
from groups import in_a_group
from processes import Quiet, local_stream, settings, train
from safetensors.torch import load_file
from tiny_earth import make_data_set

from mmearth_ray.errors import DataError
from mmearth_ray.experiment import build_objective, open_experiment
from mmearth_ray.train import loop
from mmearth_ray.train.engine import parameter_groups
from mmearth_ray.train.loop import Worker, run
from mmearth_ray.train.outputs import export_model


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=42, size=40, held_out=6)
    return folder


def first_gradients(run_directory: Path) -> dict[str, np.ndarray]:
    """Gradients of step 1, out of AdamW's first moment: exp_avg = (1 - beta1) g after one step from zero."""
    moments = load_file(run_directory / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    return {k.removeprefix("exp_avg/"): v.numpy() / 0.1 for k, v in moments.items() if k.startswith("exp_avg/")}


LAYOUTS = [("train.workers=1", "train.micro_batch=2"), ("train.workers=2",), ("train.workers=4", "train.micro_batch=1")]
RECIPE = ("train.steps=20", "optimizer.lr=1e-3", "train.ledger=true", "checkpoint.every=1", "checkpoint.keep=0")


@pytest.fixture(scope="module")
def one_worker(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_directory = tmp_path_factory.mktemp("runs") / "one"
    train(shards, run_directory, *RECIPE)
    return run_directory


@pytest.mark.parametrize("layout", LAYOUTS, ids=["1x4x2", "2x1x4", "4x2x1"])
def test_loss_gradients_and_samples_do_not_know_the_number_of_workers(
    layout: tuple[str, ...], shards: Path, one_worker: Path, tmp_path: Path
) -> None:
    train(shards, tmp_path, *RECIPE, *layout)

    assert ledger(tmp_path) == ledger(one_worker)
    reference, found = first_gradients(one_worker), first_gradients(tmp_path)
    assert np.sqrt(sum((g**2).sum() for g in reference.values())) > 1
    for name, gradient in reference.items():
        norm = np.linalg.norm(gradient)
        assert np.linalg.norm(found[name] - gradient) <= 1e-4 * norm + 1e-9, name
    for ours, theirs in zip(metrics(tmp_path), metrics(one_worker), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5)
        assert ours["coverage"] == theirs["coverage"]


def test_the_logged_loss_is_the_one_that_was_trained_on(shards: Path, tmp_path: Path) -> None:
    train(shards, tmp_path, "train.steps=3", "optimizer.lr=0.05", "schedule.warmup_fraction=0")
    first, second, _ = metrics(tmp_path)
    assert first["loss"] == pytest.approx(sum(loss for loss in first["losses"].values() if loss is not None), rel=1e-6)
    moved = sum(loss for loss in second["losses"].values() if loss is not None)
    assert abs(second["loss"] - moved) > 0.1  # the weights of the losses have moved by now


def test_every_tile_is_seen_once_an_epoch_across_step_boundaries(one_worker: Path) -> None:
    seen = [tile for _, ids in sorted(ledger(one_worker).items()) for tile in ids]
    epochs = [seen[i : i + 36] for i in range(0, 144, 36)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(36)] for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("stop", ["stop_at", "signal"])
def test_resuming_gives_the_losses_weights_and_samples_of_an_undisturbed_run(stop: str, shards: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = ("train.steps=6", "optimizer.lr=1e-3", "train.ledger=true", "checkpoint.every=4", "validate.every=2")
    train(shards, whole, *recipe)
    if stop == "stop_at":
        train(shards, parts, *recipe, "train.stop_at=3")
    else:
        train(shards, parts, *recipe, stop_after=3)
    assert [entry["step"] for entry in metrics(parts)] == [1, 2, 3]
    train(shards, parts, *recipe, "train.workers=2")

    assert ledger(parts) == ledger(whole)
    for ours, theirs in zip(metrics(parts), metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ("validation" in ours) == ("validation" in theirs) == (ours["step"] % 2 == 0)
    last = Path("checkpoints") / "step-00000006" / "model.safetensors"
    weights = load_file(whole / last)
    for name, tensor in load_file(parts / last).items():
        assert np.allclose(tensor, weights[name], atol=2e-5), name


def test_resuming_with_the_same_layout_is_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = ("train.steps=5", "optimizer.lr=1e-3", "checkpoint.every=2")
    train(shards, whole, *recipe)
    train(shards, parts, *recipe, "train.stop_at=3")
    train(shards, parts, *recipe)
    last = Path("checkpoints") / "step-00000005"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / last / name).read_bytes() == (parts / last / name).read_bytes()


def test_lines_written_after_the_restored_step_are_dropped(shards: Path, tmp_path: Path) -> None:
    recipe = ("train.steps=4", "train.ledger=true", "checkpoint.every=2")
    train(shards, tmp_path, *recipe, "train.stop_at=2")
    expected = metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 1.0}) + '\n{"step": 4, "lo')
    with (tmp_path / "ledger" / "rank-1.jsonl").open("w") as file:
        file.write(json.dumps({"step": 3, "world": 2, "ids": ["x"]}) + "\n")
    train(shards, tmp_path, *recipe)
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2, 3, 4]
    assert metrics(tmp_path)[:2] == expected
    assert all("x" not in ids for ids in ledger(tmp_path).values())


def test_validation_does_not_know_the_number_of_workers(shards: Path, tmp_path: Path) -> None:
    recipe = ("train.steps=1", "validate.every=1")
    train(shards, tmp_path / "one", *recipe)
    train(shards, tmp_path / "four", *recipe, "train.workers=4")
    one, four = (metrics(tmp_path / name)[0]["validation"] for name in ("one", "four"))
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-6)
    assert one["coverage"] == four["coverage"]


def test_a_band_without_any_value_is_logged_as_uncovered_and_trained_around(one_worker: Path) -> None:
    coverage = metrics(one_worker)[0]["coverage"]
    assert coverage["canopy_height_eth"] == 0.5  # one of two bands
    assert 0 < coverage["sentinel1"] < 0.8


def test_a_modality_without_any_value_has_no_loss_and_does_not_move_its_head(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=8, size=32)
    recipe = ("model.bands.canopy_height_eth=[std]", "train.steps=3", "schedule.warmup_fraction=0", "optimizer.weight_decay=0")
    experiment = train(data.directory, tmp_path / "run", *recipe)
    entry = metrics(tmp_path / "run")[-1]
    assert entry["losses"]["canopy_height_eth"] is None
    assert entry["coverage"]["canopy_height_eth"] == 0
    initial = dict(build_objective(experiment).named_parameters())
    final = load_file(tmp_path / "run" / "checkpoints" / "step-00000003" / "model.safetensors")
    heads = [name for name in final if "canopy" in name]
    assert heads
    assert all(np.array_equal(final[name], initial[name].detach()) for name in heads)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(shards: Path, tmp_path: Path) -> None:
    config = settings(shards, tmp_path, "optimizer.lr=1e18", "schedule.warmup_fraction=0", "checkpoint.every=1")
    experiment = open_experiment(config, shards)
    with pytest.raises(DataError, match=r"the loss of step \d is not finite"):
        run(experiment, Worker(0, 1, torch.device("cpu"), 1), local_stream, Quiet())
    for path in (tmp_path / "checkpoints").glob("step-*/model.safetensors"):
        assert all(np.isfinite(tensor.numpy()).all() for tensor in load_file(path).values())


def test_starting_from_an_exported_encoder_copies_it(shards: Path, tmp_path: Path) -> None:
    train(shards, tmp_path / "first", "train.steps=2", "schedule.warmup_fraction=0")
    exported = tmp_path / "first" / "exported"
    second = ("train.steps=1", "model.targets=[sentinel2]", f"model.init={exported}", "schedule.warmup_fraction=1")
    train(shards, tmp_path / "second", *second)  # the first step of a warm-up has learning rate 0
    encoder = load_file(exported / "encoder.safetensors")
    weights = load_file(tmp_path / "second" / "checkpoints" / "step-00000001" / "model.safetensors")
    for name, tensor in encoder.items():
        assert np.array_equal(tensor, weights[f"model.encoder.{name}"]), name


def leaves_exporting_to_the_first(rank: int, workers: int, shards: Path, folder: Path) -> None:
    exported, config = folder / "exported", settings(shards, folder, "train.steps=2", f"train.workers={workers}")

    def slow(*arguments: Any) -> Path:
        for _ in range(600):
            if (folder / "others are done").exists():
                return export_model(*arguments)
            time.sleep(0.1)
        raise TimeoutError("the others wait")

    loop.export_model = slow
    run(open_experiment(config, shards), Worker(rank, workers, torch.device("cpu"), 1), local_stream, Quiet())
    assert exported.exists() == (rank == 0)
    if rank:
        (folder / "others are done").touch()


def test_no_worker_waits_for_the_export(shards: Path, tmp_path: Path) -> None:
    in_a_group(2, tmp_path, leaves_exporting_to_the_first, shards, tmp_path)
    assert (tmp_path / "others are done").exists()
    assert (tmp_path / "exported" / "encoder.safetensors").exists()


def test_decay_spares_biases_norms_and_loss_weights_only(shards: Path, tmp_path: Path) -> None:
    objective = build_objective(open_experiment(settings(shards, tmp_path), shards))
    decayed, plain = (group["params"] for group in parameter_groups(objective, 0.05))
    names = {id(p): name for name, p in objective.named_parameters()}
    assert len(decayed) + len(plain) == len(names)
    spared = {names[id(p)].rsplit(".", 1)[-1] for p in plain}
    assert spared == {"bias", "weight", "log_variances"}
    assert all(p.ndim == 1 for p in plain)
    kept = {names[id(p)].rsplit(".", 1)[-1] for p in decayed}
    assert kept == {"weight", "gamma", "beta", "mask_token"}
