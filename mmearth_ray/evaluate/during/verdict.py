"""What is found out about an encoder in the middle of its pretraining: scores on frozen features, the embedding's health.

Shapes: N images, D features.
"""

import json
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmearth_ray.evaluate.datasets.task import Task, load_task
from mmearth_ray.evaluate.during.health import collapsed, health_of
from mmearth_ray.evaluate.during.held_out import products_of, round_of
from mmearth_ray.evaluate.during.requests import ENCODER, REQUEST
from mmearth_ray.evaluate.features.encoders import Subject, open_subject
from mmearth_ray.evaluate.features.extraction import extractor
from mmearth_ray.evaluate.features.feeding import feed_of
from mmearth_ray.evaluate.protocols.frozen import fit_knn, run_frozen
from mmearth_ray.evaluate.protocols.logistic import fit_logistic
from mmearth_ray.evaluate.protocols.metrics import primary

PROTOCOLS = {"knn": fit_knn, "logistic": fit_logistic}

BATCH = 32
"""Images that are encoded at a time."""


@dataclass(frozen=True)
class Request:
    """What is asked: after which step, on which labelled data set, on how many of its images at most, with how many threads."""

    step: int
    task: str
    tiles: int
    threads: int

    @classmethod
    def read(cls, folder: Path) -> "Request":
        found = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        return cls(**{f.name: found[f.name] for f in fields(cls)})


def verdict_on(folder: Path) -> dict[str, Any]:
    """What the request in a folder asks for, as the metrics of a run hold it: scores are the primary metric of the goal.

    Raises UsageError and DataError for data that do not fit the encoder, and for features that are not finite.
    """
    request = Request.read(folder)
    torch.set_num_threads(request.threads)
    task = load_task(Path(request.task))
    rows = round_of(task, request.tiles)
    used = np.concatenate([rows.train, rows.valid, rows.test])
    subject = open_subject(str(folder / ENCODER), f"step {request.step}")
    features_ND, goal = features_of(subject, task, used), task.info.goal
    scores = {
        name: run_frozen(partial(fit, goal=goal, classes=task.info.outputs), features_ND, task, rows, subject.name)[0].primary()
        for name, fit in PROTOCOLS.items()
    }
    health = health_of(features_ND[used])
    why = collapsed(health)
    return {
        "step": request.step, "metric": primary(goal),
        **{name: _number(value) for name, value in (scores | health.to_json()).items()},
        "collapsed": why is not None, **({"why": why} if why else {}),
        "fit_images": len(used) - len(rows.test), "test_images": len(rows.test), "task": task.info.digest[:16],
    }  # fmt: skip


def features_of(subject: Subject, task: Task, rows: np.ndarray) -> np.ndarray:
    """Pooled features (N, D) of those rows of a data set, NaN in all others.

    Images are normalised as in pretraining, each by the statistics of its product; where these do not apply, by the data set's.
    """
    products = products_of(task)
    features_ND = np.full((len(task), subject.width), np.nan, np.float32)
    for product in sorted(set(products[rows].tolist()), key=str):
        info = replace(task.info, product=product)
        feed = feed_of(subject, info, "pretraining" if product in (subject.statistics or {}) else "dataset")
        extract = extractor(subject, feed, info.goal, torch.device("cpu"))
        mine = np.sort(rows[products[rows] == product])
        for start in range(0, len(mine), BATCH):
            chosen = mine[start : start + BATCH]
            features_ND[chosen] = extract(task.images(chosen))
    return features_ND


def _number(value: float) -> float | None:
    """None where a metric is undefined, for which JSON has no number."""
    return round(value, 6) if np.isfinite(value) else None
