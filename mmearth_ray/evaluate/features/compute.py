"""Features of all images of a data set, computed once, in parallel, and kept: what is there is never computed again.

    CACHE/ENCODER-TASK-NORMALISATION/part-00000.parquet   features of 256 images (see `feature_parts`)
    CACHE/ENCODER-TASK-NORMALISATION/features.json        what they are of, written when all parts are there

ENCODER and TASK are the beginnings of digests; every part holds the whole ones, and what is another's counts as absent.

Shapes: N images, D features, h x w cells of the last map.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal, Task
from mmearth_ray.evaluate.features.encoders import Subject
from mmearth_ray.evaluate.features.feeding import Feed, feed_of
from mmearth_ray.evaluate.features.part_jobs import PartJob, run_jobs
from mmearth_ray.evaluate.features.parts import Computed, PartKey, part_name, read_part, read_rows
from mmearth_ray.files import atomic_text, write_failure
from mmearth_ray.progress import counted

STRETCH = 256
"""Images of a part: seconds of work for the smallest encoders, and little to repeat after a kill."""

RECORD = "features.json"
DIGEST = 16  # characters of a digest in the name of a folder
LEFT_OVER = 3600.0  # seconds after which a half-written file has no writer any more

Show = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder says of all images of a data set, in the data set's order.

    `matrix_ND`: float32, pooled; None of a segmentation, whose features are maps, (h, w, D) = `shape`, read by `grids`.
    `seconds`: that the whole took to compute, CPU seconds, or seconds of a GPU (`clock`); reading images is not counted.
    """

    subject: Subject
    feed: Feed
    ids: np.ndarray
    folder: Path
    shape: tuple[int, ...]
    matrix_ND: np.ndarray | None
    seconds: float
    clock: str
    threads: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """Features D of an image or a cell."""
        return self.shape[-1]

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / max(len(self), 1)

    def grids(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float16 (n, h, w, D) of images, in the order asked for.  Raises DataError where the cache is damaged.

        Images are padded to whole cells on the right and at the bottom, so the last cells may lie outside of them.
        """
        assert self.matrix_ND is None, "pooled features are in matrix_ND"
        wanted = np.asarray(rows, np.int64)
        found = np.empty((len(wanted), *self.shape), np.float16)
        for part in np.unique(wanted // STRETCH):
            here = np.flatnonzero(wanted // STRETCH == part)
            found[here] = read_rows(self.folder / part_name(part), wanted[here] % STRETCH, "float16", self.shape)
        return found


def compute(
    subject: Subject,
    task: Task,
    normalisation: str,
    cache: Path,
    *,
    workers: int | None,
    batch: int = 32,
    threads: int = 1,
    show: Show | None = None,
    gpus: bool = False,
) -> Features:
    """The features of all images of a data set, from the cache as far as they are there.

    Parts are Ray tasks of `threads` CPUs each, or with `gpus` of a GPU; `workers` at once, or as many as Ray has room for.
    With `workers=0` they are computed in this process, without Ray.  Whatever ends this, what is finished is kept.

    Raises UsageError where encoder and data set do not go together, DataError for features that are not finite, weights or
    images that changed on the way, or a disk that does not take them.
    """
    if threads < 1 or batch < 1 or (workers is not None and workers < 0):
        raise UsageError(f"threads={threads} and batch={batch} must be 1 or more, workers={workers} 0 or more, or null")
    if not task.info.digest or not len(task):
        raise DataError(f"{task.folder} has no image or no digest; convert the data set again")
    feed = feed_of(subject, task.info, normalisation)
    cached = _Cached(subject, feed, task, cache)
    jobs = cached.jobs(batch, threads, gpus)
    found = {i: part for i, job in enumerate(jobs) if (part := cached.read(job)) is not None}
    missing = [i for i in range(len(jobs)) if i not in found]
    tell = show or (lambda _: None)
    if missing and found:
        tell(f"{subject.name}: {len(found):,} of {counted(len(jobs), 'part')} of features were there already")
    for index in run_jobs({i: jobs[i] for i in missing}, workers):
        part = cached.read(jobs[index])
        if part is None:
            raise DataError(
                f"{jobs[index].path} is not what a worker wrote there; keep the cache in a folder that all machines share"
            )
        found[index] = part
        tell(f"{subject.name}: features of {min(len(found) * STRETCH, len(task)):,} of {counted(len(task), 'image')}")
    return cached.joined([found[i] for i in range(len(jobs))])


@dataclass(frozen=True, eq=False)
class _Cached:
    """The place of one encoder's features of one data set."""

    subject: Subject
    feed: Feed
    task: Task
    cache: Path

    @cached_property
    def folder(self) -> Path:
        """Raises DataError if it cannot be made."""
        name = f"{self.subject.digest[:DIGEST]}-{self.task.info.digest[:DIGEST]}-{self.feed.normalisation}"
        place = self.cache.resolve() / name
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(write_failure(place, error)) from error
        return place

    @property
    def maps(self) -> bool:
        return self.task.info.goal is Goal.SEGMENTATION

    def jobs(self, batch: int, threads: int, gpu: bool) -> list[PartJob]:
        text = json.dumps(self.feed.to_json(), sort_keys=True)
        fed, dtype = hashlib.sha256(text.encode()).hexdigest(), "float16" if self.maps else "float32"
        starts = range(0, len(self.task), STRETCH)
        ends = [(start, min(start + STRETCH, len(self.task))) for start in starts]
        keys = [PartKey(self.subject.digest, self.task.info.digest, fed, *pair, dtype) for pair in ends]
        return [
            PartJob(self.subject, self.feed, self.task.folder.resolve(), key, self.folder / part_name(i), batch, threads, gpu)
            for i, key in enumerate(keys)
        ]

    def read(self, job: PartJob) -> tuple[Computed, np.ndarray | None] | None:
        return read_part(job.path, job.key, self.task.ids[job.key.start : job.key.stop], whole=not self.maps)

    def joined(self, parts: list[tuple[Computed, np.ndarray | None]]) -> Features:
        """All parts together, and the record of them beside them."""
        first, count = parts[0][0], len(self.task)
        alike = [part for part, _ in parts if (part.clock, part.threads) == (first.clock, first.threads)]
        seconds = sum(part.seconds for part in alike) * count / sum(part.images for part in alike)
        matrices = [values for _, values in parts if values is not None]
        features = Features(
            self.subject, self.feed, self.task.ids, self.folder, first.shape, np.concatenate(matrices) if matrices else None,
            seconds, first.clock, first.threads,
        )  # fmt: skip
        self._record(features, [part for part, _ in parts])
        return features

    def _record(self, features: Features, parts: list[Computed]) -> None:
        """Write what the parts are, unless that is there."""
        info = self.task.info
        said = {
            "subject": self.subject.to_json(), "feed": self.feed.to_json(),
            "task": {"name": info.name, "digest": info.digest, "goal": info.goal, "images": len(self.task)},
            "normalisation": self.feed.normalisation, "shape": list(features.shape), "parts": len(parts),
            "seconds": features.seconds, "seconds_per_image": features.seconds_per_image, "clock": features.clock,
            "threads": features.threads, "devices": sorted({part.device for part in parts}),
            "versions": sorted({part.versions for part in parts}),
        }  # fmt: skip
        said = json.loads(json.dumps(said))
        known = ("feed", "task", "parts", "seconds", "devices", "versions")
        path = self.folder / RECORD
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            same = held["subject"]["digest"] == self.subject.digest and all(held[name] == said[name] for name in known)
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            atomic_text(path, json.dumps(said, indent=1) + "\n")
            self._tidy()

    def _tidy(self) -> None:
        """Remove what killed writers left."""
        for path in self.folder.glob(".part-*.tmp"):
            with suppress(OSError):  # another process may be faster
                if time.time() - path.stat().st_mtime > LEFT_OVER:
                    path.unlink()
