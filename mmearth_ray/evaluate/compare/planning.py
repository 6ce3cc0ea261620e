"""What a command will compute: its data set, its points, and the settings that they have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.compare.contenders import Contender
from mmearth_ray.evaluate.compare.options import ScoringOptions
from mmearth_ray.evaluate.compare.points import Point
from mmearth_ray.evaluate.datasets.task import Task, identity_of, load_task
from mmearth_ray.evaluate.protocols.names import PROTOCOLS

FIXED = ("normalisation", "recipe", "steps", "precision", "k", "bootstrap")
"""Settings that decide a score, beside the data set."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A point with the contender that it belongs to."""

    contender: Contender
    point: Point


def plan(
    contenders: Sequence[Contender], fractions: Sequence[float], seeds: int, task: Task, fixed: dict[str, Any]
) -> list[Planned]:
    """Every point, cheap protocols first, so that a report of a part of them says something."""
    return [
        Planned(contender, Point(contender.name, contender.subject(seed), protocol, fraction, seed, fixed))
        for protocol in PROTOCOLS
        for contender in contenders if protocol in contender.protocols
        for fraction in sorted(fractions)
        for seed in contender.seeds(protocol, fraction, seeds, task.info.goal)
    ]  # fmt: skip


def fixed_of(options: ScoringOptions, task: Task) -> dict[str, Any]:
    """What decides the score of every point of a command: the data set, and the settings in `FIXED`."""
    return {"dataset": identity_of(task), **{name: getattr(options, name) for name in FIXED}}


def open_dataset(name: str) -> Task:
    """The labelled data set that a command names.  Raises UsageError where it names none."""
    if not name:
        raise UsageError("dataset=: name the folder of a labelled data set, as convert-... writes it")
    return load_task(Path(name).expanduser().resolve())


def require_each_once(name: str, values: Sequence[Any]) -> None:
    """Raise UsageError for a list that is empty or names something twice."""
    if not values or len(set(values)) < len(values):
        raise UsageError(f"{name}=[{','.join(map(str, values))}]: name at least one, and each once")
