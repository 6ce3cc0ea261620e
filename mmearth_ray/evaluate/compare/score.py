"""The score of one point: an encoder under a protocol, with some of the labels, over every round of a data set.

This is what a Ray task runs.  Everything that it needs lies on disks that all machines see: the data set, the cache of
features, the weights.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.compare.points import Point, Result
from mmearth_ray.evaluate.datasets.task import Goal, Task, TaskInfo, identity_of, load_task
from mmearth_ray.evaluate.features.compute import Features, compute
from mmearth_ray.evaluate.features.extraction import torch_threads
from mmearth_ray.evaluate.protocols.cells import run_cells
from mmearth_ray.evaluate.protocols.finetune import finetune
from mmearth_ray.evaluate.protocols.frozen import Fit, fit_knn, run_frozen
from mmearth_ray.evaluate.protocols.intervals import bootstrap
from mmearth_ray.evaluate.protocols.logistic import fit_logistic
from mmearth_ray.evaluate.protocols.metrics import Outcome, join
from mmearth_ray.evaluate.protocols.names import TRAINED
from mmearth_ray.evaluate.protocols.probe import fit_probe
from mmearth_ray.evaluate.protocols.splits import Round, absent_classes, rounds, subset

Arrays: TypeAlias = dict[str, np.ndarray]


@dataclass(frozen=True)
class Work:
    """A point, and where its data set and the cache of features are; `device` is where encoders are trained."""

    point: Point
    dataset: Path
    cache: Path
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Case:
    """One round of a point: rows are those that may be used, with the fraction taken already."""

    work: Work
    task: Task
    rows: Round
    features: Features | None

    @property
    def seed(self) -> int:
        return self.work.point.seed

    @property
    def fixed(self) -> Mapping[str, Any]:
        return self.work.point.fixed


def score_point(work: Work) -> tuple[Result, Arrays]:
    """The result of a point, and what was predicted.  Raises UsageError and DataError as the protocols do."""
    point, task = work.point, _task(work.dataset)
    if (now := identity_of(task)) != point.fixed["dataset"]:
        raise DataError(f"{work.dataset} was {point.fixed['dataset']} when the command began and is {now} now; start it again")
    with torch_threads(work.threads):
        features = None if point.protocol in TRAINED else features_of_point(work, task)
        began = time.perf_counter()
        used = [replace(r, train=subset(task, r.train, point.fraction, point.seed)) for r in rounds(task)]
        answers = [RUN[point.protocol](Case(work, task, rows, features)) for rows in used]
        seconds = time.perf_counter() - began
    outcome = join([outcome for outcome, _ in answers])
    low, high = bootstrap(outcome, int(point.fixed["bootstrap"])) if point.fixed["bootstrap"] else (None, None)
    absent = {name for rows in used for name in absent_classes(task, rows.train)}
    result = Result(
        metrics={name: float(v) if np.isfinite(v) else None for name, v in outcome.metrics().items()}, low=low, high=high,
        n_train=_mean([len(r.train) for r in used]), n_valid=_mean([len(r.valid) for r in used]), n_test=len(outcome),
        chosen=_together([chosen for _, chosen in answers]), absent=tuple(n for n in task.info.classes if n in absent),
        width=features.width if features else point.subject.width,
        seconds_features=features.seconds_per_image if features else None, seconds_fit=seconds,
        machine={"host": platform.node(), "processor": processor(), "threads": work.threads, "device": device_name(work.device),
                 **({"clock": features.clock} if features else {})},
    )  # fmt: skip
    return result, arrays_of(outcome)


def features_of_point(work: Work, task: Task) -> Features:
    """From the cache; what is not there is computed in this process."""
    normalisation = str(work.point.fixed["normalisation"])
    return compute(work.point.subject, task, normalisation, work.cache, workers=0, threads=work.threads)


def arrays_of(outcome: Outcome) -> Arrays:
    """An outcome as arrays that a file takes."""
    parts = {name: getattr(outcome, name) for name in ("truth", "prediction", "confusion")}
    return {"ids": np.array(outcome.ids, dtype=str), **{name: value for name, value in parts.items() if value is not None}}


def outcome_of(arrays: Mapping[str, np.ndarray], info: TaskInfo) -> Outcome:
    """The outcome of such arrays."""
    parts = {name: arrays[name] for name in ("truth", "prediction", "confusion") if name in arrays}
    return Outcome(info.goal, info.outputs, arrays["ids"].astype(object), **parts)


def device_name(device: str) -> str:
    """The GPU's name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


@cache
def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


@cache
def _task(folder: Path) -> Task:
    """Read once in a process that computes several points."""
    return load_task(folder)


def _knn(case: Case) -> tuple[Outcome, dict[str, Any]]:
    return _fitted(case, partial(fit_knn, goal=case.task.info.goal, classes=case.task.info.outputs, k=int(case.fixed["k"])))


def _logistic(case: Case) -> tuple[Outcome, dict[str, Any]]:
    return _fitted(case, partial(fit_logistic, goal=case.task.info.goal, classes=case.task.info.outputs))


def _probe(case: Case) -> tuple[Outcome, dict[str, Any]]:
    info, recipe = case.task.info, str(case.fixed["recipe"])
    return _fitted(case, partial(fit_probe, goal=info.goal, classes=info.outputs, recipe=recipe, seed=case.seed,
                                 all_labels=case.work.point.fraction == 1))  # fmt: skip


def _trained(case: Case, *, frozen: bool) -> tuple[Outcome, dict[str, Any]]:
    """By images: the head alone, or encoder and head."""
    work, fixed = case.work, case.fixed
    return finetune(
        work.point.subject, case.task, case.rows, normalisation=str(fixed["normalisation"]), recipe=str(fixed["recipe"]),
        seed=case.seed, steps=fixed["steps"], threads=work.threads, frozen=frozen, device=work.device,
        precision=str(fixed["precision"]),
    )  # fmt: skip


def _fitted(case: Case, fit: Fit) -> tuple[Outcome, dict[str, Any]]:
    """Features of images, or of cells where every pixel has a class."""
    features, subject = case.features, case.work.point.subject
    assert features is not None
    if case.task.info.goal is Goal.SEGMENTATION:
        return run_cells(fit, features.grids, subject.patch, case.task, case.rows, encoder=subject.name, seed=case.seed)
    assert features.matrix_ND is not None
    return run_frozen(fit, features.matrix_ND, case.task, case.rows, subject.name)


RUN: dict[str, Callable[[Case], tuple[Outcome, dict[str, Any]]]] = {
    "knn": _knn, "logistic": _logistic, "probe": _probe, "decoder": partial(_trained, frozen=True),
    "finetune": partial(_trained, frozen=False),
}  # fmt: skip
"""By the names in `protocols`."""


def _mean(counts: Sequence[int]) -> int:
    return round(sum(counts) / len(counts))


def _together(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was chosen in every round: one value where all agree, else a list."""
    names = dict.fromkeys(name for entry in chosen for name in entry)
    values = {name: [entry.get(name) for entry in chosen] for name in names}
    return {name: found[0] if all(v == found[0] for v in found) else found for name, found in values.items()}
