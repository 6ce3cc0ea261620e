"""Writing a labelled data set: blocks of images become the folder that `evaluate.datasets.task` reads, whole or not at all.

Shapes: n images of a block, C bands, H x W pixels, K classes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import IGNORED, IMAGES, SPLITS, TASK, Goal, TaskInfo, checked_info, image_schema
from mmearth_ray.files import complete_or_absent_folder
from mmearth_ray.shards.manifest import digest_of
from mmearth_ray.shards.stats import Moments

ROW_GROUP = 16
"""Images of a row group: so many are read to give one, and a reader that goes through all holds so many at once."""

FOLDED = "With folds, mean and std of the bands are those of all images."


@dataclass(frozen=True, eq=False)
class Block:
    """Some images on their way into a labelled data set.

    `splits`: train, valid or test of each; with folds empty texts.  `folds`: int (n,), -1 without folds.  `labels`: int (n,)
    classes, (n, K) of 0 and 1, float (n,) values, or int (n, H, W) classes with -1 or 255 for pixels that count for nothing.
    `pixels_NCHW`: stored values, of the data set's dtype.
    """

    ids: Sequence[str]
    splits: Sequence[str]
    folds: np.ndarray
    labels: np.ndarray
    pixels_NCHW: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def require_place(out: Path) -> Path:
    """The folder to write to, in full.  Raises UsageError where something else than a labelled data set is in the way."""
    place = out.resolve()
    if place.is_file() or not place.name:
        raise UsageError(f"{out} is no folder; name one that is new, or that holds a labelled data set")
    strange = sorted(path.name for path in place.iterdir() if path.name not in (IMAGES, TASK)) if place.exists() else []
    if strange:
        raise UsageError(
            f"{out} exists and holds {strange[0]}, so it is no labelled data set; name another folder, or remove it"
        )
    return place


def write_task(folder: Path, info: TaskInfo, blocks: Iterable[Block]) -> TaskInfo:
    """Write a labelled data set and return its description with what was measured: mean, std, counts and digest.

    `info` tells all the rest.  What lay under that name before stays until the new one is complete.  Raises UsageError where
    something else is in the way, DataError for images or labels that are no such data set, or if the disk does not take it.
    """
    place = require_place(folder)
    checked_info(info, str(folder))
    with complete_or_absent_folder(place) as incoming:
        path, tally = incoming / IMAGES, _Tally(info)
        with pq.ParquetWriter(path, image_schema(info), compression="lz4", use_dictionary=False, write_statistics=False,
                              data_page_size=1 << 28, write_page_checksum=True) as writer:  # fmt: skip
            for table in _row_groups(_arrow(tally.add(block), info) for block in blocks if len(block)):
                writer.write_table(table, row_group_size=ROW_GROUP)
        with path.open("rb") as file:
            images = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
        info = tally.result()
        body = info.to_json() | {"images": images}
        info = replace(info, digest=digest_of(body))
        text = json.dumps(body | {"digest": info.digest}, indent=1, allow_nan=False) + "\n"
        (incoming / TASK).write_text(text, encoding="utf-8")
    return info


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of ROW_GROUP each, but for the last."""
    held: Any = None
    for table in tables:
        held = pa.concat_tables([held, table]) if held else table
        whole = held.num_rows // ROW_GROUP * ROW_GROUP
        for start in range(0, whole, ROW_GROUP):
            yield held.slice(start, ROW_GROUP).combine_chunks()
        held = held.slice(whole)
    if held:
        yield held.combine_chunks()


def _arrow(block: Block, info: TaskInfo) -> pa.Table:
    """The rows of a block whose labels are as they are stored."""
    schema = image_schema(info)
    arrays: list[pa.Array] = [pa.array(list(block.ids), pa.string()), pa.array(list(block.splits), pa.string())]
    arrays += [pa.array(block.folds, pa.int16()), _column(block.labels, schema.field("label").type)]
    arrays += [_column(block.pixels_NCHW[:, i], schema.field(4 + i).type) for i in range(len(info.bands))]
    return pa.Table.from_arrays(arrays, schema=schema)


def _column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Numbers as they are, maps and rows of numbers as little-endian bytes."""
    if values.ndim == 1:
        return pa.array(values, kind)
    raw = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(raw)])


class _Tally:
    """Checks what goes into a data set, and counts and measures it on the way."""

    def __init__(self, info: TaskInfo) -> None:
        self.info = info
        self.ids: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.moments = [Moments()] * len(info.bands)
        self.seen: dict[bytes, str] = {}
        self.repeated = 0

    def add(self, block: Block) -> Block:
        """The block with labels as they are stored.  Raises DataError, naming the first image that cannot be taken."""
        info, shape = self.info, (len(block), len(self.info.bands), self.info.height, self.info.width)
        if block.pixels_NCHW.shape != shape or block.pixels_NCHW.dtype != np.dtype(info.dtype):
            found = f"{block.pixels_NCHW.dtype} {block.pixels_NCHW.shape}"
            raise DataError(f"the images from {block.ids[0]} on are {found}, not {info.dtype} {shape} as those before")
        for place, (name, split, fold) in enumerate(zip(block.ids, block.splits, block.folds.tolist(), strict=True)):
            self._count(name, split, fold, place)
            self._compare(block.pixels_NCHW[place], f"{split}{fold}")
        labels = _STORED[info.goal](block, info)
        self._measure(block)
        return replace(block, labels=labels)

    def _count(self, name: str, split: str, fold: int, place: int) -> None:
        if not name:
            raise DataError(f"image {sum(self.counts.values()) + 1} has no id; give every image one of its own")
        if name in self.ids:
            raise DataError(f"two images have the id {name}; give every image one of its own")
        self.ids.add(name)
        if self.info.folds:
            if split or not 0 <= fold < self.info.folds:
                raise DataError(f"image {name} is in split '{split}' and fold {fold}; with folds, a fold of "
                                f"0..{self.info.folds - 1} and no split is needed")  # fmt: skip
            self.counts[f"fold {fold}"] += 1
            return
        if split not in SPLITS or fold != -1:
            raise DataError(f"image {name} is in split '{split}'; it must be one of {', '.join(SPLITS)}")
        self.counts[split] += 1

    def _compare(self, pixels_CHW: np.ndarray, where: str) -> None:
        """Count images that are pixel for pixel one of another split or fold: scores on them are too good."""
        digest = hashlib.blake2b(np.ascontiguousarray(pixels_CHW).data, digest_size=16).digest()
        self.repeated += self.seen.setdefault(digest, where) != where

    def _measure(self, block: Block) -> None:
        """Moments of the bands over training images, or all images where there are folds; missing values do not count."""
        rows = np.array([split in ("", SPLITS[0]) for split in block.splits], bool)
        for band, so_far in enumerate(self.moments):
            values = block.pixels_NCHW[rows, band]
            self.moments[band] = so_far.merge(Moments.of(values[valid_values(values, self.info)]))

    def result(self) -> TaskInfo:
        """Raises DataError if there is no image at all, or none in a split or fold that is needed."""
        info, needed = self.info, (SPLITS[0], SPLITS[2])
        if not self.ids:
            raise DataError(f"{info.name} has no image; nothing is written")
        names = [f"fold {fold}" for fold in range(info.folds)] if info.folds else list(SPLITS)
        empty = [name for name in names if not self.counts[name] and (info.folds or name in needed)]
        if empty:
            kind, found = "fold" if info.folds else "split", ", ".join(f"{k}: {v}" for k, v in sorted(self.counts.items()))
            named = empty[0] if info.folds else f"'{empty[0]}'"
            raise DataError(
                f"{info.name} has no image in {kind} {named.removeprefix('fold ')} ({found}); every protocol needs some"
            )
        summaries = [moments.summary() for moments in self.moments]
        return replace(
            info,
            mean=tuple(s["mean"] for s in summaries),
            std=tuple(s["std"] for s in summaries),
            counts={name: self.counts[name] for name in names},
            notes=(*info.notes, *self._notes()),
        )

    def _notes(self) -> list[str]:
        kind, count = (
            "fold" if self.info.folds else "split",
            f"{self.repeated:,} {'image is' if self.repeated == 1 else 'images are'}",
        )
        repeated = [f"{count} pixel for pixel the same as one of another {kind}."] if self.repeated else []
        return repeated + ([FOLDED] if self.info.folds else [])


def valid_values(pixels: np.ndarray, info: TaskInfo) -> np.ndarray:
    """Where stored values are data, boolean of their shape: finite, and none of those that mean "no data"."""
    return reduce(and_, (pixels != value for value in info.missing), np.isfinite(pixels))


def _single(block: Block, info: TaskInfo) -> np.ndarray:
    labels = _whole(block, (len(block),))
    _require((labels >= 0) & (labels < len(info.classes)), block, f"must be a class of 0..{len(info.classes) - 1}")
    return labels.astype(np.int32)


def _multi(block: Block, info: TaskInfo) -> np.ndarray:
    labels = _whole(block, (len(block), len(info.classes)))
    _require(((labels == 0) | (labels == 1)).all(1), block, "must be 0 or 1 for each class")
    return labels.astype(np.uint8)


def _value(block: Block, info: TaskInfo) -> np.ndarray:
    labels = np.asarray(block.labels, np.float64)
    if labels.shape != (len(block),):
        raise DataError(f"the labels from {block.ids[0]} on have shape {labels.shape}, not {(len(block),)}")
    _require(np.isfinite(labels), block, f"must be a finite number ({info.classes[0]})")
    return labels


def _mask(block: Block, info: TaskInfo) -> np.ndarray:
    labels = _whole(block, (len(block), info.height, info.width))
    ignored = (labels == -1) | (labels == IGNORED)
    known = ignored | ((labels >= 0) & (labels < len(info.classes)))
    strange = {i: labels[i][~known[i]][0] for i in np.flatnonzero(~known.all((1, 2))).tolist()}
    for place, code in strange.items():
        raise DataError(f"the mask of image {block.ids[place]} holds {code}; codes are 0..{len(info.classes) - 1}, "
                        f"and {IGNORED} for pixels that count for nothing")  # fmt: skip
    return np.where(ignored, IGNORED, labels).astype(np.uint8)


_STORED = {Goal.SINGLE: _single, Goal.MULTI: _multi, Goal.REGRESSION: _value, Goal.SEGMENTATION: _mask}


def _whole(block: Block, shape: tuple[int, ...]) -> np.ndarray:
    labels = np.asarray(block.labels)
    if labels.shape != shape or labels.dtype.kind not in "iub":
        raise DataError(f"the labels from {block.ids[0]} on are {labels.dtype} {labels.shape}, not whole numbers {shape}")
    return labels.astype(np.int64)


def _require(good: np.ndarray, block: Block, why: str) -> None:
    if not good.all():
        place = int(np.flatnonzero(~good)[0])
        label: Any = np.asarray(block.labels)[place].tolist()
        raise DataError(f"the label of image {block.ids[place]} is {label}; it {why}")
