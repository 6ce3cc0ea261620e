"""The commands for one encoder: its features, and its scores with all labels."""

import tempfile
from pathlib import Path

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.compare.comparison import complete, room_of, say
from mmearth_ray.evaluate.compare.contenders import Contender, Role
from mmearth_ray.evaluate.compare.options import FeaturesOptions, ScoreOptions
from mmearth_ray.evaluate.compare.planning import fixed_of, open_dataset, plan, require_each_once
from mmearth_ray.evaluate.compare.points import Store
from mmearth_ray.evaluate.compare.rows import to_csv
from mmearth_ray.evaluate.compare.score import outcome_of
from mmearth_ray.evaluate.compare.summary import Cell, Summary, summarise
from mmearth_ray.evaluate.datasets.task import Task
from mmearth_ray.evaluate.features.compute import compute
from mmearth_ray.evaluate.features.encoders import Subject, open_subject
from mmearth_ray.evaluate.features.feeding import Feed, feed_of
from mmearth_ray.evaluate.protocols.names import PLAIN
from mmearth_ray.evaluate.protocols.splits import rounds
from mmearth_ray.files import atomic_text
from mmearth_ray.progress import counted

COLUMNS = ("protocol", "metric", "value", "low", "high", "seeds", "train", "valid", "test", "chosen")


def features(options: FeaturesOptions) -> int:
    """Compute the features of a data set that are not there yet, and say where they are."""
    task, subject = open_dataset(options.dataset), _encoder(options.encoder)
    found = compute(subject, task, options.normalisation, Path(options.out).expanduser(), workers=options.workers,
                    batch=options.batch, threads=options.threads, show=say, gpus=options.gpus)  # fmt: skip
    shape = " x ".join(map(str, found.shape))
    print(f"{found.folder}: {counted(len(found), 'image')}, {shape} features each, {found.seconds_per_image:.2g} "
          f"{found.clock.upper()}-seconds per image")  # fmt: skip
    _tell_filled(found.feed, task)
    return 0


def _tell_filled(feed: Feed, task: Task) -> None:
    for what, bands in (("lacks", feed.absent), ("knows no mean of", feed.unknown)):
        if bands:
            print(f"  {task.info.name} {what} {', '.join(bands)}: they are filled with 0, the mean, after normalisation")


def score(options: ScoreOptions) -> int:
    """Score an encoder with all labels and print a line for every metric; intervals are those of the primary one.

    Raises DataError at the end if a protocol has no score.
    """
    task, subject = open_dataset(options.dataset), _encoder(options.encoder)
    require_each_once("protocols", options.protocols)
    strange = [protocol for protocol in options.protocols if protocol not in PLAIN and subject.kind == "statistics"]
    if strange:
        raise UsageError(f"protocols=[{strange[0]}] needs an encoder; statistics of bands have {' and '.join(PLAIN)}")
    _tell_filled(feed_of(subject, task.info, options.normalisation), task)
    rounds(task)
    room = room_of(options, task)
    contender = Contender(subject.name, Role.ENCODER, (subject,), tuple(options.protocols), {})
    planned = plan([contender], [1.0], options.seeds, task, fixed_of(options, task))
    with tempfile.TemporaryDirectory(prefix="mmearth-score-") as folder:
        store = Store(Path(folder))
        failed = complete([entry.point for entry in planned], task, store, room, say)
        summary = summarise(planned, task.info.goal, options.bootstrap, store.read,
                            lambda point: outcome_of(store.arrays(point), task.info), store.failure)  # fmt: skip
        print("\n".join(table(summary)))
        if options.csv:
            atomic_text(Path(options.csv).expanduser(), to_csv(planned, task.info, store.read, store.failure))
    if failed:
        reasons = sorted({reason for cell in summary.cells.values() for reason in cell.failures.values()})
        raise DataError(f"{failed} of {counted(len(planned), 'point')} failed: {'; '.join(reasons)}")
    return 0


def table(summary: Summary) -> list[str]:
    """Lines of a table: a row for every metric of every protocol."""
    rows = [list(COLUMNS), *(row for cell in summary.cells.values() for row in _rows(cell))]
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _rows(cell: Cell) -> list[list[str]]:
    """The primary metric with its interval, the others as means over seeds."""
    results = list(cell.results.values())
    if not results:
        return []
    first, rows = results[0], []
    for place, name in enumerate(first.metrics):
        values = [value for result in results if (value := result.metrics[name]) is not None]
        mean = f"{sum(values) / len(values):.4f}" if values else "undefined"
        low, high = (cell.estimate.low, cell.estimate.high) if place == 0 and cell.estimate else (None, None)
        chosen = ", ".join(f"{k} {_short(v)}" for k, v in first.chosen.items() if v != []) if place == 0 else ""
        rows.append([
            cell.protocol, name, mean, "" if low is None else f"{low:.4f}", "" if high is None else f"{high:.4f}",
            str(len(results)), str(first.n_train), str(first.n_valid), str(first.n_test), chosen,
        ])  # fmt: skip
    return rows


def _short(value: object) -> str:
    if isinstance(value, list):
        return "/".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _encoder(spec: str) -> Subject:
    if not spec:
        raise UsageError("encoder=: name a run, an exported model, random:SIZE/PATCH, timm:MODEL=FILE or statistics")
    return open_subject(spec)
