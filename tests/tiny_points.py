"""Subjects without weights, and points of them, for tests of what is done with scores."""

from typing import Any

import numpy as np

from mmearth_ray.evaluate.compare.contenders import Contender, Role
from mmearth_ray.evaluate.compare.planning import Planned
from mmearth_ray.evaluate.compare.points import Point, Result
from mmearth_ray.evaluate.compare.score import arrays_of
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.features.encoders import Kind, Structure, Subject
from mmearth_ray.evaluate.protocols.metrics import Outcome

FIXED: dict[str, Any] = {
    "dataset": "tiny (abc)", "normalisation": "dataset", "recipe": "converged", "steps": None, "precision": "fp32",
    "k": 5, "bootstrap": 100,
}  # fmt: skip


def subject(name: str = "ours", digest: str = "", kind: Kind = "pretrained", size: str = "atto") -> Subject:
    """An encoder that is only talked about."""
    return Subject(
        name=name, spec=f"runs/{name}", kind=kind, digest=digest or f"digest of {name}", bands=("B4", "B3"), missing=(),
        patch=8, width=4, parameters=3_400_000, size=size, statistics=None, seed=None,
        structure=Structure((1,), (4,), "modified"),
    )  # fmt: skip


def contender(name: str, role: Role = Role.ENCODER, protocols: tuple[str, ...] = ("knn",), **baseline: str) -> Contender:
    return Contender(name, role, (subject(name),), protocols, baseline)


def planned(of: Contender, protocol: str = "knn", fraction: float = 1.0, seed: int = 0) -> Planned:
    return Planned(of, Point(of.name, of.subject(seed), protocol, fraction, seed, FIXED))


def outcome(right: int, images: int = 40, classes: int = 3) -> Outcome:
    """SINGLE: so many of the images are right."""
    truth = np.arange(images) % classes
    said = np.where(np.arange(images) < right, truth, (truth + 1) % classes)
    return Outcome(Goal.SINGLE, classes, np.array([f"image-{i}" for i in range(images)], dtype=object), truth, said)


def result(of: Outcome, **changes: Any) -> Result:
    known: dict[str, Any] = {
        "metrics": of.metrics(), "low": 0.1, "high": 0.9, "n_train": 12, "n_valid": 6, "n_test": len(of), "chosen": {"k": 5},
        "absent": (), "width": 4, "seconds_features": 0.01, "seconds_fit": 0.5, "machine": {"processor": "a", "clock": "cpu"},
    }  # fmt: skip
    return Result(**(known | changes))


def kept(of: Outcome) -> tuple[Result, dict[str, np.ndarray]]:
    """What a store is given."""
    return result(of), arrays_of(of)
