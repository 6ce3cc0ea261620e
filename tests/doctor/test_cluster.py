"""Groups of actors in a real Ray: one that does not end is given up and its processes go."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from command import descendants, title_of
from ray._private.worker import global_worker

from mmearth_ray.cluster import join_or_start
from mmearth_ray.doctor import cluster
from mmearth_ray.doctor.cluster import RAY_DIRECTORY, add_up, leave, look_around, named, skews
from mmearth_ray.doctor.group import Member
from mmearth_ray.doctor.machine import Shared, Wanted, digest_of
from mmearth_ray.errors import DataError


@pytest.fixture(scope="module", autouse=True)
def own_ray() -> Iterator[None]:
    join_or_start(4, "local")
    yield
    leave()


def test_a_group_that_hangs_is_given_up_by_name() -> None:
    class Stuck(Member):
        def reduce(self, size: int = 0, times: int = 0) -> float:
            if self.rank == 1:
                time.sleep(600)
            return 0.0

    before = ray.available_resources()["CPU"]
    with pytest.raises(DataError, match=r"^worker 1 on 127.0.0.1 did not end the all-reduce within 30 s; check firewalls"):
        add_up(2, gpus=False, size=1 << 20, seconds=30, kind=Stuck)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == before
    assert not [pid for pid in descendants(os.getpid()) if "Stuck" in title_of(pid)]


def test_no_place_for_the_workers_is_said() -> None:
    with pytest.raises(DataError, match="the cluster had no place for 9 workers within 1 s"):
        add_up(9, gpus=False, seconds=1)


def test_every_machine_is_looked_at(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_text("word")
    nodes, silent = look_around(Wanted({"run": tmp_path}, {"run": Shared(probe, digest_of(probe), written=True)}))
    ((machine, offer),) = nodes
    assert silent == {}
    assert machine.name == "127.0.0.1"
    assert machine.unshared == {"run": ""}
    assert offer.cpus == 4
    assert offer.store > 1e6
    assert offer.skew is not None
    assert abs(offer.skew) < 0.5
    assert global_worker.node is not None
    assert machine.disks[RAY_DIRECTORY].path == global_worker.node.get_session_dir_path()


def test_a_machine_that_answers_but_does_not_tell_its_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sleepy(cluster.Witness):
        def clock(self) -> float:
            time.sleep(60)
            return 0.0

    monkeypatch.setattr(cluster, "Witness", Sleepy)
    monkeypatch.setattr(cluster, "CLOCK_SECONDS", 0.2)
    nodes, silent = look_around(Wanted({}))
    assert silent == {}
    assert [(machine.name, offer.skew) for machine, offer in nodes] == [("127.0.0.1", None)]


def test_all_clocks_are_asked_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)

    def alone(witness: str) -> float | None:
        together.wait(30)  # for the two others
        return None if witness == "b" else 0.5

    monkeypatch.setattr(cluster, "_skew", alone)
    assert skews(["a", "b", "c"]) == [0.5, None, 0.5]
    assert skews([]) == []


def test_machines_are_named_by_address_and_by_id_where_several_share_one() -> None:
    nodes = [{"NodeManagerAddress": where, "NodeID": name * 10} for where, name in (("1.2", "a"), ("1.3", "b"), ("1.3", "c"))]
    assert list(named(nodes)) == ["1.2", "1.3 bbbbbb", "1.3 cccccc"]


def test_a_machine_that_does_not_answer_is_named() -> None:
    nodes, silent = look_around(Wanted({}), seconds=0.001)
    assert nodes == []
    assert silent == {"127.0.0.1": "no answer within 0.001 s"}
