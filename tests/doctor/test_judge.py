"""Judging machines: every bound from both sides, and every line says the value, the bound and what to do."""

from dataclasses import replace

import pytest

from mmearth_ray.doctor import judge
from mmearth_ray.doctor.findings import Finding
from mmearth_ray.doctor.judge import Offer
from mmearth_ray.doctor.machine import Disk, Gpu, Machine
from mmearth_ray.plan.memory import Memory

L4 = Gpu("NVIDIA L4", 24 * 10**9, 8.9, "550.90")
NEEDS = Memory(weights=4e6, gradients=4e6, optimizer=8e6, buffers=0, activations=2e9)
HERE = Machine(
    "a", {"python": "3.11.7", "torch": "2.13.0"}, cores=8, memory=32 * 10**9, open_files=65536, gpus=(),
    disks={"run": Disk("/run", 10**12, 10**11)}, shared_memory=Disk("/dev/shm", 16 * 10**9, 10**9),
)  # fmt: skip
THERE = replace(HERE, name="b")
OFFER = Offer(cpus=8, gpus=0, store=9e9)


def one(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    return found[0]


def test_machines_alike_are_one_line_and_others_are_named() -> None:
    alike = list(judge.sizes([(HERE, OFFER), (THERE, OFFER)]))
    assert one(alike).text == "8 cores, 32.0 GB memory; Ray offers 8 CPUs and 9.0 GB object store (a, b)"
    differing = list(judge.sizes([(HERE, OFFER), (replace(THERE, cores=4), OFFER)]))
    assert [finding.text.split(",")[0] for finding in differing] == ["8 cores", "4 cores"]
    many = [(replace(HERE, name=str(number)), OFFER) for number in range(6)]
    assert one(list(judge.sizes(many))).text.endswith("(0, 1, 2, 3 and 2 more)")


def test_nodes_with_other_versions_are_named_with_both() -> None:
    same = one(list(judge.versions([(HERE, OFFER), (THERE, OFFER)], HERE.versions)))
    assert same == ("ok", "versions", "python 3.11.7, torch 2.13.0")
    other = replace(THERE, versions={"python": "3.11.7", "torch": "2.12.1"})
    found = one(list(judge.versions([(HERE, OFFER), (other, OFFER)], HERE.versions)))
    assert found.level == "failed"
    assert found.text == "torch 2.12.1 on b, 2.13.0 here; install requirements.lock on every machine"
    without = replace(THERE, versions={"python": "3.11.7"})
    assert "torch none on b" in one(list(judge.versions([(without, OFFER)], HERE.versions))).text


@pytest.mark.parametrize(("limit", "level"), [(8191, "warning"), (8192, "ok"), (-1, "ok")])
def test_open_files(limit: int, level: str) -> None:
    found = one(list(judge.open_files([(replace(HERE, open_files=limit), OFFER)])))
    assert found.level == level
    if level == "warning":
        assert found.text.startswith("at most 8,191, Ray recommends 8,192; raise the hard limit")


@pytest.mark.parametrize(
    ("gpus", "offered", "wanted", "precision", "level", "words"),
    [
        ((), 0, False, "fp32", "ok", "none"),
        ((), 4, True, "fp32", "failed", "none, but Ray offers 4"),
        ((), 4, False, "fp32", "warning", "none, but Ray offers 4"),
        ((L4,) * 4, 4, True, "bf16", "ok", "4 x NVIDIA L4, 24.0 GB, compute capability 8.9, driver 550.90, bf16"),
        ((L4,) * 3, 4, True, "fp32", "failed", "Ray offers 4: start it with the number that is there"),
        ((L4, L4._replace(name="NVIDIA A10")), 2, True, "fp32", "warning", "not all are of that kind"),
        ((L4._replace(capability=7.5),), 1, True, "bf16", "warning", "no bf16; train.precision=bf16 is emulated"),
        ((L4._replace(capability=7.5),), 1, True, "fp32", "ok", "no bf16"),
        ((L4,), 1, False, "fp32", "warning", "the run trains on CPUs"),
    ],
)
def test_gpus(gpus: tuple[Gpu, ...], offered: int, wanted: bool, precision: str, level: str, words: str) -> None:
    found = one(list(judge.gpus([(replace(HERE, gpus=gpus), Offer(8, offered))], wanted, precision)))
    assert (found.level, words in found.text) == (level, True), found


def memory(nodes: judge.Nodes, on_gpus: bool, taken: Memory, workers: int, *, offload: bool = False) -> Finding:
    return one(list(judge.memory(nodes, on_gpus, taken, workers, offload=offload)))


def test_memory_of_workers_on_a_machine_and_on_a_gpu() -> None:
    node = (HERE, OFFER)
    assert memory([node], False, NEEDS, 2).level == "ok"
    large = replace(NEEDS, weights=12e9 - 2.012e9)  # two of them are 24 GB; 32 less the object store's 9 are 23
    found = memory([node], False, large, 2)
    assert found.level == "failed"
    assert found.text.startswith("a worker takes 12.0 GB, 2.0 GB of it for activations; ")
    assert "2 workers on 32.0 GB less 9.0 GB object store; use train.engine=zero3" in found.text
    assert memory([node], False, large, 1).level == "ok"
    assert memory([node], False, replace(NEEDS, activations=12e9), 2).level == "failed"  # they count as all else does
    gpus = (replace(HERE, gpus=(L4,)), Offer(8, 1, 9e9))
    assert memory([gpus], True, large, 2).level == "ok"
    found = memory([node, gpus], True, replace(NEEDS, weights=24e9), 2)
    assert found.level == "failed"
    assert "a GPU has 24.0 GB, 10% of it for CUDA" in found.text
    assert memory([gpus], True, Memory(1e9, 1e9, 2e9, 1e9, 16.6e9), 1).level == "ok"  # 21.6 GB are 90 %
    assert memory([gpus], True, Memory(1e9, 1e9, 2e9, 1e9, 16.7e9), 1).level == "failed"
    unknown = (replace(HERE, gpus=(L4._replace(memory=0),)), Offer(8, 1))
    assert memory([unknown], True, large, 1).level == "ok"


def test_what_is_offloaded_counts_for_the_host() -> None:
    offloading = Memory(weights=6e9, gradients=6e9, optimizer=12e9, buffers=0, activations=6e9)
    gpus = (replace(HERE, gpus=(L4,)), Offer(8, 1, 9e9))
    found = memory([gpus], True, offloading, 1, offload=True)
    assert found.level == "ok"
    assert "a worker takes 18.0 GB, " in found.text
    assert "train.offload takes 12.0 GB of the host for each: 1 worker on 32.0 GB less 9.0 GB object store" in found.text
    assert memory([gpus], True, offloading, 1).level == "failed"  # 30 of 24 GB
    assert memory([(gpus[0], Offer(8, 2, 9e9))], True, offloading, 2, offload=True).level == "failed"  # 24 of 23 GB
    assert memory([(HERE, OFFER)], False, offloading, 1, offload=True).level == "failed"  # CPUs share the host's memory


def test_a_machine_that_takes_no_worker_needs_no_memory_for_one() -> None:
    head = (replace(HERE, name="head", memory=10**9), Offer(cpus=0, gpus=0, store=3e8))
    found = memory([head, (THERE, OFFER)], False, NEEDS, 2)
    assert (found.level, "2 workers on 32.0 GB" in found.text) == ("ok", True)
    gpus = (replace(THERE, gpus=(L4,)), Offer(8, 1, 9e9))
    assert memory([head, gpus], True, NEEDS, 1).level == "ok"
    assert memory([head], False, NEEDS, 1).text == "not checked: no machine offers CPUs to workers"
    assert memory([(HERE, OFFER)], True, NEEDS, 1) == ("warning", "memory", "not checked: no machine offers a GPU to workers")


def test_shared_memory_must_hold_the_object_store() -> None:
    assert one(list(judge.shared_memory([(HERE, OFFER)]))).level == "ok"
    container = replace(HERE, shared_memory=Disk("/dev/shm", 64 << 20, 0))
    found = one(list(judge.shared_memory([(container, OFFER)])))
    assert found.level == "warning"
    assert "/dev/shm has 67.1 MB, less than 9.0 GB" in found.text
    assert "--shm-size=8g" in found.text
    assert "less than 1.1 GB" in one(list(judge.shared_memory([(container, Offer())]))).text
    assert one(list(judge.shared_memory([(replace(HERE, shared_memory=None), OFFER)]))).level == "ok"


@pytest.mark.parametrize(("store", "level"), [(0.4e9, "warning"), (0.5e9, "ok")])
def test_the_object_stores_count_together(store: float, level: str) -> None:
    assert one(list(judge.object_store([(HERE, Offer(store=store)), (THERE, Offer(store=store))], 1e9))).level == level


@pytest.mark.parametrize(
    ("total", "free", "level"),
    [(10**12, 4.9e10, "warning"), (10**12, 5.1e10, "ok"), (2e10, 4.9e9, "warning"), (2e10, 5e9, "ok")],
)
def test_the_disk_that_ray_writes_to(total: float, free: float, level: str) -> None:
    machine = replace(HERE, disks={"Ray's directory": Disk("/tmp", int(total), int(free))})
    assert one(list(judge.ray_disk([(machine, OFFER)], "Ray's directory", everywhere=True))).level == level


def test_a_machine_that_does_not_tell_its_disk_is_named_and_the_others_are_judged() -> None:
    knowing = replace(HERE, disks={"spilling": Disk("/tmp", 10**12, 10**9)})
    for nodes in ([(knowing, OFFER), (THERE, OFFER)], [(THERE, OFFER), (knowing, OFFER)]):
        found = one(list(judge.ray_disk(nodes, "spilling", everywhere=False)))
        assert (found.level, found.text.endswith("on a larger disk (a)")) == ("warning", True)
        found = sorted(judge.ray_disk(nodes, "spilling", everywhere=True), key=lambda finding: finding.text)
        assert [finding.level for finding in found] == ["warning", "warning"]
        assert found[1].text == "not checked: Ray does not tell where it is; see that its disk has room (b)"


def test_a_full_disk_is_named_with_what_the_run_takes() -> None:
    assert one(list(judge.disk("disk", [(HERE, OFFER)], "run", 1e11, "checkpoints"))).level == "ok"
    found = one(list(judge.disk("disk", [(HERE, OFFER)], "run", 1.001e11, "checkpoints")))
    assert found.level == "failed"
    assert found.text == "100.0 GB free at /run, checkpoints take 100.1 GB; free some, or name another place"


def test_a_directory_that_is_not_shared_fails_on_the_machines_concerned() -> None:
    here, there = (replace(machine, unshared={"/run": ""}) for machine in (HERE, THERE))
    assert not list(judge.sharing([(here, OFFER)], "/run", "seen"))
    assert one(list(judge.sharing([(here, OFFER), (there, OFFER)], "/run", "seen"))).level == "ok"
    lacking = replace(THERE, unshared={"/run": "does not see it"})
    found = list(judge.sharing([(here, OFFER), (lacking, OFFER)], "/run", "seen"))
    assert found[1] == ("failed", "shared directory", "/run: does not see it (b)")
    assert one(list(judge.sharing([(lacking, OFFER)], "/run", "seen"))).level == "failed"  # not this command's machine


def test_a_directory_that_was_not_tried_is_not_said_to_be_shared() -> None:
    found = one(list(judge.sharing([(HERE, OFFER), (THERE, OFFER)], "/run", "seen")))
    assert found == ("warning", "shared directory", "/run: not checked, for this command cannot use it (a, b)")


@pytest.mark.parametrize(("skew", "level"), [(0.9, "ok"), (-1.1, "warning"), (901.0, "failed")])
def test_clocks(skew: float, level: str) -> None:
    assert not list(judge.clocks([(HERE, OFFER)]))
    found = one(list(judge.clocks([(HERE, OFFER), (THERE, Offer(skew=skew))])))
    assert found.level == level
    assert "(b)" in found.text


def test_a_machine_that_does_not_tell_its_time_is_named_and_the_others_are_judged() -> None:
    found = list(judge.clocks([(HERE, OFFER), (THERE, Offer(skew=None))]))
    assert [(finding.level, finding.text.split(":")[0][:11]) for finding in found] == [
        ("warning", "not checked"), ("ok", "at most 0.0"),
    ]  # fmt: skip
    assert found[0].text.endswith("(b)")
    silent = [(replace(HERE, name=name), Offer(skew=None)) for name in "ab"]
    assert one(list(judge.clocks(silent))).level == "warning"
