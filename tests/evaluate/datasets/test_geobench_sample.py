"""One sample of GEO-Bench: what its file may hold, and what is refused."""

import os
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from geobench_fixture import CLOUD, NAMES, write_sample

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.geobench_sample import read_sample

BLUE, GREEN = NAMES[1], NAMES[2]
MAP = np.arange(12, dtype=np.int16).reshape(3, 4)


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def sample(folder: Path, **changed: Any) -> Path:
    write_sample(folder / "s.hdf5", [(BLUE, MAP), (GREEN, MAP + 1)], **{"label": 3, **changed})
    return folder / "s.hdf5"


def edit(path: Path, change: Any) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


@pytest.mark.parametrize("module", ["geobench.", "geobench.io.", "ccb.io."])
def test_bands_and_label_come_back_whatever_version_wrote_them(module: str, tmp_path: Path) -> None:
    found = read_sample(sample(tmp_path, module=module))
    assert found.bands == ((BLUE, "Sentinel2"), (GREEN, "Sentinel2"))
    assert found.label == 3
    np.testing.assert_array_equal(found.pixels[GREEN], MAP + 1)
    assert list(read_sample(tmp_path / "s.hdf5", {BLUE}).pixels) == [BLUE]


def test_a_date_is_no_part_of_a_bands_name_and_a_map_may_be_the_label(tmp_path: Path) -> None:
    write_sample(tmp_path / "s.hdf5", [(BLUE, MAP), (CLOUD, MAP)], MAP % 2, date=date(2019, 11, 5))
    found = read_sample(tmp_path / "s.hdf5")
    assert found.bands == ((BLUE, "Sentinel2"), (CLOUD, "CloudProbability"))
    np.testing.assert_array_equal(found.label, MAP % 2)


def test_without_what_the_pickle_says_of_bands_the_datasets_tell(tmp_path: Path) -> None:
    path = sample(tmp_path, text=str(pickle.dumps({"label": [0, 1]})))
    assert read_sample(path).bands == ((BLUE, ""), (GREEN, ""))
    assert read_sample(path).label == [0, 1]


def test_a_time_series_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s.hdf5", "w") as file:
        for day in ("2019-11-05", "2019-11-10"):
            file[f"{BLUE}_{day}"] = MAP
        file.attrs["pickle"] = str(pickle.dumps({"label": 0}))
    with pytest.raises(DataError, match=r"holds '02 - Blue' more than once .* time series; only sets of one date"):
        read_sample(tmp_path / "s.hdf5")


def linked(tmp_path: Path) -> Any:
    with h5py.File(tmp_path / "elsewhere.hdf5", "w") as file:
        file["secret"] = MAP
    return h5py.ExternalLink(str(tmp_path / "elsewhere.hdf5"), "secret")


def replaced(name: str, make: Any) -> Any:
    def change(file: h5py.File) -> None:
        del file[name]
        make(file)

    return change


FILES = {
    "external link": lambda p: replaced(BLUE, lambda f: f.__setitem__(BLUE, linked(p))),
    "soft link": lambda p: replaced(BLUE, lambda f: f.__setitem__(BLUE, h5py.SoftLink("/" + GREEN))),
    "group": lambda p: replaced(BLUE, lambda f: f.create_group(BLUE)),
    "absent": lambda p: replaced(BLUE, lambda f: None),
    "external bytes": lambda p: replaced(
        BLUE, lambda f: f.create_dataset(BLUE, (3, 4), "i2", external=[(str(p / "s.hdf5"), 0, 24)])),
    "virtual": lambda p: replaced(BLUE, lambda f: f.create_virtual_dataset(BLUE, h5py.VirtualLayout((3, 4), "i2"))),
    "three sides": lambda p: replaced(BLUE, lambda f: f.create_dataset(BLUE, (3, 4, 1), "i2")),
    "texts": lambda p: replaced(BLUE, lambda f: f.create_dataset(BLUE, data=np.array([[b"a"]]))),
    "empty": lambda p: replaced(BLUE, lambda f: f.create_dataset(BLUE, (0, 4), "i2")),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_band_must_be_a_map_in_the_file_itself(case: str, tmp_path: Path) -> None:
    path = sample(tmp_path)
    edit(path, FILES[case](tmp_path))
    with pytest.raises(DataError, match=r"s\.hdf5.*'02 - Blue'"):
        read_sample(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(str(pickle.dumps({"label": Runs()})), r"it pickles posix\.system"), (str(pickle.dumps([1])), "no entry per band"),
     ("__import__('os').system('true')", "not the text of a bytes literal"),
     (str(pickle.dumps({"bands_order": [BLUE]})), "has no label"),
     (str(pickle.dumps({"bands_order": 3, "label": 0})), "is no list of names"),
     (str(pickle.dumps({"bands_order": ["../x"], "label": 0})), r"no band '\.\./x'"), ("b'\\x80\\x04}.'", "has no label")],
)  # fmt: skip
def test_what_the_pickle_says_is_checked(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_sample(sample(tmp_path, text=text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_hdf5_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing, which the partition names"):
        read_sample(tmp_path / "none.hdf5")
    (tmp_path / "s.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        read_sample(tmp_path / "s.hdf5")
    path = sample(tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        read_sample(path)
    path = sample(tmp_path)
    edit(path, lambda file: file.attrs.__delitem__("pickle"))
    with pytest.raises(DataError, match="not the text of a bytes literal"):
        read_sample(path)
