"""The configuration of pretraining: what does not fit together is said, and the rules that follow from it."""

import re
from pathlib import Path
from typing import get_args

import pytest

from mmearth_ray import settings
from mmearth_ray.config import (
    FIXED_ON_RESUME,
    FREE_ON_RESUME,
    divisors,
    input_of,
    label_of,
    learning_rate_of,
    load,
    micro_batch_of,
    normalised_targets,
    sizes_of,
    steps_of,
    targets_of,
    turns_of,
    visible_patches,
    worker_counts,
)
from mmearth_ray.errors import UsageError
from mmearth_ray.keys import Config
from mmearth_ray.modalities import TABLE, Kind, Level, Missing, tasks
from mmearth_ray.model.encoder import BACKENDS, PATCH_SIZES, SIZES, STEMS
from mmearth_ray.model.layers import SCOPES
from mmearth_ray.model.mpmae import WIDE


def error_of(*arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_are_the_published_recipe() -> None:
    config = load([])
    assert config == Config()
    assert (config.model.size, config.model.image_size, config.model.patch_size) == ("atto", 56, 8)
    assert (config.model.mask_ratio, config.model.decoder_width, config.model.decoder_depth) == (0.6, 512, 1)
    assert (config.optimizer.base_lr, config.optimizer.beta1, config.optimizer.beta2) == (1.5e-4, 0.9, 0.95)
    assert (config.optimizer.weight_decay, config.schedule.warmup_fraction, config.schedule.min_lr) == (0.05, 40 / 200, 0)
    assert targets_of(config) == tasks()
    assert input_of(config) == tasks()[0]
    assert normalised_targets(config) == ["sentinel2"]


def test_yaml_and_arguments_may_come_in_any_order_and_arguments_win(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train: {steps: 7, global_batch: 32}\nseed: 3\n", encoding="utf-8")
    for arguments in (["train.steps=9", str(path)], [str(path), "train.steps=9"]):
        config = load(arguments)
        assert (config.train.steps, config.train.global_batch, config.seed) == (9, 32, 3)


def test_an_argument_that_is_no_file_is_said_to_be_missing() -> None:
    assert error_of("train.steps") == "cannot read the configuration train.steps: No such file or directory"


def test_a_configuration_survives_its_own_yaml(tmp_path: Path) -> None:
    config = load(["model.bands.sentinel2=[B2,B3,B4]", "model.targets=[aster,month]", "model.normalise_targets=[aster]",
                   "train.micro_batch=16", "optimizer.lr=1e-3", "data.where=id in ['1', '2'] and latitude > -3.5"])  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(settings.to_yaml(config), encoding="utf-8")
    assert load([str(path)]) == config


def test_help_gives_a_meaning_for_every_key() -> None:
    lines = settings.help_text(Config).splitlines()
    for name, entry, _ in settings.walk(Config):
        meaning = entry.metadata["meaning"]
        assert meaning
        assert any(line.startswith(f"  {name}=") and meaning in line for line in lines), name


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [(49, 0.6, 19), (49, 0.5, 24), (49, 0.75, 12), (16, 0.6, 6), (10, 0.9, 1), (100, 0.93, 7), (196, 0.6, 78)],
)
def test_the_whole_part_of_the_visible_share_is_visible(patches: int, ratio: float, visible: int) -> None:
    assert visible_patches(patches, ratio) == visible


@pytest.mark.parametrize(
    ("share", "batch"), [(64, 64), (4096, 64), (100, 50), (96, 48), (67, 1), (1, 1), (63, 63), (65, 13), (2 * 67, 2)]
)
def test_the_default_micro_batch_is_the_largest_divisor_up_to_64(share: int, batch: int) -> None:
    for workers in (1, 2, 4):
        config = load([f"train.global_batch={share * workers}", f"train.workers={workers}"])
        assert micro_batch_of(config, workers) == batch


def test_a_micro_batch_that_is_set_is_used() -> None:
    assert micro_batch_of(load(["train.global_batch=256", "train.workers=2", "train.micro_batch=128"]), 2) == 128


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        (["train.workers=4"], [4]),
        (["train.workers=[4]"], [4]),
        (["train.workers=[1,8]"], [1, 2, 4, 8]),
        (["train.workers=[3,9]"], [4, 8]),
        (["train.workers=[1,6]", "train.global_batch=24", "train.micro_batch=4"], [1, 2, 3, 6]),
    ],
)
def test_a_run_may_have_the_numbers_of_workers_that_share_its_batch_evenly(arguments: list[str], counts: list[int]) -> None:
    config = load(arguments)
    assert worker_counts(config) == counts
    assert all(config.train.global_batch % (n * micro_batch_of(config, n)) == 0 for n in counts)


@pytest.mark.parametrize(
    ("workers", "batch", "counts"),
    [
        ("[1,1000000000]", 64, [1, 2, 4, 8, 16, 32, 64]),
        ("[1,1000000000]", 10**9, divisors(10**9)),
        ("1000000000", 10**9, [10**9]),
    ],
)
def test_numbers_of_workers_are_found_among_the_divisors_of_the_batch(workers: str, batch: int, counts: list[int]) -> None:
    assert worker_counts(load([f"train.workers={workers}", f"train.global_batch={batch}"])) == counts


def test_divisors() -> None:
    for number in range(1, 200):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_steps_are_those_given_or_those_of_the_epochs() -> None:
    assert steps_of(load(["train.steps=7"]).train, 1000) == 7
    assert steps_of(load(["train.epochs=2.5"]).train, 1000) == 40  # 2,500 tiles are 39.1 batches of 64
    assert steps_of(load([]).train, 1000) == 300


def test_the_learning_rate_grows_with_the_global_batch_unless_set_itself() -> None:
    assert learning_rate_of(load(["train.global_batch=4096"])) == pytest.approx(2.4e-3)
    assert learning_rate_of(load(["train.global_batch=64", "optimizer.scaling=linear"])) == pytest.approx(1.5e-4 / 4)
    assert learning_rate_of(load(["train.global_batch=64"])) == pytest.approx(2.4e-3 / 8)
    assert learning_rate_of(load(["train.global_batch=4096", "optimizer.lr=1e-3"])) == 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.patch_size=16"], "model.patch_size=16 does not divide model.image_size=56; use 48 px, or another patch size"),
        (["model.patch_size=32", "model.image_size=24"], "model.patch_size=32 does not divide model.image_size=24; use 32 px"),
        (["model.patch_size=12"], "model.patch_size=12: must be one of 8, 16, 32"),
        (["model.image_sizes=[56,84]"], "model.image_sizes=[56, 84]: must be model.image_size=56 and others of as many patches "
                                        "of 8, 16 or 32 px, from 56, 112, 224 px"),
        (["model.image_sizes=[112,224]"], "model.image_sizes=[112, 224]: must be model.image_size=56 and others of as many"),
        (["model.image_sizes=[56,4]"], "model.image_sizes=[56, 4]: must be at least 8"),
        (["model.image_sizes=56"], "model.image_sizes=56: "),
        (["model.image_size=8"], "model.mask_ratio=0.6 leaves 0 of 1 patches visible; at least one must be visible and one"),
        (["model.mask_ratio=0.99"], "model.mask_ratio=0.99 leaves 0 of 49 patches visible"),
        (["--steps", "100"], "'--steps' is not understood; settings are key=value, without dashes and spaces"),
        (["train.workers=3"], "train.global_batch=64 is not divisible by train.workers=3"),
        (["train.workers=[5,7]"], "train.global_batch=64 is not divisible by train.workers=[5, 7]"),
        (["train.workers=[4,2]"], "train.workers=[4, 2]: MIN 4 is above MAX 2; give [2,4]"),
        (["run.directory="], "run.directory= names no directory; give one, such as run.directory=runs/pretrain"),
        (["train.steps=many"], "train.steps=many: train.steps must be a whole number or null; --help tells what it means"),
        (["train.workers=[1,2,4]"], "train.workers=[1, 2, 4]: give one number, or [MIN,MAX]"),
        (["train.workers=[0,2]"], "train.workers=[0, 2]: must be at least 1"),
        (["train.workers=[]"], "train.workers=[]: give one number, or [MIN,MAX]"),
        (["train.workers=two"], "train.workers=two: train.workers must be a list of whole numbers"),
        (["train.workers=[1,2]", "train.averaging=local"], "train.workers=[1, 2] with train.averaging=local"),
        (["train.micro_batch=24", "train.workers=2"], "train.micro_batch=24 does not divide the 32 tiles that each of 2"),
        (["train.steps=3", "train.epochs=1"], "give train.steps or train.epochs, not both"),
        (["model.targets=[]"], "model.targets=[]: name at least one modality, each once"),
        (["model.targets=[aster,aster]"], "model.targets=['aster', 'aster']: name at least one modality, each once"),
        (["model.targets=[astre]"], "model.targets: there is no modality 'astre'; the table has sentinel2, "),
        (["model.targets=[sentinel2_cloudmask]"], "model.targets: sentinel2_cloudmask holds bit flags"),
        (["model.input=era5"], "model.input=era5: the input must be a continuous map"),
        (["model.input=esa_worldcover"], "model.input=esa_worldcover: the input must be a continuous map"),
        (["model.input=nothing"], "model.input: there is no modality 'nothing'"),
        (["model.bands.sentinel2=[B2,VV]"], "model.input: bands of sentinel2 must be distinct and among B1, "),
        (["model.bands.aster=[]"], "model.bands.aster: bands of aster must be distinct and among elevation, slope; got []"),
        (["model.bands.biome=[biome]"], "model.bands.biome: biome is categorical and has no bands to choose"),
        (["model.bands.nothing=[a]"], "model.bands.nothing: there is no modality 'nothing'"),
        (["model.normalise_targets=[era5]"], "model.normalise_targets: era5 is no continuous map among model.targets"),
        (["model.normalise_targets=[esa_worldcover]"], "model.normalise_targets: esa_worldcover is no continuous map"),
        (["model.normalise_targets=[aster]", "model.targets=[month]"], "model.normalise_targets: aster is no continuous map"),
        (["model.size=giga"], "model.size=giga: must be one of atto, femto, pico, nano, tiny, base, large, huge"),
        (["model.sise=atto"], "model.sise=atto: there is no key 'model.sise'; did you mean model.size?"),
        (["optimizer.beta2=1"], "optimizer.beta2=1.0: must be below 1"),
        (["schedule.warmup_fraction=1.5"], "schedule.warmup_fraction=1.5: must be at most 1"),
        (["figure.tiles=5"], "figure.tiles=5: must be at most 4"),
        (["train.epochs=.inf"], "train.epochs=inf: must be a finite number"),
        (["seed=99999999999999999999"], "seed=99999999999999999999: must be below 9.22337e+18"),
        (["model.backend=minkowski", "train.gpus=true"], "model.backend=minkowski runs on CPUs only; set train.gpus=false"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_with_values_and_remedy(arguments: list[str], message: str) -> None:
    assert error_of(*arguments).startswith(message)


def test_image_sizes_bring_the_patches_that_keep_the_grid() -> None:
    assert turns_of(load([]).model) == []
    assert sizes_of(load([]).model) == [(56, 8)]
    assert sizes_of(load(["model.image_sizes=[112,56]"]).model) == [(112, 16), (56, 8)]
    assert turns_of(load(["model.image_sizes=[112,56,224]"]).model) == [(112, 16), (56, 8), (224, 32)]
    wide = load(["model.image_size=112", "model.patch_size=16", "model.image_sizes=[56,112,112]"]).model
    assert turns_of(wide) == [(56, 8), (112, 16), (112, 16)]


def test_targets_come_in_table_order_with_the_bands_chosen() -> None:
    config = load(["model.targets=[month,aster,sentinel2]", "model.bands.aster=[slope]", "model.bands.sentinel2=[B10,B4]"])
    assert [(m.name, m.bands) for m in targets_of(config)] == [
        ("sentinel2", ("B10", "B4")), ("aster", ("slope",)), ("month", ("sin_month", "cos_month")),
    ]  # fmt: skip
    assert input_of(config).bands == ("B10", "B4")


def test_the_input_is_normalised_by_patch_where_it_is_a_target_unless_told_otherwise() -> None:
    assert normalised_targets(load(["model.targets=[month]"])) == []
    assert normalised_targets(load(["model.targets=[month,sentinel2]"])) == ["sentinel2"]
    assert normalised_targets(load(["model.normalise_targets=[]"])) == []
    assert normalised_targets(load(["model.input=aster"])) == ["aster"]


def test_what_is_fixed_on_resume_names_settings_that_exist() -> None:
    names = list(settings.flatten(Config()))
    for prefix in FIXED_ON_RESUME:
        found = [name for name in names if name.startswith(prefix)]
        assert found, prefix
        assert prefix.endswith(".") or found == [prefix], found
    assert set(FREE_ON_RESUME) <= set(names)
    assert all(name.startswith(FIXED_ON_RESUME) for name in FREE_ON_RESUME)
    free = {name for name in names if not name.startswith(FIXED_ON_RESUME)}
    assert free >= {"train.workers", "train.micro_batch", "train.engine", "train.stop_at", "train.ledger", "data.shards",
                    "data.read_ahead", "run.directory", "run.address", "checkpoint.every", "eval.every", "eval.label",
                    "eval.task", "eval.tiles", "eval.threads", "eval.wait"}  # fmt: skip


def test_held_out_tiles_are_told_apart_by_a_modality_of_classes() -> None:
    assert label_of(load([])) == next(m for m in tasks() if (m.level, m.kind) == (Level.IMAGE, Kind.CATEGORICAL))
    for modality in (m for m in TABLE if m.kind is Kind.CATEGORICAL):
        assert label_of(load([f"eval.label={modality.name}"])) == modality
    for name in ("aster", "sentinel2_cloudmask", "nonsense"):
        said = error_of(f"eval.label={name}")
        assert said.startswith(f"eval.label={name} is no modality of classes; name one of dynamic_world, biome, eco_region")
    assert "give one of them" in error_of("eval.label=biome", "eval.task=data/eurosat")
    assert error_of("eval.tiles=4") == "eval.tiles=4: must be at least 8"


def test_evaluations_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmearth_ray.config.find_spec", lambda name: name != "sklearn")
    assert load([]).eval.every == 0
    assert error_of("eval.every=10") == "eval.every=10 needs a package: pip install scikit-learn"


def test_the_choices_offered_are_those_the_model_has() -> None:
    choices = {name: entry.metadata["among"] for name, entry, _ in settings.walk(Config)}
    assert choices["model.size"] == tuple(SIZES)
    assert choices["model.patch_size"] == PATCH_SIZES
    assert choices["model.stem"] == STEMS
    assert choices["model.backend"] == BACKENDS
    assert choices["model.grn"] == tuple(SCOPES)
    assert choices["model.missing"] == get_args(Missing)
    assert choices["model.init_scheme"] == tuple(WIDE)


@pytest.mark.parametrize("key", ["run.directory", "data.cache", "model.init", "eval.task"])
def test_a_url_where_a_path_belongs_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match=rf"^{re.escape(key)}=s3://b/r is a URL, and this one has to be a path on a disk"):
        load([f"{key}=s3://b/r"])
