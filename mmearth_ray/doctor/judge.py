"""Judging machines: from what they say of themselves and what a run takes to findings.  Pure functions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mmearth_ray.doctor.findings import Finding, Level
from mmearth_ray.doctor.machine import Machine
from mmearth_ray.plan.memory import SPARE, Memory
from mmearth_ray.progress import counted

OPEN_FILES = 8192
"""Open files that Ray recommends at least (ray/_private/worker.py, below 4,096 it warns by itself)."""

SPILL_SHARE = 0.95
"""Share of a disk in use beyond which Ray writes nothing more to it (RAY_local_fs_capacity_threshold)."""

LOGS = 5e9
"""Free bytes for Ray's logs and what it spills; our choice, Ray itself knows the share above only."""

SKEW_WARNING, SKEW_FAILURE = 1.0, 900.0
"""Seconds between clocks: beyond the first, times in logs mislead; S3 refuses requests signed more than 15 minutes off."""

SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm at least: NCCL and gloo take some beside the object store; a container has 64 MB unless told otherwise."""

BF16 = 8.0
"""Compute capability from which GPUs compute in bf16 (Ampere)."""


class Offer(NamedTuple):
    """What Ray has on a machine: logical CPUs and GPUs, bytes of object store; and how far its clock is ahead, seconds;
    None where it did not tell its time."""

    cpus: float = 0.0
    gpus: float = 0.0
    store: float = 0.0
    skew: float | None = 0.0


Nodes = Sequence[tuple[Machine, Offer]]
Verdict = tuple[Level, str]


def size(amount: float) -> str:
    """Bytes as people read them: 64 MB, 1.5 GB."""
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e9 else f"{amount / 1e6:,.1f} MB"


def grouped(subject: str, nodes: Nodes, verdict: Callable[[Machine, Offer], Verdict | None]) -> Iterator[Finding]:
    """One finding for all machines of which the same is to be said, with their names; None where nothing is."""
    kinds: dict[Verdict, list[str]] = {}
    for machine, offer in nodes:
        if said := verdict(machine, offer):
            kinds.setdefault(said, []).append(machine.name)
    for (level, text), names in kinds.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        yield Finding(level, subject, f"{text} ({shown})" if len(nodes) > 1 else text)


def sizes(nodes: Nodes) -> Iterator[Finding]:
    """What every machine has."""

    def verdict(machine: Machine, offer: Offer) -> Verdict:
        own = f"{counted(machine.cores, 'core')}, {size(machine.memory)} memory"
        if not offer.store:
            return "ok", f"{own}; seen without Ray"
        return "ok", f"{own}; Ray offers {offer.cpus:g} CPUs and {size(offer.store)} object store"

    yield from grouped("machines", nodes, verdict)


def versions(nodes: Nodes, here: Mapping[str, str]) -> Iterator[Finding]:
    """Whether all machines have the versions of this one."""
    differ = False
    for machine, _ in nodes:
        for name, own in here.items():
            other = machine.versions.get(name, "none")
            if other != own:
                differ = True
                text = f"{name} {other} on {machine.name}, {own} here; install requirements.lock on every machine"
                yield Finding("failed", "versions", text)
    if not differ:
        yield Finding("ok", "versions", ", ".join(f"{name} {version}" for name, version in here.items()))


def open_files(nodes: Nodes) -> Iterator[Finding]:
    def verdict(machine: Machine, _: Offer) -> Verdict:
        if 0 <= machine.open_files < OPEN_FILES:  # -1: no limit
            return "warning", (f"at most {machine.open_files:,}, Ray recommends {OPEN_FILES:,}; raise the hard limit before "
                               "Ray starts: ulimit -n 65536, or --ulimit nofile=65536:65536 of a container")  # fmt: skip
        if machine.open_files < 0:
            return "ok", "no limit"
        return "ok", f"at most {machine.open_files:,}, Ray recommends {OPEN_FILES:,}"

    yield from grouped("open files", nodes, verdict)


def gpus(nodes: Nodes, wanted: bool, precision: str) -> Iterator[Finding]:
    """The GPUs of every machine, and whether they do what the run wants of them."""

    def verdict(machine: Machine, offer: Offer) -> Verdict:
        seen = len(machine.gpus)
        if not seen:
            missing = offer.gpus > 0
            return ("failed" if missing and wanted else "warning" if missing else "ok"), (
                f"none, but Ray offers {offer.gpus:g}; install NVIDIA's driver, or start Ray without GPUs"
                if missing
                else "none"
            )
        kind = machine.gpus[0]
        text = (f"{seen} x {kind.name}, {size(kind.memory)}, compute capability {kind.capability:g}, driver {kind.driver}, "
                f"{'bf16' if kind.capability >= BF16 else 'no bf16'}")  # fmt: skip
        if offer.gpus > seen:
            return "failed", f"{text}; Ray offers {offer.gpus:g}: start it with the number that is there"
        if len(set(machine.gpus)) > 1:
            return "warning", f"{text}; not all are of that kind: the slowest sets the pace"
        if precision == "bf16" and kind.capability < BF16 and wanted:
            return "warning", f"{text}; train.precision=bf16 is emulated: use fp32"
        if not wanted and offer.gpus:
            return "warning", f"{text}; the run trains on CPUs: fewer train.workers, or train.gpus=true, to use them"
        return "ok", text

    yield from grouped("GPUs", nodes, verdict)


def places(offer: Offer, on_gpus: bool) -> int:
    """How many workers a machine takes."""
    return int(offer.gpus if on_gpus else offer.cpus)


def offering(nodes: Nodes, on_gpus: bool) -> Nodes:
    """The machines on which workers may be."""
    return [(machine, offer) for machine, offer in nodes if places(offer, on_gpus) > 0]


def memory(nodes: Nodes, on_gpus: bool, taken: Memory, workers: int, *, offload: bool) -> Iterator[Finding]:
    """Whether what the workers of a machine hold at most fits there, of machines that offer what workers run on."""

    def verdict(machine: Machine, offer: Offer) -> Verdict:
        here, left = min(workers, places(offer, on_gpus)), machine.memory - offer.store
        store = f" less {size(offer.store)} object store" if offer.store else ""
        host = f"{counted(here, 'worker')} on {size(machine.memory)}{store}"
        own = taken.on_gpu(offload=offload) if on_gpus else taken.total
        text = f"a worker takes {size(own)}, {size(taken.activations)} of it for activations"
        if on_gpus:
            least, moved = min((gpu.memory for gpu in machine.gpus), default=0), taken.total - own
            fits = (not least or own <= (1 - SPARE) * least) and here * moved < left  # 0: the driver does not tell
            text += f"; a GPU has {size(least)}, {SPARE:.0%} of it for CUDA" if least else "; a GPU does not tell what it has"
            text += f"; train.offload takes {size(moved)} of the host for each: {host}" if moved else ""
        else:
            fits = here * own < left
            text += f"; {host}"
        advice = "" if fits else "; use train.engine=zero3, a smaller train.micro_batch or model.size, or larger machines"
        return ("ok" if fits else "failed"), f"{text}{advice}"

    found = offering(nodes, on_gpus)
    if not found:
        yield Finding("warning", "memory", f"not checked: no machine offers {'a GPU' if on_gpus else 'CPUs'} to workers")
    yield from grouped("memory", found, verdict)


def shared_memory(nodes: Nodes) -> Iterator[Finding]:
    """Whether /dev/shm holds the object store; where it does not, Ray puts that on a disk."""

    def verdict(machine: Machine, offer: Offer) -> Verdict:
        disk = machine.shared_memory
        if disk is None:
            return "ok", "there is none on this system"
        bound = max(offer.store, SHARED_MEMORY)
        if disk.total < bound:
            return "warning", (f"/dev/shm has {size(disk.total)}, less than {size(bound)}: Ray puts its object store on a "
                               f"disk; start the container with --shm-size={bound / 2**30:.0f}g or more")  # fmt: skip
        return "ok", f"/dev/shm has {size(disk.total)}, at least {size(bound)} are wanted"

    yield from grouped("shared memory", nodes, verdict)


def object_store(nodes: Nodes, wanted: float) -> Iterator[Finding]:
    total = sum(offer.store for _, offer in nodes)
    text = f"{size(total)} in all, batches read ahead take up to {size(wanted)}"
    if total < wanted:
        yield Finding("warning", "object store", f"{text}: less is read ahead; lower data.read_ahead or data.tiles_per_task, "
                      "or start Ray with more --object-store-memory")  # fmt: skip
    else:
        yield Finding("ok", "object store", text)


def ray_disk(nodes: Nodes, use: str, *, everywhere: bool) -> Iterator[Finding]:
    """Whether Ray can log, and spill what its object store does not hold; `everywhere`: every machine has such a disk."""

    def verdict(machine: Machine, _: Offer) -> Verdict | None:
        disk = machine.disks.get(use)
        if disk is None:
            return ("warning", "not checked: Ray does not tell where it is; see that its disk has room") if everywhere else None
        text = f"{size(disk.free)} of {size(disk.total)} free at {disk.path}"
        advice = "free some, or start Ray with --temp-dir and --object-spilling-directory on a larger disk"
        if disk.free < (1 - SPILL_SHARE) * disk.total:
            return "warning", f"{text}: more than {SPILL_SHARE:.0%} full, where Ray spills nothing; {advice}"
        if disk.free < LOGS:
            return "warning", f"{text}, logs and what Ray spills may take {size(LOGS)}; {advice}"
        return "ok", f"{text}, at least {size(LOGS)} are wanted"

    yield from grouped(use, nodes, verdict)


def disk(subject: str, nodes: Nodes, use: str, wanted: float, what: str) -> Iterator[Finding]:
    """Whether a disk that the run fills has room for what it writes there."""

    def verdict(machine: Machine, _: Offer) -> Verdict:
        found = machine.disks.get(use)
        if found is None:
            return "failed", f"there is no place for {what}, which take {size(wanted)}; set TMPDIR to a directory with room"
        text = f"{size(found.free)} free at {found.path}, {what} take {size(wanted)}"
        return ("ok", text) if found.free >= wanted else ("failed", f"{text}; free some, or name another place")

    yield from grouped(subject, nodes, verdict)


def sharing(nodes: Nodes, folder: str, done: str) -> Iterator[Finding]:
    """Whether all machines have the same directory; done: what they all do there, as "seen and written"."""

    def verdict(machine: Machine, _: Offer) -> Verdict:
        reason = machine.unshared.get(folder)
        if reason is None:
            return "warning", f"{folder}: not checked, for this command cannot use it"
        return ("failed", f"{folder}: {reason}") if reason else ("ok", f"{folder} is {done} by all")

    if len(nodes) > 1 or any(machine.unshared.get(folder) for machine, _ in nodes):
        yield from grouped("shared directory", nodes, verdict)


def clocks(nodes: Nodes) -> Iterator[Finding]:
    if len(nodes) < 2:
        return
    silent: Verdict = "warning", "not checked: no answer when asked for the time; look at the machine's load and network"
    yield from grouped("clocks", nodes, lambda _, offer: silent if offer.skew is None else None)
    known = [(abs(offer.skew), machine.name) for machine, offer in nodes if offer.skew is not None]
    if not known:
        return
    skew, name = max(known)
    text = f"at most {skew:.3f} s from this machine's ({name})"
    if skew < SKEW_WARNING:
        yield Finding("ok", "clocks", f"{text}, {SKEW_WARNING:g} s are allowed")
    else:
        level: Level = "failed" if skew >= SKEW_FAILURE else "warning"
        yield Finding(
            level, "clocks", f"{text}, {SKEW_WARNING:g} s are allowed, and a store refuses {SKEW_FAILURE:g}; start NTP"
        )
