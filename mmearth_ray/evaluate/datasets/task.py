"""A labelled data set: images of named bands with labels and splits, in one folder that every protocol reads.

    images.parquet   a row per image: id, split, fold, label, and the bytes of each band
    task.json        `TaskInfo`: what is asked, classes, bands and their statistics, splits, where it all comes from

Whatever the form of a published set, it is converted to this once (`evaluate.convert_*`).  Shapes: N images, C bands, H x W
pixels, K classes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmearth_ray.errors import DataError, one_line
from mmearth_ray.modalities import DEFAULT_INPUT, PRODUCTS, TABLE, get
from mmearth_ray.shards.manifest import digest_of

FORM = 1
IMAGES, TASK = "images.parquet", "task.json"
SPLITS = ("train", "valid", "test")
IGNORED = 255
"""Code of a pixel of a stored mask that counts for nothing."""

DTYPES = ("uint8", "uint16", "int16", "int32", "float32")
"""What pixels may be stored as."""

OTHER = "other."
"""Begins the identity of a band that is in no row of the table of modalities."""


class Goal(StrEnum):
    """What is asked of an image: one class, any number of classes, a number, or a class for every pixel."""

    SINGLE = "single-label"
    MULTI = "multi-label"
    REGRESSION = "regression"
    SEGMENTATION = "segmentation"


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What a labelled data set is.

    `bands` are identities, never positions: of Sentinel-2 its names (B8A), of another modality of the table MODALITY.BAND
    (sentinel1.asc_VV), of anything else other.NAME.  Stored values times `scale` are in the units that pretraining reads.
    `classes`: of a regression the quantity alone.  `mean` and `std`, (C,), are those of the training split in stored units,
    None where a band has no valid value; `missing` are stored values that mean "no data".  With `folds`, every image is in
    one of so many test sets in turn, and `split` says nothing.  `notes` tell what was corrected or left out.
    """

    name: str
    goal: Goal
    classes: tuple[str, ...]
    bands: tuple[str, ...]
    product: str | None
    dtype: str
    height: int
    width: int
    missing: tuple[float, ...] = ()
    scale: float = 1.0
    mean: tuple[float | None, ...] = ()
    std: tuple[float | None, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    folds: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    digest: str = ""

    @property
    def outputs(self) -> int:
        """Numbers that a head gives for an image or a pixel: K, or 1 of a regression."""
        return 1 if self.goal is Goal.REGRESSION else len(self.classes)

    def to_json(self) -> dict[str, Any]:
        return {"form": FORM, **asdict(self)}

    @classmethod
    def from_json(cls, found: Any, where: Path) -> "TaskInfo":
        """Raises DataError for what is no description of this form."""
        form = found.get("form") if isinstance(found, dict) else None
        if form != FORM:
            raise DataError(f"{where} has form {form}, this version reads {FORM}; convert the data set again")
        absent = [f.name for f in fields(cls) if f.name not in found]
        if absent:
            raise DataError(f"{where} lacks {', '.join(absent)}; convert the data set again")
        values = {f.name: tuple(v) if isinstance(v := found[f.name], list) else v for f in fields(cls)}
        try:
            return cls(**{**values, "goal": Goal(values["goal"])})
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: {one_line(error)}; convert the data set again") from error


@dataclass(frozen=True, eq=False)
class Task:
    """A labelled data set on disk, of which images and masks are read when they are asked for.

    `ids` and `split`: text (N,); `fold`: int (N,), -1 without folds; `row_groups`: rows of each row group of the file.
    """

    folder: Path
    info: TaskInfo
    ids: np.ndarray
    split: np.ndarray
    fold: np.ndarray
    row_groups: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, split: str) -> np.ndarray:
        """Places of the images of a split, ascending."""
        return np.flatnonzero(self.split == split)

    def images(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, C, H, W) stored values of images, in the order asked for.  Raises DataError where the file is damaged."""
        table = self._table(rows, [f"band.{band}" for band in self.info.bands])
        shape = (len(rows), self.info.height, self.info.width)
        return np.stack([_pixels(table.column(name), self.info.dtype, shape) for name in table.column_names], axis=1)

    def labels(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Of those images: int64 (n,) classes, uint8 (n, K) 0 or 1, float64 (n,) values, or int16 (n, H, W) classes, -1: none.

        Raises DataError where the file is damaged.
        """
        if self.info.goal is not Goal.SEGMENTATION:
            return self._labels[np.asarray(rows, np.int64)]
        masks = _pixels(self._table(rows, ["label"]).column("label"), "uint8", (len(rows), self.info.height, self.info.width))
        return np.where(masks == IGNORED, -1, masks.astype(np.int16))

    @cached_property
    def _labels(self) -> np.ndarray:
        """Labels of all images, where they are not maps."""
        column = self._table(np.arange(len(self)), ["label"]).column("label")
        if self.info.goal is Goal.MULTI:
            return _pixels(column, "uint8", (len(self), len(self.info.classes)))
        return column.to_numpy().astype(np.int64 if self.info.goal is Goal.SINGLE else np.float64)

    def _table(self, rows: Sequence[int] | np.ndarray, columns: list[str]) -> pa.Table:
        """Those rows of the file, in the order asked for; only their row groups are read."""
        wanted = np.asarray(rows, np.int64)
        ends = np.cumsum(self.row_groups)
        groups = np.unique(ends.searchsorted(wanted, "right"))
        starts = (ends - self.row_groups)[groups]
        offsets = np.cumsum(self.row_groups[groups]) - self.row_groups[groups]
        inside = groups.searchsorted(ends.searchsorted(wanted, "right"))
        try:
            with pq.ParquetFile(self.folder / IMAGES, memory_map=True, page_checksum_verification=True) as file:
                if not len(groups):
                    return file.schema_arrow.empty_table().select(columns)
                table = file.read_row_groups(groups.tolist(), columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.folder / IMAGES} is damaged ({one_line(error)}); convert the data set again") from error
        return table.combine_chunks().take(wanted - starts[inside] + offsets[inside])


def _pixels(column: pa.ChunkedArray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Fixed-size bytes as numbers of that shape."""
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) and array.num_chunks else array
    if not len(column):
        return np.zeros(shape, dtype)
    stored, count = np.dtype(dtype).newbyteorder("<"), int(np.prod(shape[1:]))
    values = np.frombuffer(array.buffers()[1], stored, len(array) * count, array.offset * count * stored.itemsize)
    return values.reshape(shape).astype(dtype)


def image_schema(info: TaskInfo) -> pa.Schema:
    """What the columns of a data set's images are: of maps and rows of numbers their bytes, little-endian and row-major."""
    pixels, classes = info.height * info.width, len(info.classes)
    label = {
        Goal.SINGLE: pa.int32(), Goal.MULTI: pa.binary(classes), Goal.REGRESSION: pa.float64(),
        Goal.SEGMENTATION: pa.binary(pixels),
    }  # fmt: skip
    kinds: dict[str, pa.DataType] = {"id": pa.string(), "split": pa.string(), "fold": pa.int16(), "label": label[info.goal]}
    kinds |= {f"band.{band}": pa.binary(pixels * np.dtype(info.dtype).itemsize) for band in info.bands}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def is_identity(band: str) -> bool:
    """Whether a text tells what a band is, as `TaskInfo` describes."""
    modality, dot, name = band.partition(".")
    if not dot:
        return band in get(DEFAULT_INPUT).bands
    if modality + dot == OTHER:
        return bool(name)
    return any(m.name == modality and name in m.bands for m in TABLE if m.name != DEFAULT_INPUT)


def checked_info(info: TaskInfo, where: str) -> TaskInfo:
    """The same description.  Raises DataError, naming the data set by `where`, for one that tells of no usable data set."""
    least = {Goal.SINGLE: 2, Goal.MULTI: 1, Goal.REGRESSION: 1, Goal.SEGMENTATION: 2}[info.goal]
    most = {Goal.SINGLE: 2**31 - 1, Goal.MULTI: 2**31 - 1, Goal.REGRESSION: 1, Goal.SEGMENTATION: IGNORED}[info.goal]
    strange = [band for band in info.bands if not is_identity(band)]
    wrong = {
        f"has {len(info.classes)} classes; a {info.goal} set has {least} to {most}": not least <= len(info.classes) <= most,
        "names a class or a band twice": any(len(set(names)) < len(names) for names in (info.classes, info.bands)),
        "has no band": not info.bands,
        f"has a band '{', '.join(strange[:1])}'; write B8A, sentinel1.asc_VV or {OTHER}NAME": bool(strange),
        f"is of product {info.product}; it must be one of {', '.join(PRODUCTS)}, or null": info.product
        not in (*PRODUCTS, None),
        f"holds {info.dtype}; it must be one of {', '.join(DTYPES)}": info.dtype not in DTYPES,
        f"is of {info.height} x {info.width} px images": min(info.height, info.width) < 1,
        f"has scale {info.scale}; it must be above 0 and finite": not 0 < info.scale < float("inf"),
        f"has {info.folds} folds; it must be 0, or 2 and more": info.folds < 0 or info.folds == 1,
    }
    for why, is_so in wrong.items():
        if is_so:
            raise DataError(f"{where} {why}")
    return info


def identity_of(task: Task) -> str:
    """Name and digest of a data set: what tells it from every other."""
    return f"{task.info.name} ({task.info.digest})"


def load_task(folder: Path) -> Task:
    """The labelled data set in a folder.  Raises DataError if it is absent, damaged or of another form."""
    try:
        body = json.loads((folder / TASK).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder} is no labelled data set (it has no {TASK}); make one with `python -m mmearth_ray.evaluate "
                        "convert-...`") from error  # fmt: skip
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / TASK} cannot be read ({one_line(error)}); convert the data set again") from error
    info = TaskInfo.from_json(body, folder / TASK)
    if digest_of(body) != info.digest:
        raise DataError(
            f"{folder / TASK} was altered after it was written (its digest does not match); convert the data set again"
        )
    checked_info(info, str(folder))
    try:
        size = (folder / IMAGES).stat().st_size
        with pq.ParquetFile(folder / IMAGES) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            if file.schema_arrow.remove_metadata() != image_schema(info) or size != body["images"]["bytes"]:
                raise DataError(f"{folder / IMAGES} is not the file that {TASK} tells of; convert the data set again")
            table = file.read(columns=["id", "split", "fold"])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder / IMAGES} cannot be read ({one_line(error)}); convert the data set again") from error
    ids, split = (np.array(table.column(name).to_pylist(), dtype=object) for name in ("id", "split"))
    return Task(folder, info, ids, split, table.column("fold").to_numpy().astype(np.int64), np.array(groups, np.int64))
