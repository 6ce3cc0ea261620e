"""Training with image sizes in turn: the step's number tells the size, and the stream and all guarantees stay as they were."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from command import ledger, metrics
from processes import settings, train
from safetensors.torch import load_file
from tiny_earth import make_data_set
from torch import Tensor

import mmearth_ray
from mmearth_ray.checkpoints.assemble import build_model, checked_tensors
from mmearth_ray.checkpoints.folder import open_exported
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.experiment import check_resume, fixed_settings, open_experiment
from mmearth_ray.train.initial import check_initial

SIZES = ("model.image_sizes=[32,64]",)  # 4 x 4 patches of 8 and of 16 px; 32 is the primary one
RECIPE = ("train.steps=6", "optimizer.lr=1e-3", "train.ledger=true", "checkpoint.every=1", "checkpoint.keep=0",
          "validate.every=3", "validate.tiles=4")  # fmt: skip
OTHER = "model.sizes.16."


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=26, size=70, held_out=4)
    return folder


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one worker."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(shards, run, *RECIPE, *SIZES)
    return run


@pytest.fixture(scope="module")
def single(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the primary size alone."""
    run = tmp_path_factory.mktemp("runs") / "single"
    train(shards, run, *RECIPE)
    return run


def tensors(run: Path, step: int, part: str = "model") -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors")


def sized(name: str) -> bool:
    return ".encoder.stem." in name or ".pixel_heads." in name


def test_steps_take_the_sizes_in_turn_over_the_same_samples(whole: Path, single: Path) -> None:
    assert [entry["image_size"] for entry in metrics(whole)] == [32, 64] * 3
    assert all("image_size" not in entry for entry in metrics(single))
    assert ledger(whole) == ledger(single)
    first, other = metrics(whole)[0], metrics(single)[0]
    assert first["losses"] == other["losses"]  # the same samples, weights and size
    assert first["coverage"] == other["coverage"]
    assert metrics(whole)[1]["losses"] != metrics(single)[1]["losses"]
    assert all(0 < share <= 1 for entry in metrics(whole) for share in entry["coverage"].values())
    ours, theirs = (metrics(run)[2]["validation"]["coverage"] for run in (whole, single))
    assert ours == theirs  # of the primary size
    at_64 = metrics(whole)[1]["coverage"]
    assert at_64 != theirs


def test_a_sample_keeps_its_mask_and_has_the_crop_of_the_step(shards: Path, tmp_path: Path) -> None:
    experiment = open_experiment(settings(shards, tmp_path, *SIZES), shards)
    plain = open_experiment(settings(shards, tmp_path), shards)
    assert [experiment.spec_of(step).image_size for step in range(1, 6)] == [32, 64, 32, 64, 32]
    assert experiment.spec.image_size == plain.spec_of(2).image_size == 32
    ranges = [(start, start + 4) for start in range(0, 32, 4)]  # two micro-batches a step
    pairs = zip(experiment.source.batches(ranges), plain.source.batches(ranges), strict=True)
    for number, (batch, alone) in enumerate(pairs):
        size = (32, 64)[number // 2 % 2]
        assert batch["sentinel2"].shape == (4, 12, size, size)
        assert batch["esa_worldcover"].shape == (4, size, size)
        for name in ("id", "visible", "hidden", "product", "era5"):
            assert np.array_equal(batch[name], alone[name], equal_nan=name == "era5"), name
        if size == 32:
            assert all(np.array_equal(batch[name], alone[name], equal_nan=name == "era5") for name in alone if name != "id")


@pytest.mark.parametrize(
    "layout", [("train.workers=2", "train.micro_batch=2"), ("train.micro_batch=4",)], ids=["2x2x2", "1x2x4"]
)
def test_losses_gradients_and_weights_do_not_know_workers_and_micro_batches(
    layout: tuple[str, ...], shards: Path, whole: Path, tmp_path: Path
) -> None:
    train(shards, tmp_path, *RECIPE, *SIZES, *layout)
    assert ledger(tmp_path) == ledger(whole)
    for ours, theirs in zip(metrics(tmp_path), metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5)
        assert (ours["coverage"], ours["image_size"]) == (theirs["coverage"], theirs["image_size"])
    first, moments = tensors(whole, 1, "optimizer"), tensors(tmp_path, 1, "optimizer")
    assert moments.keys() == first.keys()
    for name, moment in first.items():  # after one step the first moment is the gradient, times 1 - beta1
        if name.startswith("exp_avg/"):
            assert (moments[name] - moment).norm() <= 1e-4 * moment.norm() + 1e-9, name
    found = tensors(tmp_path, 6)
    for name, weight in tensors(whole, 6).items():
        assert torch.allclose(found[name], weight, atol=2e-5), name


def test_a_step_leaves_the_parameters_of_other_sizes_alone(whole: Path) -> None:
    weights = [tensors(whole, step) for step in range(1, 7)]
    other = {name for name in weights[0] if name.startswith(OTHER)}
    mine = {name for name in weights[0] if sized(name) and name not in other}
    assert len(other) == len(mine) == 4 + 2 * 6
    for step, (before, after) in enumerate(pairwise(weights), 2):
        rest, trained = (other, mine) if step % 2 else (mine, other)
        assert all(torch.equal(before[name], after[name]) for name in rest)
        for name in before.keys() - rest:
            assert "canopy" in name or not torch.equal(before[name], after[name]), name
        assert trained <= before.keys() - rest
    first, second, last = (tensors(whole, step, "optimizer") for step in (1, 2, 6))
    assert not any(f"/{OTHER}" in name for name in first)
    assert {name.split("/", 1)[1] for name in second} == set(weights[0])
    counts = {name.split("/", 1)[1]: int(value) for name, value in last.items() if name.startswith("step/")}
    assert all(count == (3 if name in mine | other else 6) for name, count in counts.items())


@pytest.mark.parametrize("stop", [1, 3])
def test_resuming_between_turns_is_bit_for_bit(stop: int, shards: Path, whole: Path, tmp_path: Path) -> None:
    train(shards, tmp_path, *RECIPE, *SIZES, f"train.stop_at={stop}")
    train(shards, tmp_path, *RECIPE, *SIZES)
    for part in ("model", "optimizer"):
        path = Path("checkpoints") / "step-00000006" / f"{part}.safetensors"
        assert (tmp_path / path).read_bytes() == (whole / path).read_bytes()
    assert [entry["loss"] for entry in metrics(tmp_path)] == [entry["loss"] for entry in metrics(whole)]


def test_resuming_with_more_workers_goes_on_as_one_would(shards: Path, whole: Path, tmp_path: Path) -> None:
    train(shards, tmp_path, *RECIPE, *SIZES, "train.stop_at=1")
    train(shards, tmp_path, *RECIPE, *SIZES, "train.workers=2")
    assert ledger(tmp_path) == ledger(whole)
    for ours, theirs in zip(metrics(tmp_path), metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5)


def test_the_encoder_of_every_size_is_exported_with_the_same_shared_weights(whole: Path) -> None:
    weights, exported = tensors(whole, 6), whole / "exported"
    image = torch.randn(2, 12, 64, 64, generator=torch.Generator().manual_seed(0))
    encoders = {8: mmearth_ray.load_encoder(whole), 16: mmearth_ray.load_encoder(exported / "patch-16")}
    for patch, encoder in encoders.items():
        for name, value in encoder.state_dict().items():
            place = f"{OTHER}encoder.{name}" if patch == 16 and name.startswith("stem.") else f"model.encoder.{name}"
            assert torch.equal(value, weights[place]), name
        assert encoder.forward_features(image).shape == (2, 320, 64 // patch, 64 // patch)
        assert encoder.image_size == encoder.patch_size * 4
    everything = checked_tensors(open_exported(whole), whole=True)
    assert everything.keys() == weights.keys()
    assert checked_tensors(open_exported(whole / "checkpoints" / "step-00000006"), whole=True).keys() == weights.keys()
    other = open_exported(exported / "patch-16")
    assert (other.description.image_size, other.description.patch_size, other.description.image_sizes) == (64, 16, [])
    build_model(other.description).load_state_dict(
        {name.removeprefix("model."): t for name, t in checked_tensors(other, whole=True).items() if name != "log_variances"}
    )
    assert "| image sides in turn | 32 px, 64 px; encoders of" in (exported / "README.md").read_text()
    assert "in turn" not in (exported / "patch-16" / "README.md").read_text()


def test_figures_are_of_the_primary_size_whatever_the_first_step_takes(shards: Path, tmp_path: Path) -> None:
    recipe = ("train.steps=1", "figure.tiles=1", "validate.tiles=0", "model.image_sizes=[64,32]", "model.targets=[aster]")
    train(shards, tmp_path, *recipe)
    assert [entry["image_size"] for entry in metrics(tmp_path)] == [64]
    assert (tmp_path / "figures" / "reconstruction-00000001.png").is_file()


def test_a_size_named_twice_comes_twice(shards: Path, tmp_path: Path) -> None:
    experiment = open_experiment(settings(shards, tmp_path, "model.image_sizes=[64,32,64]"), shards)
    assert [experiment.spec_of(step).image_size for step in range(1, 8)] == [64, 32, 64, 64, 32, 64, 64]


def test_weights_of_one_size_start_it_and_leave_the_other_as_initialised(shards: Path, whole: Path, tmp_path: Path) -> None:
    frozen = ("train.steps=1", "schedule.warmup_fraction=1")  # the first step of a warm-up has learning rate 0
    train(shards, tmp_path / "all", *frozen, *SIZES, f"model.init={whole}")
    train(
        shards, tmp_path / "one", *frozen, "model.image_size=64", "model.patch_size=16", f"model.init={whole}/exported/patch-16"
    )
    given, every, one = tensors(whole, 6), tensors(tmp_path / "all", 1), tensors(tmp_path / "one", 1)
    assert all(torch.equal(every[name], value) for name, value in given.items() if name != "log_variances")
    for name, value in one.items():
        if name != "log_variances":
            assert torch.equal(value, given[name.replace("model.", OTHER, 1) if sized(name) else name]), name
    wrong = settings(shards, tmp_path / "wrong", *SIZES, f"model.init={whole}/exported/patch-16")
    with pytest.raises(DataError, match=r"stem\.0\.weight has shape \(40, 1, 2, 2\), this model needs \(40, 1, 1, 1\)"):
        check_initial(open_experiment(wrong, shards))


def test_another_list_of_sizes_is_another_run_and_none_is_as_before_there_was_one(shards: Path, tmp_path: Path) -> None:
    experiment = open_experiment(settings(shards, tmp_path, *SIZES), shards)
    found = fixed_settings(experiment.config)
    check_resume(experiment, found, experiment.identity, tmp_path)
    with pytest.raises(UsageError, match=r"was trained with model.image_sizes=\[64, 32\], this command says \[32, 64\]"):
        check_resume(experiment, found | {"model.image_sizes": [64, 32]}, experiment.identity, tmp_path)
    plain = open_experiment(settings(shards, tmp_path), shards)
    older = {name: value for name, value in fixed_settings(plain.config).items() if name != "model.image_sizes"}
    check_resume(plain, older, plain.identity, tmp_path)
    assert plain.identity == experiment.identity


def test_a_size_larger_than_the_tiles_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.image_sizes: 128 px is larger than the 70 px tiles of .*; use at most 64"):
        open_experiment(settings(shards, tmp_path, "model.image_sizes=[32,128]"), shards)


def test_an_export_from_before_there_were_several_sizes_is_read(single: Path, tmp_path: Path) -> None:
    exported = open_exported(single)
    older = json.loads((exported.folder / "config.json").read_text())
    assert older.pop("image_sizes") == []
    (tmp_path / "config.json").write_text(json.dumps(older))
    (tmp_path / "encoder.safetensors").write_bytes((exported.folder / "encoder.safetensors").read_bytes())
    assert open_exported(tmp_path).description == exported.description
    assert not list(exported.folder.glob("patch-*"))
    (tmp_path / "config.json").write_text(json.dumps(older | {"image_sizes": [32, 40]}))
    with pytest.raises(DataError, match=r"image_sizes \[32, 40\] are none of 32 px in patches of 8; make the folder again"):
        open_exported(tmp_path)
