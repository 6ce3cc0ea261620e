"""Scoring a plan of points: features first, then every point as a Ray task, each kept as it comes.

Whatever ends a comparison, what is finished stays: the same command goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.compare.options import ScoringOptions
from mmearth_ray.evaluate.compare.points import Point, Store
from mmearth_ray.evaluate.compare.pool import Failure, run_jobs, told
from mmearth_ray.evaluate.compare.score import Work, score_point
from mmearth_ray.evaluate.datasets.task import Task
from mmearth_ray.evaluate.features.compute import compute
from mmearth_ray.evaluate.features.encoders import Subject
from mmearth_ray.evaluate.protocols.names import TRAINED
from mmearth_ray.progress import counted

Say = Callable[[str], None]


@dataclass(frozen=True)
class Room:
    """Where and with what points are computed; `workers` and `threads` as `pool.run_jobs` takes them."""

    dataset: Path
    cache: Path
    workers: int | None
    threads: int
    gpus: bool


def room_of(options: ScoringOptions, task: Task) -> Room:
    """Where a command's options let points be computed.  Raises UsageError for options that do not go together."""
    if options.workers == 0 and options.gpus:
        raise UsageError("workers=0 computes in this process alone; GPUs are given by Ray, so leave one of the two keys out")
    cache = Path(options.cache).expanduser().resolve()
    return Room(task.folder, cache, options.workers, options.threads, options.gpus)


def say(text: str) -> None:
    """Tell how far a command is."""
    print(text, flush=True)


def complete(points: Sequence[Point], task: Task, store: Store, room: Room, say: Say) -> int:
    """Compute the points that are not done, and return how many of all have no score."""
    store.clean()
    points = list({point.key: point for point in points}.values())  # encoders that are the same share their points
    waiting = [point for point in points if not store.is_done(point)]
    done = len(points) - len(waiting)
    if done:
        say(f"{done} of {counted(len(points), 'point')} finished before")
    if not waiting:
        return 0
    waiting = _with_features(waiting, task, store, room, say)
    failed = len(points) - done - len(waiting)
    jobs = [Work(point, room.dataset, room.cache, room.threads, "cuda" if _on_gpu(point, room) else "cpu") for point in waiting]
    for gpu in (False, True):
        some = [job for job in jobs if (job.device == "cuda") is gpu]
        if not some:
            continue
        for job, answer in run_jobs(some, score_point, workers=room.workers, cpus=room.threads, gpus=1 if gpu else 0):
            done += 1
            failed += _keep(store, job.point, answer, f"{done}/{len(points)}", say)
    return failed


def _keep(store: Store, point: Point, answer: object, place: str, say: Say) -> bool:
    """Keep what came of a point; whether it failed."""
    if isinstance(answer, Failure):
        store.write_failure(point, answer.line, answer.trace)
        say(f"{place} {point}: failed: {answer.line}")
        return True
    result, arrays = answer  # type: ignore[misc]
    store.write(point, result, arrays)
    name, value = next(iter(result.metrics.items()))
    say(f"{place} {point}: {name} {'undefined' if value is None else f'{value:.3f}'}")
    return False


def _on_gpu(point: Point, room: Room) -> bool:
    return room.gpus and point.protocol in TRAINED


def _with_features(points: Sequence[Point], task: Task, store: Store, room: Room, say: Say) -> list[Point]:
    """The points whose encoder has its features in the cache afterwards, or needs none; of the others the reason is kept."""
    subjects: dict[str, Subject] = {p.subject.digest: p.subject for p in points if p.protocol not in TRAINED}
    normalisation = {p.subject.digest: str(p.fixed["normalisation"]) for p in points}
    broken: dict[str, Failure] = {}
    for digest, subject in subjects.items():
        try:
            compute(subject, task, normalisation[digest], room.cache, workers=room.workers, threads=room.threads, show=say,
                    gpus=room.gpus and subject.kind != "statistics")  # fmt: skip
        except UsageError:
            raise  # a setting that no encoder can be computed with
        except Exception as error:  # one encoder's features that fail are no reason to give up the others
            broken[digest] = told(error)
            say(f"{subject.name}: no features: {broken[digest].line}")
    left = []
    for point in points:
        if point.protocol not in TRAINED and point.subject.digest in broken:
            store.write_failure(point, broken[point.subject.digest].line, broken[point.subject.digest].trace)
        else:
            left.append(point)
    return left
