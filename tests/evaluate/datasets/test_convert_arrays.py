"""Arrays of EuroSAT's form, converted."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.convert_arrays import ArraysOptions, convert
from mmearth_ray.evaluate.datasets.task import load_task

BANDS = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B11", "B12"]
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "eurosat_ms_64.npz"


def arrays(count: int = 40, **changed: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    values = {
        "s2": rng.integers(1, 5000, (count, 12, 8, 8)).astype(np.uint16), "s2_b10": np.full((count, 8, 8), 9, np.uint16),
        "label": np.arange(count) % 4, "classes": np.array(["Crop", "Forest", "River", "Sea"]), "band_names": np.array(BANDS),
        "level": np.array(["L1C"]), "bands_present": np.ones(12, bool), "file": np.array([f"tile_{i}" for i in range(count)]),
        "lat": np.linspace(40, 60, count), "lon": np.linspace(0, 20, count),
    }  # fmt: skip
    return {name: value for name, value in (values | changed).items() if value is not None}


def saved(folder: Path, **changed: Any) -> Path:
    """An .npz, one of whose arrays is called as an argument of `np.savez`."""
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        for name, values in arrays(**changed).items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(values), allow_pickle=True)
    return folder / "a.npz"


def test_every_value_and_label_comes_back_in_fixed_folds(tmp_path: Path) -> None:
    info = convert(saved(tmp_path), tmp_path / "t", ArraysOptions())
    task, given = load_task(tmp_path / "t"), arrays()
    np.testing.assert_array_equal(task.images(range(40)), given["s2"])
    np.testing.assert_array_equal(task.labels(range(40)), given["label"])
    assert task.ids.tolist() == given["file"].tolist()
    assert (info.bands, info.product, info.classes, info.missing) == (tuple(BANDS), "l1c", tuple(given["classes"]), (0,))
    assert info.counts == {f"fold {f}": 8 for f in range(5)}
    assert all(np.bincount(task.fold[given["label"] == k], minlength=5).tolist() == [2] * 5 for k in range(4))
    assert "Left out: B10." in info.notes
    again = convert(tmp_path / "a.npz", tmp_path / "u", ArraysOptions())
    assert again.digest == info.digest
    assert convert(tmp_path / "a.npz", tmp_path / "v", ArraysOptions(seed=1)).digest != info.digest


def test_one_split_by_shares_and_b10_when_asked_for(tmp_path: Path) -> None:
    info = convert(saved(tmp_path), tmp_path / "t", ArraysOptions(folds=0, cirrus=True, name="eurosat"))
    assert info.counts == {"train": 24, "valid": 8, "test": 8}
    assert (info.name, info.bands[-1], info.notes) == ("eurosat", "B10", ())
    assert (load_task(tmp_path / "t").images([3])[0, 12] == 9).all()


def test_images_near_each_other_share_a_fold(tmp_path: Path) -> None:
    near = np.linspace(40, 60, 40)
    near[[5, 17, 30]] = 50.0, 50.01, 50.02
    lon = np.where(np.isin(np.arange(40), [5, 17, 30]), 7.0, np.linspace(0, 20, 40))
    info = convert(saved(tmp_path, lat=near, lon=lon), tmp_path / "t", ArraysOptions())
    assert len(set(load_task(tmp_path / "t").fold[[5, 17, 30]].tolist())) == 1
    assert "Images within 5 km of each other share a fold or split (2 join another)." in info.notes


def test_what_a_file_need_not_hold(tmp_path: Path) -> None:
    optional = dict.fromkeys(("file", "lat", "lon", "level", "s2_b10", "bands_present"))
    info = convert(saved(tmp_path, **optional), tmp_path / "t", ArraysOptions())
    assert (info.product, info.notes[:-1]) == (None, ())
    assert load_task(tmp_path / "t").ids[:2].tolist() == ["0", "1"]


def test_bands_that_are_absent_are_left_out(tmp_path: Path) -> None:
    present = np.array([band not in ("B1", "B9") for band in BANDS])
    info = convert(saved(tmp_path, bands_present=present, s2_b10=None), tmp_path / "t", ArraysOptions())
    assert info.bands == tuple(band for band in BANDS if band not in ("B1", "B9"))
    assert info.notes[0] == "Left out: B1, B9."
    np.testing.assert_array_equal(load_task(tmp_path / "t").images([0])[0, 6], arrays()["s2"][0, 7])


BAD = {
    "no bands": ({"band_names": None}, "lacks band_names"),
    "no label": ({"label": None}, "lacks label"),
    "rows": ({"label": np.arange(39) % 4}, r"'s2' has shape \(40, 12, 8, 8\); one entry for each of the 39"),
    "names": ({"band_names": np.array(BANDS[:11])}, "images of 11 bands"),
    "unknown": ({"band_names": np.array(["red", *BANDS[1:]])}, "'band_names' holds red"),
    "same": ({"band_names": np.array(["B2", *BANDS[1:]])}, "a name twice"),
    "class": ({"label": np.arange(40)}, r"whole numbers of 0\.\.3"),
    "float": ({"label": np.arange(40) % 4 + 0.5}, "whole numbers"),
    "three": ({"s2": np.ones((40, 12, 8), np.uint16)}, "'s2' is uint16"),
    "float64": ({"s2": np.ones((40, 12, 8, 8))}, "'s2' is float64"),
    "level": ({"level": np.array(["L1C", "L2A"])}, "'level' holds l1c, l2a"),
    "cirrus": ({"s2_b10": np.ones((40, 8, 7), np.uint16)}, r"'s2_b10' has shape \(40, 8, 7\)"),
    "ids": ({"file": np.array(["a"] * 40)}, "two images have the id a"),
    "present": ({"bands_present": np.ones(3, bool)}, "'bands_present' has 3 entries"),
    "pickle": ({"file": np.array([print] * 40, dtype=object)}, "without pickles"),
    "nothing": ({"count": 0}, "has no image"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_arrays_that_do_not_fit_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changed, message = BAD[case]
    place = saved(tmp_path, **changed)
    with pytest.raises(DataError, match=message) as caught:
        convert(place, tmp_path / "t", ArraysOptions(cirrus=True))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04cut", "array", "cut"])
def test_files_that_are_no_npz_are_refused(content: Any, tmp_path: Path) -> None:
    place = saved(tmp_path)
    if content == "array":
        np.save(tmp_path / "a.npy", np.zeros(3))
        place = tmp_path / "a.npy"
    else:
        place.write_bytes(place.read_bytes()[:-500] if content == "cut" else content)
    with pytest.raises(DataError, match=r"cannot be read as an \.npz of arrays"):
        convert(place, tmp_path / "t", ArraysOptions())


def test_a_missing_file_and_wrong_settings_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        convert(tmp_path / "none.npz", tmp_path / "t", ArraysOptions())
    for place in (tmp_path, saved(tmp_path) / "x"):
        with pytest.raises(DataError, match="cannot be read"):
            convert(place, tmp_path / "t", ArraysOptions())
    with pytest.raises(UsageError, match="folds=1"):
        convert(saved(tmp_path), tmp_path / "t", ArraysOptions(folds=1))
    with pytest.raises(DataError, match="no image in fold"):
        convert(saved(tmp_path, count=8), tmp_path / "t", ArraysOptions(folds=9))


@pytest.mark.skipif(not REAL.exists(), reason="the real tiles are not here")
def test_the_real_tiles_in_five_folds_of_all_classes(tmp_path: Path) -> None:
    info = convert(REAL, tmp_path / "t", ArraysOptions())
    task = load_task(tmp_path / "t")
    labels = task.labels(range(202))
    assert (len(task), info.product, info.bands) == (202, "l1c", tuple(BANDS))
    assert all(np.bincount(labels[task.fold == fold], minlength=10).min() >= 3 for fold in range(5))
    assert max(info.counts.values()) - min(info.counts.values()) <= 3
