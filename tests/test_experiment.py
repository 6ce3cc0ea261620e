"""An experiment: configuration and data set fit, statistics are chosen and complete, a resumed run is the same run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_earth import make_data_set

from mmearth_ray.config import DEFAULT_STEPS, load
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.experiment import (
    build_objective,
    check_resume,
    fixed_settings,
    load_statistics,
    open_experiment,
)
from mmearth_ray.keys import Config
from mmearth_ray.modalities import Kind, table_hash
from mmearth_ray.shards.manifest import Manifest

SMALL = ["model.image_size=16", "model.decoder_width=16", "train.global_batch=8"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """40 training and 8 held-out tiles of 16 px."""
    return make_data_set(tmp_path_factory.mktemp("shards"), held_out=8)


def configured(*arguments: str) -> Config:
    return load([*SMALL, *arguments])


def statistics_without(manifest: Manifest, modality: str, band: str) -> dict[str, Any]:
    found = json.loads(json.dumps(manifest.statistics))
    for variant in found[modality].values():
        variant[band] |= {"mean": None, "std": None}
    return found


def test_the_steps_are_those_set_or_follow_from_the_epochs_or_are_the_default(manifest: Manifest) -> None:
    def steps(*arguments: str) -> int:
        return open_experiment(configured(*arguments), manifest.directory).steps

    assert steps() == DEFAULT_STEPS == 300
    assert steps("train.steps=7") == 7
    assert steps("train.epochs=3") == 15  # 3 x 40 / 8
    assert steps("train.epochs=1.01") == 6
    assert steps("train.epochs=0.01") == 1
    assert steps("train.epochs=1", "data.where=product == 'l1c'") == 3  # 20 / 8


def test_the_resolved_configuration_gives_the_length_in_steps_alone(manifest: Manifest) -> None:
    train = open_experiment(configured("train.epochs=3"), manifest.directory).config.train
    assert (train.steps, train.epochs) == (15, None)


def test_a_run_ends_at_its_last_step_or_earlier_where_told(manifest: Manifest) -> None:
    for stop_at, last in [(3, 3), (9, 7)]:
        experiment = open_experiment(configured("train.steps=7", f"train.stop_at={stop_at}"), manifest.directory)
        assert (experiment.steps, experiment.last_step) == (7, last)


def test_the_samples_follow_the_configuration_and_the_data_set(manifest: Manifest) -> None:
    experiment = open_experiment(configured("seed=5", "model.targets=[aster,biome]"), manifest.directory)
    spec = experiment.spec
    (tiles,) = experiment.source.sets
    assert (tiles.name, tiles.tile_size) == ("tiny", 16)
    assert (spec.seed, spec.image_size, spec.patch_size, spec.visible) == (5, 16, 8, 1)
    assert [m.name for m in spec.targets] == ["aster", "biome"]
    assert spec.normalise_targets == frozenset()  # the input is normalised by patch only where it is a target
    assert experiment.source.samples == 40
    assert experiment.identity.items() >= {"data": manifest.digest, "table": table_hash()}.items()


def test_held_out_tiles_are_those_of_their_expression_or_none(manifest: Manifest, tmp_path: Path) -> None:
    held_out = open_experiment(configured(), manifest.directory).held_out
    assert held_out is not None
    assert held_out.samples == 8
    assert open_experiment(configured("validate.tiles=0"), manifest.directory).held_out is None
    assert open_experiment(configured("data.validate_where=split == 'test'"), manifest.directory).held_out is None
    assert open_experiment(configured(), make_data_set(tmp_path, tiles=8).directory).held_out is None
    with pytest.raises(UsageError, match="'spilt' is no column"):
        open_experiment(configured("data.validate_where=spilt == 'val'"), manifest.directory)


def test_nothing_to_train_on_is_an_error_and_so_is_no_data_set(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tile of"):
        open_experiment(configured("data.where=split == 'test'"), manifest.directory)
    with pytest.raises(DataError, match=f"there is no data set at {tmp_path / 'nowhere'}"):
        open_experiment(configured(), tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"model\.image_size=56 is larger than the 16 px tiles"):
        open_experiment(load([]), manifest.directory)


def test_statistics_come_from_the_manifest_the_release_or_a_file(manifest: Manifest, tmp_path: Path) -> None:
    release = {"sentinel2": {"l1c": {"B2": {"mean": 1.0, "std": 2.0}}}}
    released = dataclasses.replace(manifest, release_statistics=release)
    assert load_statistics("manifest", [released]) == manifest.statistics
    assert load_statistics("release", [released]) == release
    with pytest.raises(DataError, match=r"carries no release statistics; use data\.statistics=manifest"):
        load_statistics("release", [manifest])
    bare, wrapped = tmp_path / "bare.json", tmp_path / "wrapped.json"
    bare.write_text(json.dumps(release))
    wrapped.write_text(json.dumps({"digest": "x", "statistics": release}))
    assert load_statistics(str(bare), [manifest]) == load_statistics(str(wrapped), [manifest]) == release
    assert load_statistics(str(manifest.directory / "manifest.json"), [released]) == manifest.statistics


@pytest.mark.parametrize("text", [None, "", "{", "[1, 2]", "3", '{"statistics": [1]}'])
def test_a_statistics_file_that_cannot_be_used_is_a_data_error(text: str | None, manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=f"data.statistics={path}: .*use manifest, release or "):
        load_statistics(str(path), [manifest])


def test_normalising_statistics_are_those_of_the_chosen_file_by_product_and_band(manifest: Manifest, tmp_path: Path) -> None:
    table = json.loads(json.dumps(manifest.statistics))
    table["sentinel2"]["l1c"]["B3"] |= {"mean": 11.0, "std": 3.0}
    table["sentinel2"]["l2a"]["B3"] |= {"mean": 22.0, "std": 0.0}
    table["month"]["all"]["cos_month"] |= {"mean": 0.25, "std": 0.5}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table))
    arrays = open_experiment(configured(f"data.statistics={path}"), manifest.directory).statistics
    mean, std = arrays["sentinel2"]
    assert mean.shape == std.shape == (2, 12)
    assert mean.dtype == std.dtype == np.float32
    assert mean[:, 2].tolist() == [11.0, 22.0]
    assert std[:, 2].tolist() == [3.0, 1.0]  # a constant band is only centred
    mean, std = arrays["month"]
    assert mean[:, 1].tolist() == [0.25, 0.25]  # the same for both products
    assert std[:, 1].tolist() == [0.5, 0.5]


def test_a_band_with_valid_values_needs_statistics_only_where_it_is_used(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "gap.json"
    path.write_text(json.dumps(statistics_without(manifest, "aster", "slope")))
    with pytest.raises(
        DataError, match=r"aster.slope has [\d,]+ valid values but data.statistics=.*gap.json has no finite mean"
    ):
        open_experiment(configured(f"data.statistics={path}"), manifest.directory)
    for choice in ("model.targets=[month,biome]", "model.bands.aster=[elevation]"):
        open_experiment(configured(f"data.statistics={path}", choice), manifest.directory)


def test_a_band_without_any_valid_value_needs_none_and_counts_as_missing(manifest: Manifest) -> None:
    experiment = open_experiment(configured(), manifest.directory)  # the canopy's deviation is never valid
    mean, _ = experiment.statistics["canopy_height_eth"]
    assert np.isnan(mean).tolist() == [[False, True], [False, True]]
    assert experiment.spec.known["canopy_height_eth"].tolist() == [[True, False], [True, False]]
    spec = dataclasses.replace(experiment.spec, known={})
    batch = next(experiment.source.batches([(0, 8)]))
    place = [m.name for m in spec.targets].index("canopy_height_eth")
    assert 0 < batch["count"][:, place].max() <= 3 * 64  # one band of three hidden patches


def test_every_worker_builds_the_same_weights_from_the_seed(manifest: Manifest) -> None:
    one, other, third = (
        build_objective(open_experiment(configured(f"seed={seed}"), manifest.directory)).state_dict() for seed in (1, 1, 2)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], third[name]) for name in one)


def test_the_objective_counts_what_the_stream_counts(manifest: Manifest) -> None:
    experiment = open_experiment(configured(), manifest.directory)
    assert {m.kind for m in experiment.spec.targets} == {Kind.CONTINUOUS, Kind.CATEGORICAL}
    batch = next(experiment.source.batches([(0, 40)]))
    tensors = {name: torch.from_numpy(array) for name, array in batch.items() if name != "id"}
    assert build_objective(experiment).valid_counts(tensors).tolist() == batch["count"].tolist()


FIXED = ["model.mask_ratio=0.5", "model.targets=[aster,month]", "model.bands.aster=[slope]", "optimizer.weight_decay=0.1",
         "schedule.min_lr=1e-6", "seed=1", "train.global_batch=16", "train.steps=20", "train.epochs=9",
         "data.where=product == 'l1c'"]  # fmt: skip
FREE = ["train.workers=2", "train.micro_batch=4", "train.stop_at=3", "train.ledger=true", "checkpoint.every=7",
        "run.directory=elsewhere", "data.read_ahead=9", "model.init=some.safetensors", "figure.tiles=0",
        "validate.tiles=4"]  # fmt: skip


@pytest.mark.parametrize("change", FIXED)
def test_resuming_with_another_fixed_setting_names_it_and_both_values(change: str, manifest: Manifest) -> None:
    length = [] if "epochs" in change else ["train.steps=10"]
    started = open_experiment(configured("train.steps=10"), manifest.directory)
    found = json.loads(json.dumps(fixed_settings(started.config)))  # as a checkpoint stores it
    check_resume(started, found, started.identity, Path("runs/a"))
    changed = open_experiment(configured(*length, change), manifest.directory)
    name = change.partition("=")[0].replace("model.bands.aster", "model.bands").replace("train.epochs", "train.steps")
    with pytest.raises(UsageError) as caught:
        check_resume(changed, found, started.identity, Path("runs/a"))
    wanted = fixed_settings(changed.config)[name]
    assert str(caught.value) == (
        f"runs/a was trained with {name}={found[name]}, this command says {wanted}; "
        "set it back, or start another run with another run.directory"
    )


def test_resuming_with_other_free_settings_is_fine(manifest: Manifest) -> None:
    started = open_experiment(configured("train.steps=10"), manifest.directory)
    found = json.loads(json.dumps(fixed_settings(started.config)))
    for change in FREE:
        changed = open_experiment(configured("train.steps=10", change), manifest.directory)
        check_resume(changed, found, started.identity, Path("runs/a"))


@pytest.mark.parametrize("mode", ["model.grn=batch", "train.averaging=local"])
def test_modes_that_run_over_the_micro_batch_keep_it(mode: str, manifest: Manifest) -> None:
    """Whatever the number of workers: with the same micro-batch, the same tiles are averaged together."""
    alone, together = (
        open_experiment(configured("train.steps=10", mode, workers, "train.micro_batch=4"), manifest.directory)
        for workers in ("train.workers=1", "train.workers=2")
    )
    found = fixed_settings(alone.config)
    check_resume(together, found, alone.identity, Path("runs/a"))
    other = open_experiment(configured("train.steps=10", mode, "train.micro_batch=2"), manifest.directory)
    with pytest.raises(UsageError, match=r"runs/a was trained with train.micro_batch=4, this command says 2"):
        check_resume(other, found, alone.identity, Path("runs/a"))


def test_a_run_of_an_earlier_version_was_as_the_defaults_are(manifest: Manifest) -> None:
    started = open_experiment(configured("train.steps=10"), manifest.directory)
    modes = {"model.grn": "batch", "model.missing": "mean", "train.averaging": "local"}
    found = {name: value for name, value in fixed_settings(started.config).items() if name not in modes}
    check_resume(started, found, started.identity, Path("runs/a"))
    for name, value in modes.items():
        changed = open_experiment(configured("train.steps=10", f"{name}={value}"), manifest.directory)
        with pytest.raises(UsageError, match=f"runs/a was trained with {name}="):
            check_resume(changed, found, started.identity, Path("runs/a"))


def test_resuming_on_other_data_or_another_table_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    started = open_experiment(configured(), manifest.directory)
    found = fixed_settings(started.config)
    other = open_experiment(configured(), make_data_set(tmp_path, tiles=40, name="tiny").directory)
    with pytest.raises(UsageError, match=r"runs/a was trained on another data set \(data.shards\); set it back"):
        check_resume(other, found, started.identity, Path("runs/a"))
    with pytest.raises(UsageError, match=r"runs/a was trained on another table of modalities; set it back"):
        check_resume(started, found, started.identity | {"table": "else"}, Path("runs/a"))


def test_resuming_with_other_statistics_or_another_list_of_tiles_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    ids, shifted = tmp_path / "ids.txt", tmp_path / "statistics.json"
    ids.write_text("1\n2\n3\n", encoding="utf-8")
    found = json.loads(json.dumps(manifest.statistics))
    found["aster"]["all"]["slope"]["mean"] += 1
    shifted.write_text(json.dumps(found), encoding="utf-8")
    command = ["train.steps=4", f"data.where=id in file('{ids}')"]
    started = open_experiment(configured(*command), manifest.directory)
    settings = fixed_settings(started.config)

    other = open_experiment(configured(*command, f"data.statistics={shifted}"), manifest.directory)
    with pytest.raises(UsageError, match="was trained on other band statistics"):
        check_resume(other, settings, started.identity, tmp_path)
    ids.write_text("1\n2\n", encoding="utf-8")
    fewer = open_experiment(configured(*command), manifest.directory)
    with pytest.raises(UsageError, match="was trained on another choice of tiles"):
        check_resume(fewer, settings, started.identity, tmp_path)


def test_an_input_without_any_statistics_is_refused(tmp_path: Path) -> None:
    held_out_only = make_data_set(tmp_path / "val", tiles=8, size=16, held_out=8)
    with pytest.raises(DataError, match="has no statistics of the input sentinel2"):
        open_experiment(configured("data.where=split == 'val'"), held_out_only.directory)


def test_paths_are_absolute_and_targets_in_table_order_whatever_the_command_said(manifest: Manifest) -> None:
    experiment = open_experiment(configured("run.directory=runs/a", "model.targets=[biome,aster]"), manifest.directory)
    assert experiment.run == Path("runs/a").resolve()
    assert experiment.config.model.targets == ["aster", "biome"]
