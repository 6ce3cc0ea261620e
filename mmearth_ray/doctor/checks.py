"""The checks, in order.  Each looks at one thing of the case, and leaves there what later ones need."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from mmearth_ray.cluster import cluster_address
from mmearth_ray.config import most_workers, steps_of, worker_counts
from mmearth_ray.doctor import judge, machine, needs, places
from mmearth_ray.doctor.case import CACHE, CHECKPOINTS, Case
from mmearth_ray.doctor.cluster import GROUP_SECONDS, LOOK_SECONDS, RAY_DIRECTORY, SPILL_DIRECTORY, add_up, look_around
from mmearth_ray.doctor.findings import Check, Finding, NotChecked
from mmearth_ray.doctor.group import BUFFER, bus_rate
from mmearth_ray.errors import DataError
from mmearth_ray.experiment import open_experiment
from mmearth_ray.plan.memory import FLOAT
from mmearth_ray.pretrain import check_hang_timeout, check_stays
from mmearth_ray.progress import counted
from mmearth_ray.shards.manifest import MANIFEST, load_manifest
from mmearth_ray.storage import sizes
from mmearth_ray.stream.cache import Cache
from mmearth_ray.train.checkpoint import committed
from mmearth_ray.train.launch import start_ray
from mmearth_ray.train.room import ask_for, uses_gpus, wait_for_room

SLOW_LINK = 100e6
"""Bytes a second between workers below which something is wrong: a link of 1 Gbit/s carries 125 MB/s."""

SLOW_PLACE = 20e6
"""Bytes a second below which a place is slow for whatever it is used for: one hard disk does 100 MB/s."""


def check_settings(case: Case) -> Iterator[Finding]:
    check_stays(case.config)
    with suppress(NotChecked):
        check_hang_timeout(case.config, case.shards())
    model, train, counts = case.config.model, case.config.train, worker_counts(case.config)
    workers = counted(counts[-1], "worker") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} workers"
    text = f"{model.size}, {case.weights / 1e6:,.1f} M weights, {workers} with train.engine={train.engine}"
    yield Finding("ok", "settings", text)


def check_data(case: Case) -> Iterator[Finding]:
    """Whether pretrain would take the data sets: manifests, tiles, statistics."""
    config = case.config  # without the cache, where what was read would stay; checkpoints have checks of their own
    alone = replace(config, data=replace(config.data, cache=""), checkpoint=replace(config.checkpoint, directory=""))
    case.experiment = experiment = open_experiment(alone, *case.shards())
    held_out = f"{experiment.held_out.samples:,}" if experiment.held_out else "none"
    text = f"{experiment.source.samples:,} tiles to train on, {held_out} held out"
    yield Finding("ok", "data", f"{text}; {experiment.steps:,} steps of {case.config.train.global_batch} tiles")


def check_ray(case: Case) -> Iterator[Finding]:
    """Join the cluster, or start a Ray, as pretrain does."""
    start_ray(case.config)
    case.gpus = uses_gpus(case.config)
    address = cluster_address(case.config.run.address)
    yield Finding("ok", "Ray", f"joined the cluster at {address}" if address else "starts on this machine")


def check_room(case: Case) -> Iterator[Finding]:
    """Wait for room as a run does, which asks a cluster that grows for machines; `leave` takes that back."""
    gpus, most = case.uses_gpus(), most_workers(case.config)
    case.room = wait_for_room(case.config, gpus, ask=ask_for)
    assert case.room is not None  # nothing stops the wait
    text = f"{counted(case.room.workers, 'worker')} {'with a GPU each' if gpus else 'on CPUs'}, data tasks of each have "
    text += f"{case.room.share.cpus:g} CPU"
    if case.room.workers < most:
        yield Finding("warning", "room", f"{text}; train.workers allows {most}, for which the cluster has no room")
    else:
        yield Finding("ok", "room", text)


def check_machines(case: Case) -> Iterator[Finding]:
    """Look at every machine of the cluster, or at this one if there is no Ray."""
    wanted = machine.Wanted(case.disks)
    if case.gpus is None:
        here = machine.look(wanted)
        case.nodes = [(here, judge.Offer(here.cores))]
    else:
        with ExitStack() as stack:
            case.nodes, silent = look_around(replace(wanted, shared=_shared(case, stack)))
        for name, reason in silent.items():
            yield Finding("failed", "machines", f"{name}: {reason}; is mmearth_ray with all it needs installed there?")
    yield from judge.sizes(case.nodes)


def _shared(case: Case, stack: ExitStack) -> dict[str, machine.Shared]:
    """What all machines must see, until the stack is left; without what cannot be used here, of which later checks tell."""
    found = {}
    for folder in case.shared:
        with suppress(DataError, OSError):
            probe = stack.enter_context(places.standing(folder))
            assert isinstance(probe, Path)
            probe.write_text(probe.name, encoding="utf-8")
            found[str(folder)] = machine.Shared(probe, machine.digest_of(probe), written=True)
    for folder in case.shared_shards:
        with suppress(OSError):
            found[str(folder)] = machine.Shared(folder / MANIFEST, machine.digest_of(folder / MANIFEST), written=False)
    return found


def check_what_was_seen(case: Case) -> Iterator[Finding]:
    """What the machines said of themselves."""
    nodes = case.machines()
    yield from judge.versions(nodes, machine.versions())
    yield from judge.gpus(nodes, bool(case.gpus), case.config.train.precision)
    yield from judge.open_files(nodes)
    yield from judge.shared_memory(nodes)
    if case.gpus is not None:
        yield from judge.ray_disk(nodes, RAY_DIRECTORY, everywhere=True)
        yield from judge.ray_disk(nodes, SPILL_DIRECTORY, everywhere=False)
    yield from judge.clocks(nodes)
    for folder in case.shared:
        yield from judge.sharing(nodes, str(folder), "seen and written")
    for folder in case.shared_shards:
        yield from judge.sharing(nodes, str(folder), "seen")


def check_memory(case: Case) -> Iterator[Finding]:
    """Whether the machines that workers run on hold what the plan counts."""
    nodes, gpus, workers = case.machines(), bool(case.gpus), case.workers
    taken = needs.memory_of(case.config, workers, on_gpu=gpus)
    yield from judge.memory(nodes, gpus, taken, workers, offload=case.config.train.offload)


def check_object_store(case: Case) -> Iterator[Finding]:
    if case.gpus is None:
        return
    nodes = case.machines()
    if case.experiment is None:
        raise NotChecked("what tiles take is known of data sets that can be opened")
    yield from judge.object_store(nodes, needs.object_store(case.config, case.experiment.source, case.workers))


def check_disks(case: Case) -> Iterator[Finding]:
    """Whether what the run keeps has room, beside what is there of it already."""
    disks, nodes = case.disks, case.machines()
    if CACHE in disks:
        yield from judge.disk("data.cache", nodes, CACHE, case.config.data.cache_gb * 1e9, "shards that are kept")
    each = 3 * FLOAT * case.weights  # weights and two moments
    if CHECKPOINTS not in disks:
        offering = judge.offering(nodes, bool(case.gpus))
        yield from judge.disk("TMPDIR", offering, machine.SCRATCH, each, "checkpoints on their way to a store")
        return
    if case.experiment is None and case.config.train.epochs:
        raise NotChecked("how many steps train.epochs are is known of data sets that can be opened")
    steps = case.experiment.steps if case.experiment else steps_of(case.config.train, 0)
    there = committed(disks[CHECKPOINTS])
    held = sum(sum(sizes(path).values()) for path in there)
    wanted = max(each, needs.most_checkpoints(case.config, steps) * each - held)
    what = f"checkpoints beside the {len(there)} that are there" if there else "checkpoints"
    yield from judge.disk("disk", nodes, CHECKPOINTS, wanted, what)


def check_all_reduce(case: Case) -> Iterator[Finding]:
    """A group of workers adds up a buffer as large as several of DDP's."""
    gpus = case.uses_gpus()
    if case.room is None:
        raise NotChecked("there is no room for the workers")
    seats, seconds = add_up(case.room.workers, gpus)
    hosts, device = len({seat.host for seat in seats}), seats[0].device
    where = f"{counted(len(seats), 'worker')} on {counted(hosts, 'machine')} ({device}, {'nccl' if gpus else 'gloo'})"
    if len(seats) == 1:
        yield Finding("ok", "all-reduce", f"{where} starts; there is nothing to add up with others")
        return
    rate = bus_rate(BUFFER, seconds, len(seats))
    step = seconds * case.weights * FLOAT / BUFFER
    text = f"right on {where}: {judge.size(BUFFER)} in {seconds:.3f} s, {judge.size(rate)}/s a link"
    text += f"; a step's gradients take {step:.3f} s"
    if rate < SLOW_LINK:
        yield Finding("warning", "all-reduce", f"{text}; below {judge.size(SLOW_LINK)}/s: choose the network with "
                      "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME")  # fmt: skip
    else:
        yield Finding("ok", "all-reduce", text)


def check_run_directory(case: Case) -> Iterator[Finding]:
    yield _paced("run.directory", case.config.run.directory, places.write_and_read(case.run))


def check_checkpoint_directory(case: Case) -> Iterator[Finding]:
    if case.config.checkpoint.directory:
        yield _paced("checkpoints", f"{case.checkpoints}", places.write_and_read(case.checkpoints))


def check_cache(case: Case) -> Iterator[Finding]:
    if CACHE in case.disks:
        with places.made(case.disks[CACHE]) as folder:
            Cache(folder, int(case.config.data.cache_gb * 1e9)).check()
        yield Finding("ok", "data.cache", f"{folder}: can be written on this machine")


def check_shards(case: Case) -> Iterator[Finding]:
    """Read shards; nothing is written there, for a run may well be forbidden to."""
    for place in case.shards():
        yield _paced("data.shards", f"{place}", places.read_shards(load_manifest(place)))


def _paced(subject: str, place: str, speed: places.Speed) -> Finding:
    slowest = min(speed.size / seconds for seconds in (speed.read, speed.write) if seconds)
    if slowest < SLOW_PLACE and speed.size >= places.PROBE:  # of less, the first answer decides
        return Finding("warning", subject, f"{place}: {speed}; below {judge.size(SLOW_PLACE)}/s: use a place nearer by")
    return Finding("ok", subject, f"{place}: {speed}")


def _check(subject: str, look: Callable[[Case], Iterator[Finding]], seconds: float | None = 60.0) -> Check[Case]:
    return Check(subject, look, seconds)


MEMORY_SECONDS = 300.0
"""Until the passes of the largest model have been followed: 12 s on one core that others use as well."""

STORAGE_SECONDS = 180.0
"""Longer than a store that stays away is asked again (`Patience`: 90 s), and a request for the probe takes (94 s)."""

CHECKS = (
    _check("settings", check_settings),
    _check("data", check_data, 600.0),
    _check("Ray", check_ray, None),  # Ray sets signal handlers, which only the main thread may; it gives up by itself
    _check("room", check_room, None),  # train.wait is its limit
    _check("machines", check_machines, LOOK_SECONDS + 60),
    _check("machines", check_what_was_seen),
    _check("memory", check_memory, MEMORY_SECONDS),
    _check("object store", check_object_store),
    _check("disk", check_disks),
    _check("all-reduce", check_all_reduce, 5 * GROUP_SECONDS),
    _check("run.directory", check_run_directory, STORAGE_SECONDS),
    _check("checkpoints", check_checkpoint_directory, STORAGE_SECONDS),
    _check("data.cache", check_cache),
    _check("data.shards", check_shards, STORAGE_SECONDS),
)
