"""Folders of GeoTIFFs with a table of labels, converted."""

import builtins
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.convert_geotiffs import GeotiffsOptions, convert
from mmearth_ray.evaluate.datasets.task import Goal, load_task

COUNT, SIZE = 20, 8
NAMES = ("B02", "B03", "B8A", "sentinel1.asc_VV")
BANDS = ("B2", "B3", "B8A", "sentinel1.asc_VV")


def write_tif(
    path: Path, pixels_CHW: np.ndarray, names: tuple[str, ...] = (), place: int | None = None, **profile: Any
) -> None:
    """A GeoTIFF; `place`: how many km it lies from 10 degrees east on the equator."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels_CHW.shape
    where = (
        {} if place is None else {"crs": CRS.from_epsg(32632), "transform": Affine(10, 0, 611_000 + 1000 * place, 0, -10, 0)}
    )
    values = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": pixels_CHW.dtype,
        **where,
        **profile,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **values) as file:
            file.write(pixels_CHW)
            for number, name in enumerate(names, 1):
                file.set_band_description(number, name)


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 4000, (COUNT, 4, SIZE, SIZE)).astype(np.uint16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty files in two sub-folders, one km apart, with masks, and a table for each goal."""
    place = tmp_path / "tiles"
    for number, pixels in enumerate(images()):
        write_tif(place / f"{number % 2}/{number}.tif", pixels, NAMES, number)
        mask = np.full((1, SIZE, SIZE), number % 3, np.uint8)
        mask[0, 0] = 255
        write_tif(place / f"masks/{number}.tif", mask)
    splits = ["train", "train", "val", "test"]
    rows = [(f"{n % 2}/{n}.tif", n) for n in range(COUNT)]
    tables = {
        "labels": [f"{file},{'water' if n % 5 else 'forest'},{splits[n % 4]}" for file, n in rows],
        "multi": [f"{file},{'a;b' if n % 2 else 'c'},{splits[n % 4]}" for file, n in rows],
        "height": [f"{file},{n / 4},{splits[n % 4]}" for file, n in rows],
        "masks": [f"{file},masks/{n}.tif,{splits[n % 4]}" for file, n in rows],
    }
    for name, lines in tables.items():
        (place / f"{name}.csv").write_text("\n".join(["file,label,split", *lines, ""]))
    (place / "free.csv").write_text("\n".join(["file,label", *(f"{file},{n % 2}" for file, n in rows), ""]))
    (place / "folds.csv").write_text("\n".join(["file,label,fold", *(f"{file},{n % 3},{n % 5}" for file, n in rows), ""]))
    return place


def options(**changed: Any) -> GeotiffsOptions:
    return GeotiffsOptions(**changed)


def test_every_value_and_label_comes_back(folder: Path, tmp_path: Path) -> None:
    info = convert(folder, tmp_path / "t", options(product="l2a", missing=[0]))
    task = load_task(tmp_path / "t")
    np.testing.assert_array_equal(task.images(range(COUNT)), images())
    assert task.labels(range(COUNT)).tolist() == [1 if n % 5 else 0 for n in range(COUNT)]
    assert task.ids[3] == "1/3.tif"
    assert (info.bands, info.classes, info.product, info.missing) == (BANDS, ("forest", "water"), "l2a", (0.0,))
    assert (info.counts, info.name, info.dtype) == ({"train": 10, "valid": 5, "test": 5}, "tiles", "uint16")


@pytest.mark.parametrize(
    ("goal", "table", "expected"),
    [(Goal.MULTI, "multi", [[0, 0, 1], [1, 1, 0]]), (Goal.REGRESSION, "height", [0, 0.25])],
)  # fmt: skip
def test_labels_of_other_goals(goal: Goal, table: str, expected: Any, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "t", options(goal=goal.value, table=f"{table}.csv"))
    np.testing.assert_array_equal(load_task(tmp_path / "t").labels([0, 1]), expected)


@pytest.mark.parametrize("classes", [[], ["crop", "road", "roof"]])
def test_masks_are_labels_of_pixels(classes: list[str], folder: Path, tmp_path: Path) -> None:
    info = convert(folder, tmp_path / "t", options(goal="segmentation", table="masks.csv", classes=classes))
    assert info.classes == (tuple(classes) or ("class 0", "class 1", "class 2"))
    labels = load_task(tmp_path / "t").labels([4, 2])
    assert (labels[:, 0] == -1).all()
    assert (labels[0, 1:] == 1).all()
    assert (labels[1, 1:] == 2).all()


def test_what_a_mask_states_as_no_data_counts_for_nothing(folder: Path, tmp_path: Path) -> None:
    for number in range(COUNT):
        mask = np.full((1, SIZE, SIZE), 1 + number % 2, np.int16)
        mask[0, :, 3] = 0
        write_tif(folder / f"masks/{number}.tif", mask, nodata=0)
    classes = ["none", "crop", "road"]
    convert(folder, tmp_path / "t", options(goal="segmentation", table="masks.csv", classes=classes))
    labels = load_task(tmp_path / "t").labels([0])
    assert ((labels[0] == -1) == (np.arange(SIZE) == 3)).all()


def test_folds_of_the_table(folder: Path, tmp_path: Path) -> None:
    info = convert(folder, tmp_path / "t", options(table="folds.csv"))
    assert (info.folds, info.counts) == (5, {f"fold {f}": 4 for f in range(5)})
    assert load_task(tmp_path / "t").fold.tolist() == [n % 5 for n in range(COUNT)]


def test_without_splits_they_are_drawn_by_class_and_seed(folder: Path, tmp_path: Path) -> None:
    info = convert(folder, tmp_path / "t", options(table="free.csv", valid=0.2, test=0.3))
    task = load_task(tmp_path / "t")
    assert info.counts == {"train": 10, "valid": 4, "test": 6}
    labels = task.labels(range(COUNT))
    assert {split: Counter(labels[task.rows(split)].tolist()) for split in info.counts} == {
        "train": {0: 5, 1: 5}, "valid": {0: 2, 1: 2}, "test": {0: 3, 1: 3},
    }  # fmt: skip
    assert convert(folder, tmp_path / "u", options(table="free.csv", valid=0.2, test=0.3)).digest == info.digest
    convert(folder, tmp_path / "v", options(table="free.csv", valid=0.2, test=0.3, seed=1))
    assert load_task(tmp_path / "v").split.tolist() != task.split.tolist()


def test_neighbours_share_a_split_when_asked_to(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "free.csv").read_text().splitlines()
    (folder / "free.csv").write_text("\n".join([lines[0], *(line for i, line in enumerate(lines[1:]) if i % 5 < 2)]))
    convert(folder, tmp_path / "t", options(table="free.csv", together=1.5))  # pairs, four km apart
    split = load_task(tmp_path / "t").split.reshape(-1, 2)
    assert (split[:, 0] == split[:, 1]).all()
    with pytest.raises(DataError, match="no image in split 'test'"):
        convert(folder, tmp_path / "u", options(table="free.csv", together=4.5))


def test_bands_are_named_by_the_setting_where_files_do_not(folder: Path, tmp_path: Path) -> None:
    for number, pixels in enumerate(images()):
        write_tif(folder / f"{number % 2}/{number}.tif", pixels)
    with pytest.raises(UsageError, match=r"does not say what its bands are; name its 4 bands in order by bands="):
        convert(folder, tmp_path / "t", options())
    info = convert(folder, tmp_path / "t", options(bands=["B04", "b8a", "other.ndvi", "aster.slope"]))
    assert info.bands == ("B4", "B8A", "other.ndvi", "aster.slope")
    np.testing.assert_array_equal(load_task(tmp_path / "t").images([7]), images()[[7]])


def rewrite(number: int, **changed: Any) -> Callable[[Path], None]:
    """Writes one of the files again."""
    given = {"pixels_CHW": images()[number], "names": NAMES, **changed}
    return lambda place: write_tif(place / f"{number % 2}/{number}.tif", **given)


def table_of(name: str, *lines: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / f"{name}.csv").write_text("\n".join(["file,label,split", *lines]))

    return change


MASKS = {"goal": "segmentation", "table": "masks.csv"}
BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "size": (rewrite(5, pixels_CHW=images()[5, :, :6]), {}, r"1/5\.tif is uint16 \(4, 6, 8\), the first file"),
    "bands": (rewrite(5, pixels_CHW=images()[5, :3], names=NAMES[:3]), {}, r"1/5\.tif is uint16 \(3, 8, 8\)"),
    "order": (rewrite(5, names=NAMES[::-1]), {}, r"1/5\.tif says that its bands are"),
    "dtype": (rewrite(5, pixels_CHW=images()[5].astype(np.int16)), {}, r"1/5\.tif is int16"),
    "no data": (rewrite(5, nodata=7), {}, r"1/5\.tif states 7\.0 for no data, the first file None; set missing="),
    "complex": (rewrite(0, pixels_CHW=images()[0].astype(np.complex64)), {}, r"0/0\.tif holds complex64"),
    "absent": (lambda p: (p / "1/5.tif").unlink(), {}, r"labels\.csv, line 7: there is no file .*1/5\.tif"),
    "damaged": (lambda p: (p / "1/5.tif").write_bytes(b"II*\x00nothing"), {}, r"1/5\.tif cannot be read as a GeoTIFF"),
    "text": (lambda p: (p / "1/5.tif").write_text("<VRTDataset/>"), {}, r"1/5\.tif cannot be read as a GeoTIFF"),
    "cut": (lambda p: (p / "1/5.tif").write_bytes((p / "1/5.tif").read_bytes()[:300]), {}, r"1/5\.tif cannot be read"),
    "twice": (table_of("labels", "0/0.tif,a,train", "0/../0/0.tif,b,test"), {}, r"line 3: .*0\.tif is in line 2 already"),
    "no test": (table_of("labels", "0/0.tif,a,train", "1/1.tif,b,valid"), {}, "no image in split 'test'"),
    "one class": (table_of("labels", "0/0.tif,a,train", "1/1.tif,a,test"), {}, "has 1 classes"),
    "no mask": (table_of("masks", "0/0.tif,masks/77.tif,train"), MASKS, "there is no file"),
    "mask bands": (table_of("masks", "0/0.tif,1/1.tif,train"), MASKS, "is no mask: uint16"),
    "code": (lambda p: None, MASKS | {"classes": ["a", "b"]}, "mask of image 0/2.tif holds 2"),
    "mask size": (lambda p: write_tif(p / "masks/5.tif", np.ones((1, 4, 4), np.uint8)),
                  MASKS, r"masks/5\.tif is a mask of 4 x 4 px"),
    "table": (lambda p: None, {"table": "none.csv"}, r"there is no table .*none\.csv"),
    "number": (lambda p: None, {"goal": "regression"}, "label 'forest' is no finite number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_taken_is_named_in_one_line(case: str, folder: Path, tmp_path: Path) -> None:
    change, changed, message = BAD[case]
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        convert(folder, tmp_path / "t", options(**changed))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiles"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"bands": ["B3", "B2", "B8A", "sentinel1.asc_VV"]}, r"band 1 is B3, .*0\.tif says B2; correct the one that is wrong"),
     ({"bands": ["B2", "B3"]}, "names 2 bands"), ({"bands": ["B2", "B3", "red", "B5"]}, "'red' is no band"),
     ({"bands": ["B2", "B3", "B8A", "B13"]}, "'B13' is no band"), ({"valid": 0.6, "test": 0.6}, "leave nothing to train on")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        convert(folder, tmp_path / "t", options(**changed))


def test_without_rasterio_the_package_to_install_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "rasterio":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'mmearth-ray\[geotiff\]'"):
        convert(folder, tmp_path / "t", options())
