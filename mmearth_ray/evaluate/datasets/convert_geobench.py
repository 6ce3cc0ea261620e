"""GEO-Bench v1, in the form it is published in -> a labelled data set.

A set is a folder: `task_specs.pkl`, NAME_partition.json with the samples of each split, and an HDF5 file per sample.  The form:
github.com/ServiceNow/geo-bench, geobench/dataset.py (write_sample_hdf5, Partition), commit 03c7bd1.

Shapes: n samples, C bands, H x W pixels.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmearth_ray.errors import DataError, UsageError, one_line
from mmearth_ray.evaluate.datasets.geobench_bands import PublishedSet, as_published, corrected, published_set
from mmearth_ray.evaluate.datasets.geobench_sample import Sample, read_sample
from mmearth_ray.evaluate.datasets.restricted import Record, loads
from mmearth_ray.evaluate.datasets.task import DTYPES, SPLITS, Goal, TaskInfo
from mmearth_ray.evaluate.datasets.writing import ROW_GROUP, Block, require_place, write_task
from mmearth_ray.settings import key

GOALS = {
    "Classification": Goal.SINGLE, "MultiLabelClassification": Goal.MULTI, "Regression": Goal.REGRESSION,
    "SegmentationClasses": Goal.SEGMENTATION, "SemanticSegmentation": Goal.SEGMENTATION,
}  # fmt: skip
"""What is asked, by the class of a set's labels."""

AS_PUBLISHED = (
    "As published: bands are what the published evaluation of MMEarth takes them for, which reads them by name and feeds them "
    "by position; B8A and B8 are exchanged, and names that are wrong stay so. Zeros count as values."
)


@dataclass(frozen=True)
class GeobenchOptions:
    """Settings of `convert-geobench`."""

    partition: str = key("default", "which of the set's partitions: default, 0.01x_train, 0.05x_train, ...")
    as_published: bool = key(False, "label bands as the published evaluation of MMEarth feeds them, defects and all")
    others: bool = key(False, "also keep what is not Sentinel-2: Sentinel-1 of m-so2sat, the colours of m-brick-kiln")
    name: str = key("", "which published set it is, such as m-eurosat; empty: by the name of the folder")


@dataclass(frozen=True)
class _Described:
    """What a set's task description says."""

    name: str
    goal: Goal
    classes: tuple[str, ...]


def convert(place: Path, out: Path, options: GeobenchOptions) -> TaskInfo:
    """Convert a GEO-Bench set and return its description.

    Raises UsageError for settings that do not fit the set, DataError for a set that is damaged, of another form, or that
    pickles anything but what published sets hold.
    """
    require_place(out)
    if options.as_published and options.others:
        raise UsageError("as_published=true feeds the bands that the published evaluation reads, so others=true has no meaning")
    if options.name and not published_set(options.name).names:
        raise UsageError(f"name={options.name}: no published set of that name is known; leave it out, or write m-eurosat")
    described = _describe(place)
    known = published_set(options.name, place.resolve().name, described.name)
    samples = _partition(place, options.partition)
    first = read_sample(place / f"{samples[0][0]}.hdf5")
    bands = _bands(first, known, options, place)
    pixels = [first.pixels[name] for name in bands.values()]
    height, width = pixels[0].shape
    info = TaskInfo(
        name=(known.names or (place.resolve().name,))[0], goal=described.goal, classes=_classes(described, known),
        bands=tuple(bands), product=known.product, dtype=_dtype_of(pixels), height=height, width=width,
        missing=() if options.as_published else known.missing, scale=known.scale,
        origin={"kind": "geobench", "folder": place.resolve().name, "partition": options.partition,
                "as_published": options.as_published, "bands": bands},
        notes=_notes(first, bands, known, options),
    )  # fmt: skip
    return write_task(out, info, _blocks(place, samples, info, bands))


def _describe(place: Path) -> _Described:
    path = place / "task_specs.pkl"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{place} is no GEO-Bench set ({path.name}: {error.strerror}); name the folder of one set, such as "
                        "classification_v1.0/m-eurosat") from error  # fmt: skip
    found = loads(data, str(path))
    label = found.get("label_type") if isinstance(found, Record) else None
    goal = GOALS.get(label.kind) if isinstance(label, Record) else None
    if goal is None or not isinstance(label, Record):
        kind = label.kind if isinstance(label, Record) else type(label).__name__
        raise DataError(f"{path} tells of labels of the kind {kind}; those that can be converted are {', '.join(GOALS)}")
    if goal is Goal.REGRESSION:
        return _Described(str(found.get("dataset_name")), goal, ("value",))
    count, names = label.get("n_classes"), label.get("_class_names", "class_names", "class_name")
    given = [str(name) for name in np.asarray(names).tolist()] if names is not None else []
    if not isinstance(count, int) or count < 1 or (given and len(given) != count):
        raise DataError(f"{path} tells of {count} classes and names {len(given)}; download it again")
    return _Described(str(found.get("dataset_name")), goal, tuple(given) or tuple(f"class {i}" for i in range(count)))


def _classes(described: _Described, known: PublishedSet) -> tuple[str, ...]:
    """Those that the set names, or where it names none, those of its converter."""
    nameless = described.classes == tuple(f"class {i}" for i in range(len(described.classes)))
    return known.classes if nameless and len(known.classes) == len(described.classes) else described.classes


def _partition(place: Path, name: str) -> list[tuple[str, str]]:
    """(sample, split) of all samples of a partition, none of them twice."""
    suffix = "_partition.json"
    there = sorted(path.name.removesuffix(suffix) for path in place.glob("*" + suffix))
    if name not in there:
        raise UsageError(f"partition={name}: {place} has {', '.join(there) or 'no partition'}")
    path = place / (name + suffix)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}); download it again") from error
    if not isinstance(found, dict) or set(found) - set(SPLITS) or not all(isinstance(v, list) for v in found.values()):
        raise DataError(f"{path} must hold lists of samples under {', '.join(SPLITS)}")
    splits: dict[str, str] = {}
    for split in SPLITS:
        for sample in found.get(split, []):
            if not isinstance(sample, str) or not sample or "/" in sample or "\\" in sample or sample.startswith("."):
                raise DataError(f"{path} names the sample {json.dumps(sample)}, which is no name of a file in its folder")
            if sample in splits:
                raise DataError(
                    f"{path} names the sample {sample} in {splits[sample]} and in {split}; each may be in one split"
                )
            splits[sample] = split
    if not splits:
        raise DataError(f"{path} names no sample")
    return list(splits.items())


def _bands(first: Sample, known: PublishedSet, options: GeobenchOptions, place: Path) -> dict[str, str]:
    """{identity: published name} of the bands to keep."""
    try:
        found = as_published(first.bands, known) if options.as_published else None
    except LookupError as error:
        raise UsageError(
            f"as_published=true: {place} has no band {error.args[0]}, which the published evaluation reads"
        ) from error
    try:
        found = found or corrected(first.bands, known, others=options.others)
    except LookupError as error:
        raise DataError(f"{place}: {error.args[0]}; name the published set by name=") from error
    if not found:
        raise DataError(f"{place} has no band that can be kept ({', '.join(name for name, _ in first.bands)})")
    return found


def _notes(first: Sample, bands: dict[str, str], known: PublishedSet, options: GeobenchOptions) -> tuple[str, ...]:
    left = [name for name, _ in first.bands if name not in bands.values()]
    dropped = (f"Left out: {', '.join(left)}.",) if left else ()
    if not options.as_published:
        others = ("The scale is that of Sentinel-2 alone.",) if options.others and known.scale != 1 else ()
        return (*known.notes, *others, *dropped)
    fed = ", ".join(f"{slot} from {name}" for slot, name in bands.items())
    return (f"{AS_PUBLISHED} {fed}.", *dropped)


def _blocks(place: Path, samples: list[tuple[str, str]], info: TaskInfo, bands: dict[str, str]) -> Iterator[Block]:
    wanted = frozenset(bands.values())
    for start in range(0, len(samples), ROW_GROUP):
        some = samples[start : start + ROW_GROUP]
        read = [(name, read_sample(place / f"{name}.hdf5", wanted)) for name, _ in some]
        pixels = [[_fitting(sample, band, info, name) for band in bands.values()] for name, sample in read]
        labels = np.stack([_label(sample.label, info, name) for name, sample in read])
        yield Block([name for name, _ in some], [split for _, split in some], np.full(len(some), -1), labels, np.array(pixels))


def _dtype_of(pixels: list[np.ndarray]) -> str:
    """The smallest of the types that may be stored which holds those of all bands."""
    found = np.result_type(*pixels)
    return next((dtype for dtype in DTYPES if np.can_cast(found, dtype)), "float32" if found.kind == "f" else "int32")


def _fitting(sample: Sample, band: str, info: TaskInfo, name: str) -> np.ndarray:
    """A band of a sample in the type of the first; never another number than is stored."""
    pixels = sample.pixels.get(band)
    if pixels is None or pixels.shape != (info.height, info.width):
        what = f"has '{band}' of {pixels.shape[1]} x {pixels.shape[0]} px" if pixels is not None else f"has no band '{band}'"
        raise DataError(f"the sample {name} {what}; the first has {info.width} x {info.height} px of it")
    rounded = info.dtype == "float32"
    with np.errstate(all="ignore"):
        cast = pixels.astype(info.dtype)
        same = np.isfinite(cast) == np.isfinite(pixels) if rounded else cast == pixels
    if not same.all():
        raise DataError(f"the sample {name} holds {pixels[~same][0]} in '{band}', which {info.dtype}, the type of the first "
                        "sample, cannot hold")  # fmt: skip
    return cast


def _label(label: Any, info: TaskInfo, name: str) -> np.ndarray:
    """A class, 0 or 1 of each class, a number, or a map."""
    dimensions = {Goal.SINGLE: 0, Goal.MULTI: 1, Goal.REGRESSION: 0, Goal.SEGMENTATION: 2}[info.goal]
    shape = {1: (len(info.classes),), 2: (info.height, info.width)}.get(dimensions, ())
    try:
        values = np.asarray(label)
    except ValueError as error:  # lists of several lengths
        raise DataError(f"the label of the sample {name} is no {info.goal} label") from error
    whole = values.dtype.kind in "iub" or (values.dtype.kind == "f" and np.array_equal(values, np.rint(values)))
    if values.shape != shape or values.dtype.kind not in "iubf" or not (whole or info.goal is Goal.REGRESSION):
        raise DataError(f"the label of the sample {name} is {values.dtype} {values.shape}; a {info.goal} set of "
                        f"{len(info.classes)} classes has whole numbers {shape}")  # fmt: skip
    return values.astype(np.float64 if info.goal is Goal.REGRESSION else np.int64)
