"""How many workers a cluster holds: places on its machines, a CPU left to data tasks, divisors of the global batch, others."""

from typing import Any

import pytest
from ray.exceptions import RpcError

from mmearth_ray.config import load
from mmearth_ray.errors import UsageError
from mmearth_ray.train import room
from mmearth_ray.train.room import Amount, Cluster, fitting, lacking, room_of, wait_for_room

NOBODY = Amount(0, 0)


def cluster(*nodes: tuple[float, float], free: tuple[float, float] | None = None, store: float = 1e9) -> Cluster:
    amounts = tuple(Amount(*node) for node in nodes)
    return Cluster(amounts, Amount(*(free or map(sum, zip(*nodes, strict=True)))), store)


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"),
    [
        ([(4, 0)], False, 3),  # one is left to data tasks
        ([(2, 0), (2, 0)], False, 3),
        ([(1.5, 0), (1.5, 0)], False, 2),  # a worker's CPU is one machine's
        ([(0, 0), (8, 4)], True, 4),
        ([(2, 4), (8, 0)], True, 2),  # every GPU needs a CPU beside it
        ([(4, 4)], True, 3),
        ([(4, 0)], True, 0),
    ],
)
def test_workers_need_places_and_leave_a_cpu(nodes: list[tuple[float, float]], gpus: bool, expected: int) -> None:
    assert cluster(*nodes).holds(gpus, NOBODY) == expected


def test_what_others_take_is_not_there() -> None:
    machines = cluster((8, 4), free=(3, 1))
    assert machines.taken == (5, 3)
    assert machines.holds(False, machines.taken) == 2
    assert machines.holds(True, machines.taken) == 1


@pytest.mark.parametrize(("cpus", "expected"), [(2, 0), (3, 2), (4, 3), (6, 4), (7, 6), (14, 12), (99, 12)])
def test_only_numbers_of_the_range_that_divide_the_global_batch_fit(cpus: int, expected: int) -> None:
    config = load(["train.global_batch=24", "train.micro_batch=2", "train.workers=[2,12]"])
    assert fitting(config, cluster((cpus, 0)), False, NOBODY) == expected


def test_a_worker_s_share_is_what_the_others_and_the_workers_leave() -> None:
    found = room_of(cluster((8, 0), free=(6, 0), store=1200), 2)
    assert found.workers == 2
    assert found.share.cpus == 2
    assert found.share.object_store_bytes == 300
    assert found.others == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "machines", "gpus", "message"),
    [
        (["train.workers=2"], cluster((2, 0)), False, "train.workers=2 would leave no CPU for data tasks: the cluster has 2, "
         "training needs at least 3"),
        (["train.workers=[2,4]", "train.gpus=true"], cluster((9, 1)), True, r"train.gpus=true needs a GPU for each of "
         r"train.workers=\[2,4\], the cluster has 1"),
        (["train.workers=4", "model.backend=triton"], cluster((9, 1)), True, "model.backend=triton needs a GPU for each"),
        (["train.workers=2"], cluster((8, 0), free=(2, 0)), False, "only 2 CPUs of the cluster are free, this run needs at "
         "least 3"),
        (["train.workers=2", "train.gpus=true"], cluster((8, 8), free=(2, 1)), True, "only 2 CPUs and 1 GPUs of the cluster"),
    ],
)  # fmt: skip
def test_what_is_lacking_is_named(arguments: list[str], machines: Cluster, gpus: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        raise UsageError(lacking(load(arguments), machines, gpus))


class Clock:
    """A clock that only sleeping moves, and the cluster as it changes with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: tuple[float, Cluster | Exception]) -> None:
        self.now, self.states = 0.0, states
        monkeypatch.setattr(room.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(room.time, "sleep", self.sleep)
        monkeypatch.setattr(room, "cluster_now", self.look)

    def look(self) -> Cluster:
        found = [state for since, state in self.states if since <= self.now][-1]
        if isinstance(found, Exception):
            raise found
        return found

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_room_for_all_is_taken_at_once_and_room_for_some_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["train.workers=[1,4]"])
    clock = Clock(monkeypatch, (0, cluster((5, 0))))
    found = wait_for_room(config, gpus=False)
    assert found
    assert (found.workers, clock.now) == (4, 0)
    clock = Clock(monkeypatch, (0, cluster((1, 0))), (5, cluster((3, 0))), (8, cluster((3, 0), free=(2, 0))))
    found = wait_for_room(config, gpus=False)
    assert found
    assert found.workers == 1
    assert clock.now == 8 + room.SETTLE_SECONDS


def test_no_room_ends_with_what_is_lacking_after_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch, (0, cluster((2, 0))))
    with pytest.raises(UsageError, match=r"train\.workers=2 would leave no CPU"):
        wait_for_room(load(["train.workers=2", "train.wait=30"]), gpus=False)
    assert clock.now == 30
    assert capsys.readouterr().err.count("waiting up to 30 s for room") == 1


def test_what_a_group_has_just_given_up_is_waited_for_though_nobody_wants_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["train.workers=[1,2]", "train.wait=0"])
    held, gone = cluster((4, 0), free=(1, 0)), cluster((2, 0))  # a lost machine is missed late, processes end late
    clock = Clock(monkeypatch, (0, held), (3, gone), (9, cluster((2, 0), (2, 0))))
    found = wait_for_room(config, gpus=False, again=True)
    assert found
    assert (found.workers, clock.now) == (2, 9)
    clock = Clock(monkeypatch, (0, held))
    with pytest.raises(UsageError, match="only 1 CPUs of the cluster are free"):
        wait_for_room(config, gpus=False, again=True)
    assert clock.now == room.RELEASE_SECONDS
    clock = Clock(monkeypatch, (0, held))
    with pytest.raises(UsageError, match="only 1 CPUs of the cluster are free"):
        wait_for_room(config, gpus=False)
    assert clock.now == 0


FAULT = RpcError("the control store\ndoes not answer", 14)


@pytest.mark.parametrize("fault", [FAULT, ConnectionError("reset"), RuntimeError("no such table")])
def test_a_cluster_that_does_not_answer_has_no_room_yet(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["train.workers=[1,2]", "train.wait=40"])
    clock = Clock(monkeypatch, (0, fault), (20, cluster((2, 0))), (25, fault), (27, cluster((2, 0))))
    found = wait_for_room(config, gpus=False)
    assert found
    assert found.workers == 1
    assert clock.now == 27 + room.SETTLE_SECONDS  # what lasted before the fault does not count


def test_a_cluster_that_never_answers_ends_the_waiting_with_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch, (0, FAULT))
    said = "the Ray cluster does not answer (does not answer); run the same command again once it does"
    with pytest.raises(UsageError) as caught:
        wait_for_room(load(["train.workers=2", "train.wait=30"]), gpus=False)
    assert str(caught.value) == said
    assert clock.now == 30
    assert capsys.readouterr().err == f"waiting up to 30 s for room: {said}\n"


def test_mistakes_of_our_own_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, (0, TypeError("a mistake")))
    with pytest.raises(TypeError):
        wait_for_room(load(["train.workers=2", "train.wait=30"]), gpus=False)


def test_a_demand_that_does_not_arrive_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def request(bundles: list[dict[str, float]]) -> None:
        asked.append(bundles)
        raise FAULT

    monkeypatch.setattr(room, "request_resources", request)
    room.ask_for(2, gpus=True)
    room.ask_for(0, gpus=True)
    assert asked == [[{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 1}], []]


def test_ray_still_tells_which_machines_are_draining() -> None:
    """Without its function a notice would go unseen: `draining` has no other way to know."""
    from ray._private.state import GlobalState, available_resources_per_node, state

    assert isinstance(state, GlobalState)
    assert callable(state.get_draining_nodes)
    assert callable(available_resources_per_node)


def test_machines_that_are_gone_or_about_to_be_taken_away_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(name: str, cpus: int, alive: bool = True) -> dict[str, Any]:
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": cpus / 4, "object_store_memory": cpus * 10.0}}

    bare = {"NodeID": "bare", "Alive": True, "Resources": {}}
    nodes = [node("stays", 4), node("leaves", 8), node("gone", 16, alive=False), bare]
    free = {"stays": 3, "leaves": 8, "bare": 0}
    monkeypatch.setattr(room.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(room, "free_on", lambda names: {"CPU": sum(free[name] for name in names)})
    for leaving, expected in ((set[str](), (12, 3, 11, 120)), ({"leaves"}, (4, 1, 3, 40)), ({"leaves", "gone"}, (4, 1, 3, 40))):
        monkeypatch.setattr(room, "draining", lambda leaving=leaving: leaving)
        found = room.cluster_now()
        assert (found.total.cpus, found.total.gpus, found.free.cpus, found.store) == expected
        assert found.free.gpus == 0


def test_waiting_ends_when_the_run_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, (0, cluster((2, 0))))
    assert wait_for_room(load(["train.workers=2"]), gpus=False, stopped=lambda: clock.now >= 3) is None
