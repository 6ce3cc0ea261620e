"""What the points of a comparison say together: means over seeds, paired differences, and which points have no score."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.compare.combined import Estimate, Resamples, Scored, difference, mean_of
from mmearth_ray.evaluate.compare.contenders import Contender, Role
from mmearth_ray.evaluate.compare.planning import Planned
from mmearth_ray.evaluate.compare.points import Point, Result
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.protocols.metrics import Outcome
from mmearth_ray.evaluate.protocols.names import FINETUNE

BOUNDS = {Goal.REGRESSION: (-np.inf, 1.0)}
"""What the primary metric can be; 0 to 1 of every other goal."""


Read = Callable[[Point], Result | None]
Key: TypeAlias = tuple[str, str, float]
"""Name of a contender, protocol, fraction."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One contender, one protocol, one share of the labels, over all seeds.

    `estimate` is None where no seed has a score; `train` are training images, a mean over seeds and folds.
    """

    name: str
    protocol: str
    fraction: float
    estimate: Estimate | None
    train: float
    results: Mapping[int, Result]
    failures: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A contender's score minus another's, on the same labels and the same test images."""

    name: str
    other: str
    other_protocol: str
    protocol: str
    fraction: float
    estimate: Estimate


@dataclass(frozen=True)
class Summary:
    """Cells by (name, protocol, fraction), and differences in the order of the contenders."""

    contenders: Sequence[Contender]
    cells: Mapping[Key, Cell]
    differences: Sequence[Difference] = field(default_factory=tuple)

    def cell(self, name: str, protocol: str, fraction: float) -> Cell | None:
        return self.cells.get((name, protocol, fraction))


def summarise(
    planned: Sequence[Planned],
    goal: Goal,
    resamples: int,
    read: Read,
    outcome_of: Callable[[Point], Outcome],
    failure_of: Callable[[Point], str],
) -> Summary:
    """Gather what is done of a plan; points that nobody has tried yet count as failed.

    Raises DataError where points were tested on other images than the rest.
    """
    scored: dict[Key, dict[int, Scored]] = {}
    results: dict[Key, dict[int, Result]] = {}
    failures: dict[Key, dict[int, str]] = {}
    drawn: Resamples | None = None
    ids: np.ndarray | None = None
    for entry in planned:
        point, key = entry.point, (entry.contender.name, entry.point.protocol, entry.point.fraction)
        result = read(point)
        if result is None:
            failures.setdefault(key, {})[point.seed] = failure_of(point) or "not computed"
            continue
        outcome = outcome_of(point)
        drawn, ids = drawn or Resamples(len(outcome), resamples), outcome.ids if ids is None else ids
        if not np.array_equal(outcome.ids, ids):
            raise DataError(f"{point}: tested on other images than the other points; use another out")
        scored.setdefault(key, {})[point.seed] = Scored(outcome.primary(), drawn.values(outcome))
        results.setdefault(key, {})[point.seed] = result
    bounds = BOUNDS.get(goal, (0.0, 1.0))
    keys = Counter((e.contender.name, e.point.protocol, e.point.fraction) for e in planned)
    cells = {
        key: Cell(
            name=key[0], protocol=key[1], fraction=key[2], estimate=mean_of(_defined(scored.get(key, {})), bounds),
            train=float(np.mean([r.n_train for r in results.get(key, {}).values()] or [0])),
            results=results.get(key, {}), failures=failures.get(key, {}),
        )
        for key in keys
    }  # fmt: skip
    contenders = list({entry.contender.name: entry.contender for entry in planned}.values())
    return Summary(contenders, cells, _differences(contenders, keys, scored))


def _defined(found: Mapping[int, Scored]) -> dict[int, Scored]:
    """Without seeds whose metric is undefined, as R2 of a constant truth is."""
    return {seed: entry for seed, entry in found.items() if np.isfinite(entry.score)}


def _differences(
    contenders: Sequence[Contender],
    keys: Mapping[Key, int],
    scored: Mapping[Key, dict[int, Scored]],
) -> list[Difference]:
    """Every encoder against the baseline of its own size, the supervised one, statistics of bands and the first encoder.

    `keys`: how many seeds are planned of each.
    """
    found = []
    for contender in contenders:
        if contender.role is not Role.ENCODER:
            continue
        for protocol in contender.protocols:
            for other, other_protocol in rivals(contender, protocol, contenders):
                for fraction in dict.fromkeys(key[2] for key in keys):
                    first, second = (
                        _defined(scored.get((name, used, fraction), {}))
                        for name, used in ((contender.name, protocol), (other, other_protocol))
                    )
                    alone = 1 in (keys[contender.name, protocol, fraction], keys.get((other, other_protocol, fraction)))
                    made = difference(first, second, alone=alone)
                    if made is not None:
                        found.append(Difference(name=contender.name, other=other, other_protocol=other_protocol,
                                                protocol=protocol, fraction=fraction, estimate=made))  # fmt: skip
    return found


def rivals(contender: Contender, protocol: str, contenders: Sequence[Contender]) -> list[tuple[str, str]]:
    """(name, protocol) of what an encoder is compared with under a protocol; what has no such protocol, under its own."""
    found = [(contender.baseline[protocol], protocol)] if protocol in contender.baseline else []
    if FINETUNE in contender.baseline:
        found.append((contender.baseline[FINETUNE], FINETUNE))
    statistics = next((other for other in contenders if other.role is Role.STATISTICS), None)
    if statistics:
        found.append((statistics.name, protocol if protocol in statistics.protocols else "logistic"))
    first = next(other for other in contenders if other.role is Role.ENCODER)
    if first.name != contender.name:
        found.append((first.name, protocol))
    return list(dict.fromkeys(found))
