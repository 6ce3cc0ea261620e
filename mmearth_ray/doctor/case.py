"""The case: the run that is about to start, and what the checks have found out so far."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmearth_ray.config import most_workers
from mmearth_ray.doctor.findings import NotChecked
from mmearth_ray.doctor.judge import Nodes
from mmearth_ray.doctor.needs import count_weights
from mmearth_ray.errors import UsageError
from mmearth_ray.experiment import Experiment
from mmearth_ray.keys import EMBEDDED, Config
from mmearth_ray.pretrain import EMBEDDED_DIRECTORY
from mmearth_ray.shards.manifest import MANIFEST
from mmearth_ray.storage import Location, locate
from mmearth_ray.train.checkpoint import directory_of
from mmearth_ray.train.room import Room

CHECKPOINTS, CACHE = "checkpoints", "cache"
"""Names of the disks that a run writes to."""


@dataclass
class Case:
    """Settings; then, once it is known: what they are with the data sets, whether GPUs are used, the room, the machines."""

    config: Config
    experiment: Experiment | None = None
    gpus: bool | None = None
    room: Room | None = None
    nodes: Nodes = ()

    @cached_property
    def weights(self) -> int:
        """Elements of all that is trained."""
        return count_weights(self.config)

    @property
    def run(self) -> Path:
        return Path(self.config.run.directory).expanduser().resolve()

    @property
    def checkpoints(self) -> Location:
        """Where checkpoints go.  Raises UsageError for a URL that cannot be used."""
        place = directory_of(self.config)
        return place.expanduser().resolve() if isinstance(place, Path) else place

    @property
    def disks(self) -> Mapping[str, Path]:
        """Local directories that the run fills, by their names.  Of a URL that cannot be used its own check tells."""
        places: dict[str, Location] = {}
        with suppress(UsageError):
            places[CHECKPOINTS] = self.checkpoints
        if self.config.data.cache:
            places[CACHE] = Path(self.config.data.cache).expanduser().resolve()
        return {use: place for use, place in places.items() if isinstance(place, Path)}

    def shards(self) -> list[Location]:
        """Where the data sets are.  Raises NotChecked if one is still to be made, UsageError for a wrong URL."""
        if EMBEDDED in self.config.data.shards and not (EMBEDDED_DIRECTORY / MANIFEST).exists():
            raise NotChecked(f"pretrain makes the embedded data set in {EMBEDDED_DIRECTORY} when it is first used")
        return [EMBEDDED_DIRECTORY if text == EMBEDDED else locate(text, "data.shards") for text in self.config.data.shards]

    @property
    def shared(self) -> list[Path]:
        """Local directories that every machine writes to."""
        kept = self.disks.get(CHECKPOINTS)
        return [self.run, kept] if kept and not kept.is_relative_to(self.run) else [self.run]

    @property
    def shared_shards(self) -> list[Path]:
        """Local directories that every machine reads; none where the checks of the data have to say why."""
        with suppress(NotChecked, UsageError):
            return [place.resolve() for place in self.shards() if isinstance(place, Path)]
        return []

    @property
    def workers(self) -> int:
        """As many as there is room for, or the most that the run may have where that is not known."""
        return self.room.workers if self.room else most_workers(self.config)

    def uses_gpus(self) -> bool:
        """Whether the run uses GPUs.  Raises NotChecked where there is no Ray to ask."""
        if self.gpus is None:
            raise NotChecked("Ray is not there")
        return self.gpus

    def machines(self) -> Nodes:
        """The machines that told of themselves.  Raises NotChecked if none did."""
        if not self.nodes:
            raise NotChecked("no machine told of itself")
        return self.nodes
