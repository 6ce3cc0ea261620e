"""The table of all points as CSV, in torchgeo-bench's column names, a row for every metric of every point.

Columns and their meaning: github.com/torchgeo/torchgeo-bench, src/torchgeo_bench/main.py, `EvaluationResult`, read 2026-11; of
ours are those after `bootstrap`.  A point without a score has one row that says why.
`c_range_*` is the grid, of which a sweep leaves out what comes after its last three worse ones.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmearth_ray.evaluate.compare.planning import Planned
from mmearth_ray.evaluate.compare.points import Point, Result
from mmearth_ray.evaluate.datasets.task import Goal, TaskInfo
from mmearth_ray.evaluate.protocols.logistic import C_COUNT, C_START, C_STOP
from mmearth_ray.evaluate.protocols.metrics import primary
from mmearth_ray.evaluate.protocols.names import PLAIN, TRAINED

COLUMNS = (
    "dataset", "method", "metric_name", "metric_value", "ci_lower", "ci_upper", "feature_dim", "best_c", "best_lr",
    "best_batch_size", "n_train", "n_val", "n_test", "seed", "model", "name", "normalization", "image_size", "interpolation",
    "partition", "bands", "c_range_start", "c_range_stop", "c_range_num", "merge_val", "bootstrap",
    "fraction", "recipe", "precision", "parameters", "seconds_features", "seconds_fit", "absent_classes", "digest", "role",
    "failure",
)  # fmt: skip


def method(protocol: str, k: int) -> str:
    """What torchgeo-bench calls a protocol, where it has it."""
    return {"knn": f"knn{k}", "logistic": "linear"}.get(protocol, protocol)


def partition(fraction: float, info: TaskInfo) -> str:
    """GEO-Bench's name where all labels of one of its partitions are used; a share of them, drawn here, has a name of ours."""
    whole = str(info.origin.get("partition", "default"))
    return whole if fraction == 1 else f"own {fraction:g} of {whole}"


def to_csv(
    planned: Sequence[Planned], info: TaskInfo, read: Callable[[Point], Result | None], failure_of: Callable[[Point], str]
) -> str:
    """The rows of a plan's points; intervals are those of the primary metric over test images."""
    buffer = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for entry in planned:
        result = read(entry.point)
        about = _about(entry, info)
        if result is None:
            writer.writerow({**about, "failure": failure_of(entry.point) or "not computed"})
            continue
        for name, value in result.metrics.items():
            bounds = {"ci_lower": result.low, "ci_upper": result.high} if name == primary(info.goal) else {}
            writer.writerow({**about, **_outcome(result), **_given({"metric_name": name, "metric_value": value, **bounds})})
    return buffer.getvalue()


def _about(entry: Planned, info: TaskInfo) -> dict[str, Any]:
    point, subject, fixed = entry.point, entry.point.subject, entry.point.fixed
    swept = {"c_range_start": C_START, "c_range_stop": C_STOP, "c_range_num": C_COUNT}
    swept = swept if point.protocol == "logistic" and info.goal is not Goal.REGRESSION else {}
    bands = [band for band in subject.bands or info.bands if band in info.bands]
    normalisation = "dataset" if subject.kind == "statistics" else fixed["normalisation"]
    return {
        "dataset": info.name, "method": method(point.protocol, int(fixed["k"])), "seed": point.seed, "model": subject.spec,
        "name": point.label, "normalization": normalisation, "image_size": info.height, "interpolation": "none",
        "partition": partition(point.fraction, info), "bands": ",".join(bands), "merge_val": False,
        "bootstrap": fixed["bootstrap"], "fraction": point.fraction,
        "recipe": "" if point.protocol in PLAIN else fixed["recipe"],
        "precision": fixed["precision"] if point.protocol in TRAINED else "fp32", "digest": subject.digest,
        "parameters": subject.parameters, "role": str(entry.contender.role), **swept,
    }  # fmt: skip


def _outcome(result: Result) -> dict[str, Any]:
    chosen = {name: result.chosen.get(name) for name in ("best_c", "best_lr", "best_batch_size")}
    counts = {"n_train": result.n_train, "n_val": result.n_valid, "n_test": result.n_test, "feature_dim": result.width}
    seconds = {"seconds_features": result.seconds_features, "seconds_fit": result.seconds_fit}
    return _given({**chosen, **counts, **seconds, "absent_classes": ";".join(result.absent)})


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as text that reads back to the same number, lists by a semicolon, nothing for what is unknown."""
    shown = {name: value if isinstance(value, list | tuple) else [value] for name, value in values.items()}
    return {name: ";".join(map(_text, value)) for name, value in shown.items()}


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else "" if value is None else str(value)
