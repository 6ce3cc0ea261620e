"""Who takes part in a comparison: the encoders that are asked for, and the baselines that always go with them.

For every structure among the encoders (layers, bands, patch) there is a random encoder, frozen, and the same one trained from
its first weights on, which is a supervised encoder from scratch; besides them mean and standard deviation of every band.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.features.encoders import Subject, open_subject, random_twin
from mmearth_ray.evaluate.protocols.names import FINETUNE, PLAIN

STATISTICS = "band statistics"


class Role(StrEnum):
    """What a contender is there for."""

    ENCODER = "encoder"
    RANDOM = "random"
    SUPERVISED = "supervised"
    STATISTICS = "statistics"


@dataclass(frozen=True)
class Contender:
    """One line of the report: what it is called, one subject for all seeds or one for each, and how it is scored.

    `baseline`: name of the contender of its own size that it is compared with, by protocol.
    """

    name: str
    role: Role
    subjects: tuple[Subject, ...]
    protocols: tuple[str, ...]
    baseline: Mapping[str, str]

    def subject(self, seed: int) -> Subject:
        return self.subjects[seed % len(self.subjects)]

    def seeds(self, protocol: str, fraction: float, seeds: int, goal: Goal) -> range:
        """The seeds that can differ: with all labels and fixed features, neighbours and regressions have one result.

        Of maps the seed also draws the cells that are fitted.
        """
        alone = fraction == 1 and protocol in PLAIN and len(self.subjects) == 1 and goal is not Goal.SEGMENTATION
        return range(1 if alone else seeds)


def open_all(encoders: Sequence[str], names: Sequence[str]) -> list[Subject]:
    """The encoders under the names that reports give them.  Raises UsageError for names that cannot tell them apart."""
    if not encoders:
        raise UsageError("encoders=[]: name at least one, such as encoders=[runs/NAME]")
    if names and len(names) != len(encoders):
        raise UsageError(f"names={list(names)}: {len(encoders)} encoders need as many names, or none")
    subjects = [open_subject(spec, name) for spec, name in zip(encoders, names or [""] * len(encoders), strict=True)]
    for name, count in Counter(subject.name for subject in subjects).items():
        if count > 1:
            raise UsageError(f"{count} encoders are called '{name}'; tell them apart with names=[...]")
    for digest, count in Counter(subject.digest for subject in subjects).items():
        if count > 1:
            same = ", ".join(subject.spec for subject in subjects if subject.digest == digest)
            raise UsageError(f"encoders {same} are the same, weight by weight; name each once")
    return subjects


def contenders_of(
    subjects: Sequence[Subject], protocols: Sequence[str], seeds: int, normalisation: str, *, supervised: bool = True
) -> list[Contender]:
    """The encoders in their order, then the baselines of each structure, then statistics of bands."""
    found: list[Contender] = []
    baselines: dict[str, list[Contender]] = {}
    taken = [subject.name for subject in subjects]
    statistics = open_subject("statistics")
    for subject in subjects:
        if subject.kind == "statistics":
            statistics = subject
            continue
        key = structure_of(subject, normalisation)
        if key not in baselines:
            plain_twin = replace(subject, statistics=None) if normalisation == "dataset" else subject
            baselines[key] = _baselines(plain_twin, protocols, seeds, taken, supervised=supervised)
            taken += [contender.name for contender in baselines[key]]
        own = {protocol: contender.name for contender in baselines[key] for protocol in contender.protocols}
        found.append(Contender(subject.name, Role.ENCODER, (subject,), tuple(protocols), own))
    plain = tuple(dict.fromkeys([*(p for p in protocols if p in PLAIN), "logistic"]))
    found += [contender for group in baselines.values() for contender in group]
    given = any(subject.kind == "statistics" for subject in subjects)
    name = statistics.name if given else f"{STATISTICS} (baseline)" if STATISTICS in taken else STATISTICS
    return [*found, Contender(name, Role.STATISTICS, (statistics,), plain, {})]


def structure_of(subject: Subject, normalisation: str) -> str:
    """What encoders have in common whose baselines are the same: all but the weights."""
    known = [asdict(subject.structure), subject.patch, subject.bands, subject.missing]
    return json.dumps([*known, subject.statistics if normalisation == "pretraining" else None], sort_keys=True, default=dict)


def _baselines(
    subject: Subject, protocols: Sequence[str], seeds: int, taken: Sequence[str], *, supervised: bool
) -> list[Contender]:
    """The random encoder, and the supervised one, of a subject's structure: weights of their own for every seed."""
    size = f"{subject.size or 'x'.join(map(str, subject.structure.dims))}/{subject.patch}"
    frozen = tuple(protocol for protocol in protocols if protocol != FINETUNE)
    wanted = {Role.RANDOM: frozen, Role.SUPERVISED: (FINETUNE,) if supervised or FINETUNE in protocols else ()}
    twins = [random_twin(subject, seed) for seed in range(seeds)]
    found = []
    for role, own in wanted.items():
        name = f"{role} {size}"
        name = f"{name} (as {subject.name})" if name in taken else name
        named = tuple(replace(twin, name=name) for twin in twins)
        found += [Contender(name, role, named, own, {})] if own else []
    return found
