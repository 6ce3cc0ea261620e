"""Room for a run: how many workers a cluster holds now, what each one's data tasks may use, and waiting for it.

A worker takes a CPU, and a GPU where there are some; one CPU of the cluster is left to data tasks, without which training would
wait for ever.
"""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from mmearth_ray.config import most_workers, worker_counts
from mmearth_ray.errors import UsageError
from mmearth_ray.keys import Config
from mmearth_ray.stream.pipeline import Share

DATA_CPUS = 1
"""CPUs of the cluster that workers leave to data tasks, at least."""

STORE_SHARE = 0.5
"""Share of the object store that the batches of all workers may take."""

SETTLE_SECONDS = 10.0
"""How long a cluster with room for some of the workers is given to offer room for more of them."""

RELEASE_SECONDS = 30.0
"""How long Ray may take, after a group of workers has ended, to show as free what its processes held, and as gone what is."""

POLL_SECONDS = 0.5

FAULTS = (RayError, RuntimeError, OSError)
"""What Ray raises where its cluster does not answer, for a moment or for good."""


class Amount(NamedTuple):
    """Logical CPUs and GPUs."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """The machines of a cluster that take work, what of it is free, and bytes of its object store."""

    nodes: tuple[Amount, ...]
    free: Amount
    store: float

    @property
    def total(self) -> Amount:
        return Amount(sum(node.cpus for node in self.nodes), sum(node.gpus for node in self.nodes))

    @property
    def taken(self) -> Amount:
        """What is not free."""
        return Amount(self.total.cpus - self.free.cpus, self.total.gpus - self.free.gpus)

    def holds(self, gpus: bool, others: Amount) -> int:
        """The most workers for which there is room beside what others take."""
        left = self.total.cpus - others.cpus - DATA_CPUS
        places = sum(min(int(node.cpus), int(node.gpus)) if gpus else int(node.cpus) for node in self.nodes)
        return max(0, int(min(places, left, self.total.gpus - others.gpus if gpus else left)))


NOTHING = Cluster((), Amount(0, 0), 0)


class Room(NamedTuple):
    """A number of workers that fits, what each one's data tasks may use, and what others take of the cluster."""

    workers: int
    share: Share
    others: Amount


def cluster_now() -> Cluster:
    """What Ray knows of the cluster at this moment; machines about to be taken away do not count."""
    leaving = draining()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    offers, free = [node["Resources"] for node in alive], free_on({node["NodeID"] for node in alive})
    return Cluster(
        tuple(Amount(offer.get("CPU", 0.0), offer.get("GPU", 0.0)) for offer in offers),
        Amount(free.get("CPU", 0.0), free.get("GPU", 0.0)),
        sum(offer.get("object_store_memory", 0.0) for offer in offers),
    )


def free_on(nodes: set[str]) -> Mapping[str, float]:
    """What is free on those machines together."""
    with suppress(ImportError):  # Ray's own function, but no public one: another version may lack it
        from ray._private.state import available_resources_per_node

        each = [found for node, found in available_resources_per_node().items() if node in nodes]
        return {name: float(sum(found.get(name, 0) for found in each)) for name in ("CPU", "GPU")}
    return ray.available_resources()


def draining() -> set[str]:
    """Machines that the cloud has announced to take back: the ids of Ray's draining nodes."""
    with suppress(ImportError, AttributeError):  # Ray's own function, but no public one: another version may lack it
        from ray._private.state import state

        return set(state.get_draining_nodes())
    return set()


def uses_gpus(config: Config) -> bool:
    """Whether each worker gets a GPU: as set, or if the cluster has enough of them for the fewest workers."""
    if config.train.gpus is not None:
        return config.train.gpus
    found = int(ray.cluster_resources().get("GPU", 0))
    return config.model.backend == "triton" or (found >= worker_counts(config)[0] and config.model.backend != "minkowski")


def fitting(config: Config, cluster: Cluster, gpus: bool, others: Amount) -> int:
    """The largest number of workers that the run may have and the cluster has room for; 0 if there is none."""
    held = cluster.holds(gpus, others)
    return max((n for n in worker_counts(config) if n <= held), default=0)


def wait_for_room(
    config: Config,
    gpus: bool,
    stopped: Callable[[], bool] = lambda: False,
    ask: Callable[[int, bool], None] = lambda workers, gpus: None,
    again: bool = False,
) -> Room | None:
    """Room for as many workers as the run may have; for fewer if it does not come soon; None once `stopped()`.

    `ask(workers, gpus)` is called now and then, for a cluster that adds machines on demand.  Raises UsageError if there
    is none for the fewest within `train.wait` seconds; where the run has just given up a room, `again`, within RELEASE_SECONDS
    at least.  A cluster that does not answer has no room yet.
    """
    begin = since = time.monotonic()
    wait = max(config.train.wait, RELEASE_SECONDS) if again else config.train.wait
    seen, told, most = -1, False, most_workers(config)
    while not stopped():
        ask(most, gpus)
        cluster, fault = NOTHING, ""
        try:
            cluster = cluster_now()
        except FAULTS as error:
            fault = f"the Ray cluster does not answer ({last_line(error)}); run the same command again once it does"
        count, now = fitting(config, cluster, gpus, cluster.taken), time.monotonic()
        if count != seen:
            seen, since = count, now
        if count == most or (count and now - since >= min(SETTLE_SECONDS, wait)):
            return room_of(cluster, count)
        if not count and now - begin >= wait:
            raise UsageError(fault or lacking(config, cluster, gpus))
        if not count and not told and now - begin > 2:
            told = True
            lack = fault or lacking(config, cluster, gpus)
            print(f"waiting up to {wait:g} s for room: {lack}", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    return None


def room_of(cluster: Cluster, workers: int) -> Room:
    """That many workers, with equal shares of all else that is free."""
    cpus = max(DATA_CPUS, cluster.free.cpus - workers) / workers
    return Room(workers, Share(cpus, int(cluster.store * STORE_SHARE / workers)), cluster.taken)


def lacking(config: Config, cluster: Cluster, gpus: bool) -> str:
    """Why there is no room for the fewest workers, and what to do."""
    least, most = worker_counts(config)[0], most_workers(config)
    total, shown = cluster.total, least if least == most else f"[{least},{most}]"
    if gpus and total.gpus < least:
        setting = "model.backend=triton" if config.model.backend == "triton" else "train.gpus=true"
        return (
            f"{setting} needs a GPU for each of train.workers={shown}, the cluster has {total.gpus:g}; use fewer train.workers,"
            " a cluster with more GPUs (a longer train.wait if it adds them on demand), or train.gpus=false to train on CPUs"
        )
    if cluster.holds(gpus, Amount(0, 0)) < least:
        return (
            f"train.workers={shown} would leave no CPU for data tasks: the cluster has {total.cpus:g}, training needs at least "
            f"{least + DATA_CPUS}; use fewer train.workers, a cluster with more CPUs, or a longer train.wait if it adds them on"
            " demand"
        )
    return (
        f"only {cluster.free.cpus:g} CPUs{f' and {cluster.free.gpus:g} GPUs' if gpus else ''} of the cluster are free, this "
        f"run needs at least {least + DATA_CPUS}{f' and {least}' if gpus else ''}; wait for other jobs to end, or use fewer "
        "train.workers"
    )


def ask_for(workers: int, gpus: bool) -> None:
    """Tell a cluster that adds machines on demand what the run could use; 0 takes that back.

    Ray Train and Ray Data tell it what they want every 20 s, over whatever was said before: so this has to be said again.
    A cluster that does not answer now hears it the next time.
    """
    worker = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
    with suppress(*FAULTS):
        request_resources(bundles=[worker] * workers + [{"CPU": 1}] * (DATA_CPUS if workers else 0))


def last_line(error: BaseException) -> str:
    """The last thing an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
