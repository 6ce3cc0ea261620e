"""The cluster's side: an actor on every machine that looks at it, and a group of actors where train workers would be."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray._private.worker import global_worker
from ray.exceptions import GetTimeoutError, RayError
from ray.util import get_node_ip_address, remove_placement_group
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from mmearth_ray.doctor.findings import told
from mmearth_ray.doctor.group import BUFFER, Member, Seat
from mmearth_ray.doctor.judge import Nodes, Offer
from mmearth_ray.doctor.machine import Machine, Wanted, look
from mmearth_ray.errors import DataError
from mmearth_ray.train.room import ask_for, draining

RAY_DIRECTORY, SPILL_DIRECTORY = "Ray's directory", "spilling"
"""Names of the disks that Ray writes to."""

LOOK_SECONDS = 90.0
"""Until a machine has started a worker process and looked at itself: a cold start of Python and torch takes 30 s at worst."""

CLOCK_SECONDS = 10.0
"""Until a machine that has looked at itself has told its time."""

ASKED_TOGETHER = 64
"""Machines that are asked for the time side by side."""

GROUP_SECONDS = 120.0
"""Until a group of workers has come together, and again until it has added up its buffers; a run gives it 60 s to start."""


class Witness:
    """Looks at the machine that it runs on."""

    def look(self, wanted: Wanted, name: str) -> Machine:
        return look(replace(wanted, disks={**wanted.disks, **_ray_directories()}), name)

    def clock(self) -> float:
        return time.time()


def _ray_directories() -> dict[str, Path]:
    """Where Ray writes on this machine: its raylet, the parent of this process, has that in its command line."""
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
        given = dict(word.lstrip("-").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        session, spilled = given.get("session_dir"), given.get("fallback_directory")
        known = {RAY_DIRECTORY: session, SPILL_DIRECTORY: spilled if spilled != session else None}
        return {use: Path(path) for use, path in known.items() if path}
    return {}


@contextmanager
def _for_a_while(actors: Sequence[Any]) -> Iterator[None]:
    """Take the actors away in the end, whatever they are doing."""
    try:
        yield
    finally:
        for actor in actors:
            ray.kill(actor)


def look_around(wanted: Wanted, seconds: float = LOOK_SECONDS) -> tuple[Nodes, dict[str, str]]:
    """Every machine that takes work and what Ray has on it; and why others said nothing, by name."""
    leaving = draining()
    alive = named([node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving])
    witness: Any = ray.remote(Witness)
    actors = {
        name: witness.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for name, node in alive.items()
    }  # fmt: skip
    found: dict[str, Machine] = {}
    silent: dict[str, str] = {}
    with _for_a_while(list(actors.values())):
        asked = {name: actor.look.remote(wanted, name) for name, actor in actors.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
        for name, answer in asked.items():
            try:
                found[name] = ray.get(answer, timeout=0)
            except GetTimeoutError:
                silent[name] = f"no answer within {seconds:g} s"
            except Exception as error:  # of its process's start, or of what it met there
                silent[name] = told(error)
        ahead = skews([actors[name] for name in found])
    offers = [_offer(alive[name]["Resources"], skew) for name, skew in zip(found, ahead, strict=True)]
    return list(zip(found.values(), offers, strict=True)), silent


def named(nodes: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ray's nodes by their addresses, with the end of their ids where several are on one machine."""
    count = Counter(node["NodeManagerAddress"] for node in nodes)
    return {
        where + (f" {n['NodeID'][-6:]}" if count[where] > 1 else ""): n for n in nodes for where in [n["NodeManagerAddress"]]
    }


def _offer(resources: dict[str, float], skew: float | None) -> Offer:
    found = (resources.get(name, 0.0) for name in ("CPU", "GPU", "object_store_memory"))
    return Offer(*found, skew=skew)


def skews(witnesses: Sequence[Any]) -> list[float | None]:
    """How far the machines' clocks are ahead, in their order; all are asked side by side, as one may be silent."""
    with ThreadPoolExecutor(ASKED_TOGETHER) as pool:
        return list(pool.map(_skew, witnesses))


def _skew(witness: Any) -> float | None:
    """How far a machine's clock is ahead, by the quickest of a few answers: half of what it took is what this may be off.

    None if it does not tell its time.
    """
    found = []
    for _ in range(5):
        begin = time.time()
        try:
            there: float = ray.get(witness.clock.remote(), timeout=CLOCK_SECONDS)
        except RayError:  # which a timeout is as well
            return None
        end = time.time()
        found.append((end - begin, there - (begin + end) / 2))
    took, ahead = min(found)
    return 0.0 if abs(ahead) <= took / 2 else ahead


def add_up(
    workers: int, gpus: bool, size: int = BUFFER, seconds: float = GROUP_SECONDS, kind: type[Member] = Member
) -> tuple[list[Seat], float]:
    """Let that many workers, placed as a run places them, add up a buffer: where they are, and the slowest one's seconds.

    Raises DataError if they do not come together or do not end within that many seconds each, or if a sum is wrong.
    """
    bundle = {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0}
    group = placement_group([bundle] * workers, strategy="PACK")  # Ray Train's
    try:
        if not group.wait(seconds):
            raise DataError(f"the cluster had no place for {workers} workers within {seconds:g} s; wait for other jobs to end")
        seats = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place) for place in range(workers)]
        member: Any = ray.remote(kind)
        members = [member.options(num_cpus=1, num_gpus=int(gpus), scheduling_strategy=seat).remote() for seat in seats]
        with _for_a_while(members):
            return _meet(members, gpus, size, seconds)
    finally:
        remove_placement_group(group)


def _meet(members: list[Any], gpus: bool, size: int, seconds: float) -> tuple[list[Seat], float]:
    names = [str(rank) for rank in range(len(members))]
    seats = _answers([m.seat.remote(get_node_ip_address, gpus) for m in members], names, seconds, "start")
    order = sorted(range(len(members)), key=lambda place: seats[place].host)  # ranks of a machine follow each other
    members, seats = [members[place] for place in order], [seats[place] for place in order]
    names = [f"{rank} on {seat.host}" for rank, seat in enumerate(seats)]
    join = [m.join.remote(rank, len(members), seats[0].address, seconds) for rank, m in enumerate(members)]
    _answers(join, names, seconds, f"find the others at {seats[0].address}")
    took = _answers([m.reduce.remote(size) for m in members], names, seconds, "end the all-reduce")
    _answers([m.leave.remote() for m in members], names, seconds, "leave the group")
    return seats, max(took)


def _answers(asked: list[Any], names: list[str], seconds: float, what: str) -> list[Any]:
    """What the members answer.  Raises DataError for the first that failed, or for those that did not answer in time."""
    done, late = ray.wait(asked, num_returns=len(asked), timeout=seconds)
    for answer in done:
        try:
            ray.get(answer)
        except Exception as error:
            raise DataError(f"worker {names[asked.index(answer)]} could not {what}: {told(error)}") from error
    if late:
        missing = " and ".join(names[asked.index(answer)] for answer in late)
        raise DataError(f"worker {missing} did not {what} within {seconds:g} s; check firewalls and names between the "
                        "machines, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, and what NCCL_DEBUG=INFO shows")  # fmt: skip
    return ray.get(asked)


def leave() -> None:
    """Leave the cluster, and ask it for no more machines; of a Ray that this process started, what it wrote goes as well."""
    if not ray.is_initialized():
        return
    with suppress(Exception):  # a cluster that is gone has no machines to give back
        ask_for(0, gpus=False)
    node = global_worker.node  # Ray's own name, but no public one tells the session's directory
    session = Path(node.get_session_dir_path()) if node is not None and node.head else None
    ray.shutdown()
    if session is None:
        return
    shutil.rmtree(session, ignore_errors=True)
    latest = session.with_name("session_latest")
    with suppress(OSError):
        if latest.is_symlink() and not latest.exists():
            latest.unlink()
