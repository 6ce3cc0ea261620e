"""Tiny GEO-Bench v1 sets, written in the published form, pickles of classes that are not installed here included.

Every true band has a level of its own (`level`), so that a test can tell by value which band it was given, and images of a
class are brighter by the class's place.  The form: github.com/ServiceNow/geo-bench, geobench/dataset.py (write_sample_hdf5),
geobench/task.py, commit 03c7bd1.
"""

import datetime
import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
from affine import Affine
from rasterio.crs import CRS

SAMPLES = 24
NAMES = (
    "01 - Coastal aerosol", "02 - Blue", "03 - Green", "04 - Red", "05 - Vegetation Red Edge", "06 - Vegetation Red Edge",
    "07 - Vegetation Red Edge", "08 - NIR", "08A - Vegetation Red Edge", "09 - Water vapour", "10 - SWIR - Cirrus",
    "11 - SWIR", "12 - SWIR",
)  # fmt: skip
TRUE = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
RADAR = ("01 - VH.Real", "02 - VH.Imaginary", "03 - VV.Real", "04 - VV.Imaginary", "05 - VH.LEE Filtered",
         "06 - VV.LEE Filtered", "07 - VH.LEE Filtered.Real", "08 - VV.LEE Filtered.Imaginary")  # fmt: skip
CLOUD = "Cloud Probability"
EUROSAT = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B9", "B10", "B11", "B12", "B8A")
KILN = ("B1", "B2", "B3", "B4", "B5", "B7", "B8A", "B8", "B11", "B12", "TCI_R", "TCI_G", "TCI_B")


@dataclass(frozen=True)
class Kind:
    """How one of the sets is published: its label's class, bands as (published name, true band), type, side, dates."""

    label: str
    classes: int
    bands: tuple[tuple[str, str], ...]
    dtype: str
    size: int
    module: str = "geobench."
    factor: float = 1.0
    dated: bool = False
    named: bool = True


_SURFACE = tuple(pair for pair in zip(NAMES, TRUE, strict=True) if pair[1] != "B10")
SETS = {
    "m-eurosat": Kind("Classification", 10, tuple(zip(NAMES, EUROSAT, strict=True)), "int16", 32, "geobench.io."),
    "m-so2sat": Kind("Classification", 17, (*((name, "radar") for name in RADAR), *_SURFACE[1:9], *_SURFACE[-2:]), "float32",
                     32, "ccb.io.", factor=1e-4),
    "m-bigearthnet": Kind("MultiLabelClassification", 43, _SURFACE, "float32", 40),
    "m-brick-kiln": Kind("Classification", 2, tuple(zip(NAMES, KILN, strict=True)), "int16", 32),
    "m-cashew-plant": Kind("SegmentationClasses", 7, (*_SURFACE, (CLOUD, "cloud")), "float32", 48, dated=True, named=False),
    "m-SA-crop-type": Kind("SegmentationClasses", 10, (*_SURFACE, (CLOUD, "cloud")), "int16", 48, factor=0.05, named=False),
}  # fmt: skip


def level(band: str) -> float:
    """The middle of what a true band holds in images of the first class, in reflectance x 10000."""
    if band.startswith("TCI"):
        return 60.0 + 20 * ("TCI_R", "TCI_G", "TCI_B").index(band)
    return {"radar": 0.0, "cloud": 0.0}.get(band, 600.0 + 300 * TRUE.index(band) if band in TRUE else 0.0)


def write_set(root: Path, name: str) -> Path:
    """Write one of `SETS` into root/NAME and return that folder: 12 samples of train, 6 of valid, 6 of test."""
    kind, folder = SETS[name], root / name
    folder.mkdir(parents=True)
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    labels = {}
    for number in range(SAMPLES):
        sample = f"id_{number:04d}"
        splits[("train", "train", "valid", "test")[number % 4]].append(sample)
        rng = np.random.default_rng([5, number])
        labels[sample], place_HW = _label(kind, number, rng)
        date = datetime.date(2019, 11, 5) + datetime.timedelta(days=5 * (number % 6)) if kind.dated else None
        bands = [(published, _pixels(kind, true, place_HW, rng)) for published, true in kind.bands]
        write_sample(folder / f"{sample}.hdf5", bands, labels[sample], date=date, module=kind.module)
    write_specs(folder, name, kind)
    write_partitions(folder, splits)
    _write_statistics(folder, kind, labels)
    return folder


def _label(kind: Kind, number: int, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
    """The label as it is pickled, and how bright each pixel is beside the level of its band."""
    shown = min(kind.classes, 4)
    if kind.label == "SegmentationClasses":
        left, right = number % shown, (number // 4 + 1) % shown
        mask = np.full((kind.size, kind.size), left)
        mask[:, int(rng.integers(kind.size // 4, 3 * kind.size // 4)) :] = right
        return mask.astype(np.int16), mask.astype(np.float64)
    if kind.label == "MultiLabelClassification":
        label = np.zeros(kind.classes, np.int64)
        label[[number // 4 % shown, shown + number % 2]] = 1
        return label, np.full((kind.size, kind.size), float(number // 4 % shown))
    return number // 4 % shown, np.full((kind.size, kind.size), float(number // 4 % shown))


def _pixels(kind: Kind, true: str, place_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if true == "cloud":
        return np.zeros_like(place_HW).astype(kind.dtype)
    if true == "radar":
        return rng.normal(0, 0.1, place_HW.shape).astype(kind.dtype)
    if true.startswith("TCI"):
        return (level(true) + 5 * place_HW + rng.integers(-3, 4, place_HW.shape)).astype(kind.dtype)
    values = (level(true) + 60 * place_HW + rng.normal(0, 20, place_HW.shape)) * kind.factor
    return (values if kind.factor == 1e-4 else np.rint(values)).astype(kind.dtype)


# ---- the form ----


@contextmanager
def geobench(prefix: str = "geobench.") -> Iterator[dict[str, Any]]:
    """Classes of GEO-Bench by name, that pickle as those of geobench.dataset, or of another prefix's modules."""
    where = {
        "label": ("Classification", "MultiLabelClassification", "LabelType", "Regression"),
        "task": ("TaskSpecifications", "Accuracy", "SegmentationAccuracy", "MultilabelAccuracy"),
        "dataset": ("Sentinel1", "Sentinel2", "Landsat8", "SpectralBand", "CloudProbability", "SegmentationClasses"),
    }
    classes = {name: type(name, (), {"__module__": prefix + part}) for part, names in where.items() for name in names}
    names = {".".join(parts[: i + 1]) for part in where for parts in [(prefix + part).split(".")] for i in range(len(parts))}
    modules = {name: ModuleType(name) for name in names}
    for name, made in classes.items():
        setattr(modules[made.__module__], name, made)
    sys.modules.update(modules)
    try:
        yield classes
    finally:
        for name in modules:
            del sys.modules[name]


def made(kind: Any, **attributes: Any) -> Any:
    """An object of that class with those attributes."""
    thing = kind()
    vars(thing).update(attributes)
    return thing


def band_info(classes: dict[str, Any], name: str) -> Any:
    sensor = "Sentinel1" if name in RADAR else "CloudProbability" if name == CLOUD else "Sentinel2"
    return made(classes[sensor], name=name, alt_names=(name[:2],), spatial_resolution=np.int64(10), wavelength=0.49)


def write_sample(
    path: Path,
    bands: Sequence[tuple[str, np.ndarray]],
    label: Any,
    *,
    date: datetime.date | None = None,
    module: str = "geobench.",
    extra: dict[str, Any] | None = None,
    text: str | None = None,
) -> None:
    """A sample of bands by published name.  A map is stored as a dataset, any other label pickled.

    `extra` joins what is pickled; `text` stands for the whole attribute.
    """
    with h5py.File(path, "w") as file, geobench(module) as classes:
        said: dict[str, Any] = {"bands_order": []}
        datasets = [(name, f"{name}_{date}" if date else name, band_info(classes, name), pixels) for name, pixels in bands]
        if isinstance(label, np.ndarray) and label.ndim == 2:
            info = made(classes["SegmentationClasses"], name="label", spatial_resolution=10, n_classes=10, _class_names=None)
            datasets.append(("label", "label", info, label))
        else:
            said["label"] = label
        for _, key, info, pixels in datasets:
            file.create_dataset(key, data=pixels)
            said["bands_order"].append(key)
            said[key] = {
                "date": date, "date_id": date, "spatial_resolution": np.float64(10), "band_info": info,
                "meta_info": {"latitude": np.float32(6.5)}, "transform": Affine(10.0, 0.0, 331040.0, 0.0, -10.0, -3714560.0),
                "crs": CRS.from_epsg(32634),
            }  # fmt: skip
        file.attrs["pickle"] = str(pickle.dumps(said | (extra or {}))) if text is None else text


def write_specs(folder: Path, name: str, kind: Kind) -> None:
    """task_specs.pkl, whose loss is named as a class, as old ones do."""
    with geobench(kind.module) as classes:
        names = [f"class of {name} {i}" for i in range(kind.classes)] if kind.named else None
        field = "class_name" if kind.label == "MultiLabelClassification" else "_class_names"
        label = made(classes[kind.label], n_classes=kind.classes, **{field: names})
        specs = made(
            classes["TaskSpecifications"], dataset_name=name.removeprefix("m-"), benchmark_name="classification_v1.0",
            patch_size=(kind.size, kind.size), n_time_steps=1, bands_stats=None, label_type=label, spatial_resolution=10,
            bands_info=[band_info(classes, band) for band, _ in kind.bands], eval_loss=classes["Accuracy"],
        )  # fmt: skip
        (folder / "task_specs.pkl").write_bytes(pickle.dumps(specs, protocol=4))


def write_partitions(folder: Path, splits: dict[str, list[str]]) -> None:
    """The default partition and those whose train split alone is cut."""
    for share in (None, 0.01, 0.02, 0.05, 0.10, 0.20, 0.50, 1.00):
        kept = splits["train"][: max(1, round(len(splits["train"]) * (share or 1.0)))]
        name = "default" if share is None else f"{share:.2f}x_train"
        (folder / f"{name}_partition.json").write_text(json.dumps(splits | {"train": kept}, indent=2))


def _write_statistics(folder: Path, kind: Kind, labels: dict[str, Any]) -> None:
    numbers = ("min", "max", "mean", "std", "median", "percentile_0_1", "percentile_99_9")
    stats = {published: dict.fromkeys(numbers, level(true)) for published, true in kind.bands}  # x 10000 in m-so2sat too
    (folder / "band_stats.json").write_text(json.dumps(stats))
    if kind.label == "Classification":
        by_class = {str(k): [sample for sample, label in labels.items() if label == k] for k in set(labels.values())}
        (folder / "label_map.json").write_text(json.dumps(by_class))
        one_hot = {sample: np.eye(kind.classes)[label].tolist() for sample, label in labels.items()}
        (folder / "label_stats.json").write_text(json.dumps(one_hot))
