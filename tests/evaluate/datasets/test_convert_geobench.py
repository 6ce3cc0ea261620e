"""GEO-Bench sets in their published form, converted: every band by value, every split, every defect, every refusal."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from geobench_fixture import NAMES, RADAR, SAMPLES, SETS, geobench, level, made, write_sample, write_set, write_specs

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.convert_geobench import GeobenchOptions, convert
from mmearth_ray.evaluate.datasets.geobench_bands import SLOTS
from mmearth_ray.evaluate.datasets.task import Goal, Task, load_task

GOALS = {"m-bigearthnet": Goal.MULTI, "m-cashew-plant": Goal.SEGMENTATION, "m-SA-crop-type": Goal.SEGMENTATION}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("geobench")
    return {name: write_set(root, name) for name in SETS}


@pytest.fixture
def copy(sets: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sets["m-eurosat"], tmp_path / "m-eurosat"))


def converted(place: Path, out: Path, **changed: Any) -> Task:
    convert(place, out, GeobenchOptions(**changed))
    return load_task(out)


def stored(place: Path, sample: str, band: str) -> np.ndarray:
    with h5py.File(place / f"{sample}.hdf5") as file:
        (key,) = [key for key in map(str, file) if key.split("_20")[0] == band]
        return np.asarray(file[key])


@pytest.mark.parametrize("name", SETS)
def test_every_value_is_that_of_the_band_it_is_called(name: str, sets: dict[str, Path], tmp_path: Path) -> None:
    task, kind = converted(sets[name], tmp_path / "t"), SETS[name]
    published = {true: band for band, true in kind.bands}
    images = task.images(range(len(task)))
    assert set(task.info.bands) == {true for _, true in kind.bands if true[0] == "B"}
    for place, band in enumerate(task.info.bands):
        expected = [stored(sets[name], sample, published[band]) for sample in task.ids]
        np.testing.assert_array_equal(images[:, place], expected)
        first = np.median(images[:, place]) * task.info.scale / (1 if name != "m-SA-crop-type" else 0.05)
        assert abs(first - level(band)) < 200, f"{band} is not the one of that level"
    assert (task.info.goal, len(task)) == (GOALS.get(name, Goal.SINGLE), SAMPLES)
    assert (task.info.height, task.info.width) == (kind.size, kind.size)


@pytest.mark.parametrize("name", SETS)
def test_labels_and_splits_are_those_of_the_partition(name: str, sets: dict[str, Path], tmp_path: Path) -> None:
    task, partition = converted(sets[name], tmp_path / "t"), json.loads((sets[name] / "default_partition.json").read_text())
    assert {split: task.ids[task.rows(split)].tolist() for split in partition} == partition
    rows = np.array([int(sample[3:]) for sample in task.ids])
    labels = task.labels(range(len(task)))
    shown = min(SETS[name].classes, 4)
    if task.info.goal is Goal.SEGMENTATION:
        np.testing.assert_array_equal(labels, [stored(sets[name], sample, "label") for sample in task.ids])
    elif task.info.goal is Goal.MULTI:
        expected = np.zeros((SAMPLES, 43))
        expected[np.arange(SAMPLES), rows // 4 % shown] = expected[np.arange(SAMPLES), shown + rows % 2] = 1
        np.testing.assert_array_equal(labels, expected)
    else:
        np.testing.assert_array_equal(labels, rows // 4 % shown)


def test_descriptions_tell_what_was_corrected(sets: dict[str, Path], tmp_path: Path) -> None:
    infos = {name: converted(sets[name], tmp_path / name).info for name in SETS}
    assert {name: info.name for name, info in infos.items()} == {name: name for name in SETS}
    assert infos["m-eurosat"].classes[0] == "class of m-eurosat 0"
    assert infos["m-cashew-plant"].classes[1] == "well-managed plantation"
    assert infos["m-SA-crop-type"].classes[9] == "Rooibos"
    assert "of the bands B9, B10, B11, B12 and B8A; corrected" in " ".join(infos["m-eurosat"].notes)
    assert "8-bit colours" in " ".join(infos["m-brick-kiln"].notes)
    assert infos["m-so2sat"].scale == 10000
    assert infos["m-so2sat"].missing == (0,)
    assert "01 - VH.Real" in infos["m-so2sat"].notes[-1]
    assert infos["m-SA-crop-type"].product is None
    assert "Cloud Probability" in infos["m-SA-crop-type"].notes[-1]
    assert infos["m-bigearthnet"].dtype == "float32"
    assert (infos["m-eurosat"].product, infos["m-eurosat"].dtype) == ("l1c", "int16")


PUBLISHED = {
    "m-eurosat": ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B9", "B10", "B12", "B8A"],
    "m-brick-kiln": ["B1", "B2", "B3", "B4", "B5", "B7", "B8A", "B8", "B11", "B12", "TCI_G", "TCI_B"],
    "m-so2sat": ["B2", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B8A", "B11", "B12"],
    "m-bigearthnet": ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_published_the_slots_hold_what_the_published_evaluation_fed_them(
    name: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    task, published = converted(sets[name], tmp_path / "t", as_published=True), {t: b for b, t in SETS[name].bands}
    assert task.info.bands == SLOTS
    images = task.images([0, 5])
    for place, true in enumerate(PUBLISHED[name]):
        expected = [stored(sets[name], task.ids[row], published[true]) for row in (0, 5)]
        np.testing.assert_array_equal(images[:, place], expected)
    assert task.info.origin["as_published"] is True
    assert task.info.notes[0].startswith("As published")
    assert task.info.missing == ()
    assert task.info.digest != converted(sets[name], tmp_path / "corrected").info.digest


def test_what_is_not_sentinel_2_is_kept_when_asked_for(sets: dict[str, Path], tmp_path: Path) -> None:
    radar = converted(sets["m-so2sat"], tmp_path / "a", others=True)
    assert radar.info.bands[10:] == tuple("other." + name.partition(" - ")[2] for name in RADAR)
    np.testing.assert_array_equal(radar.images([3])[0, 12], stored(sets["m-so2sat"], radar.ids[3], RADAR[2]))
    kiln = converted(sets["m-brick-kiln"], tmp_path / "b", others=True)
    assert kiln.info.bands[10:] == ("other.TCI_R", "other.TCI_G", "other.TCI_B")
    assert np.median(kiln.images(range(4))[:, 12]) < 150


def test_partitions_cut_the_training_split_alone(sets: dict[str, Path], tmp_path: Path) -> None:
    counts = {share: converted(sets["m-eurosat"], tmp_path / share, partition=f"{share}x_train").info.counts
              for share in ("0.01", "0.50", "1.00")}  # fmt: skip
    assert [found["train"] for found in counts.values()] == [1, 6, 12]
    assert all((found["valid"], found["test"]) == (6, 6) for found in counts.values())


def test_a_set_in_a_folder_of_another_name_is_known_by_its_description_or_by_a_setting(copy: Path, tmp_path: Path) -> None:
    renamed = copy.rename(tmp_path / "mine")
    assert converted(renamed, tmp_path / "a").info.name == "m-eurosat"
    with geobench() as classes:
        specs = made(classes["TaskSpecifications"], dataset_name="?", label_type=made(classes["Classification"], n_classes=10))
        (renamed / "task_specs.pkl").write_bytes(pickle.dumps(specs))
    unknown = converted(renamed, tmp_path / "b").info
    assert (unknown.name, unknown.product, unknown.classes[3]) == ("mine", None, "class 3")
    assert "bands are what their names say" in unknown.notes[0]
    assert converted(renamed, tmp_path / "c", name="m-eurosat").info.bands == converted(renamed, tmp_path / "a").info.bands
    with pytest.raises(UsageError, match="name=eurosatt: no published set"):
        converted(renamed, tmp_path / "d", name="eurosatt")


def partition(**changed: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "default_partition.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def sample(label: Any = 0, bands: Any = None, **changed: Any) -> Callable[[Path], None]:
    """Writes sample 5, of the training split, again."""
    values = np.full((32, 32), 7, np.int16)
    return lambda place: write_sample(place / "id_0005.hdf5", bands or [(name, values) for name in NAMES], label, **changed)


def wider(place: Path) -> None:
    write_specs(place, "m-eurosat", replace(SETS["m-eurosat"], label="LabelType"))


MAP = np.zeros((32, 32), np.int16)
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "leak": (partition(test=["id_0003", "id_0001"]), "names the sample id_0001 in train and in test"),
    "twice": (partition(test=["id_0003", "id_0003"]), "names the sample id_0003 in test and in test"),
    "path": (partition(test=["../id_0003"]), r"names the sample \"\.\./id_0003\""),
    "no name": (partition(test=[3]), "names the sample 3"),
    "split": (partition(validation=["id_0003"]), "lists of samples under train, valid, test"),
    "no test": (partition(test=[]), "no image in split 'test'"),
    "absent": (partition(test=["id_9999"]), r"id_9999\.hdf5 is missing"),
    "json": (lambda p: (p / "default_partition.json").write_text("{"), "default_partition.json cannot be read"),
    "list": (lambda p: (p / "default_partition.json").write_text("[]"), "must hold lists"),
    "none": (lambda p: (p / "default_partition.json").write_text("{}"), "names no sample"),
    "no specs": (lambda p: (p / "task_specs.pkl").unlink(), "is no GEO-Bench set"),
    "evil specs": (
        lambda p: (p / "task_specs.pkl").write_bytes(pickle.dumps(Runs())),
        r"task_specs\.pkl is refused: it pickles posix",
    ),
    "damaged specs": (lambda p: (p / "task_specs.pkl").write_bytes(b"\x80"), r"task_specs\.pkl is refused"),
    "specs": (lambda p: (p / "task_specs.pkl").write_bytes(pickle.dumps({})), "labels of the kind NoneType"),
    "kind": (wider, "labels of the kind LabelType"),
    "evil sample": (sample(extra={"x": Runs()}), r"id_0005\.hdf5 is refused: it pickles posix"),
    "class": (sample(10), "label of image id_0005 is 10"),
    "label": (sample([0, 1]), "label of the sample id_0005 is int64"),
    "ragged": (sample([[0], [0, 1]]), "label of the sample id_0005 is no single-label label"),
    "text": (sample("forest"), "label of the sample id_0005"),
    "fraction": (sample(0.5), "label of the sample id_0005"),
    "small": (sample(bands=[(name, MAP[:16]) for name in NAMES]), "id_0005 has '01 - Coastal aerosol' of 32 x 16 px"),
    "band": (sample(bands=[(name, MAP) for name in NAMES if name[:2] != "04"]), "id_0005 has no band '04 - Red'"),
    "large": (sample(bands=[(name, MAP.astype(np.int32) + 40000) for name in NAMES]), "id_0005 holds 40000 .* int16"),
    "nan": (sample(bands=[(name, MAP * np.nan) for name in NAMES]), "id_0005 holds nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_set_that_cannot_be_trusted_is_refused_in_one_line_and_nothing_is_written(
    case: str, copy: Path, tmp_path: Path
) -> None:
    change, message = BAD[case]
    change(copy)
    with pytest.raises(DataError, match=message) as caught:
        convert(copy, tmp_path / "out", GeobenchOptions())
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-eurosat"]


def test_settings_that_do_not_fit_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"partition=0\.03x_train: .* has 0\.01x_train, .*default"):
        convert(copy, tmp_path / "out", GeobenchOptions(partition="0.03x_train"))
    with pytest.raises(UsageError, match="is no labelled data set"):
        convert(copy, copy, GeobenchOptions())
    for number in range(SAMPLES):
        write_sample(copy / f"id_{number:04d}.hdf5", [(NAMES[1], MAP)], 0)
    with pytest.raises(UsageError, match=r"as_published=true: .* has no band 01"):
        convert(copy, tmp_path / "out", GeobenchOptions(as_published=True))
    with pytest.raises(DataError, match="is no GEO-Bench set"):
        convert(tmp_path / "nowhere", tmp_path / "out", GeobenchOptions())
