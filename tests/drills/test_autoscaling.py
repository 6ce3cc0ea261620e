"""Autoscaling without a cloud: Ray's own autoscaler starts and ends the node types of `cluster/aws.yaml`.

Its fake provider makes every node a real raylet on this machine.  GPUs are only declared: a run that asks for them gets its
nodes, but cannot train there.  So the run that trains has the same types without GPUs, and with a sixteenth of the CPUs.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import SMALL, descendants, environment, free_address, kill, kill_tree, metrics, pretraining, title_of, wait_for
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG
from tiny_earth import make_data_set

pytestmark = [pytest.mark.drill, pytest.mark.long]
CLUSTER = Path(__file__).parents[2] / "cluster"
LAUNCHER: dict[str, Any] = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
STEPS = 12
NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
STORE = 80_000_000
"""Bytes of a node's object store, the least that Ray takes being 75 MiB."""


class Cluster:
    """A head that scales; `types` are what it may start, by name: resources, min_workers, max_workers."""

    def __init__(self, types: dict[str, dict[str, Any]]) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="scale-", dir="/tmp"))  # Ray's sockets are in it: a path must stay short
        self.address = free_address()
        (self.home / "cluster.json").write_text(json.dumps(self.config(types)))
        own = {
            "RAY_FAKE_CLUSTER": "1", NODE_ID: FAKE_HEAD_NODE_ID, "RAY_AUTH_MODE": "token",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_AUTOSCALER_UTILIZATION_SCORER": "spot_first.score", "PYTHONPATH": str(CLUSTER),
            "RAY_prestart_worker_first_driver": "0",  # no 48 idle processes for the 48 CPUs of a node
        }  # fmt: skip
        ray = Path(sys.executable).with_name("ray")
        self.head = subprocess.Popen(
            [ray, "start", "--head", "--block", f"--port={self.address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1",
             "--num-cpus=0", "--num-gpus=0", f"--object-store-memory={STORE}", f"--temp-dir={self.home}",
             "--disable-usage-stats", "--include-dashboard=false", f"--autoscaling-config={self.home / 'cluster.json'}"],
            stdout=(self.home / "log").open("w"), stderr=subprocess.STDOUT, text=True, env=environment() | own,
        )  # fmt: skip

    def started(self) -> bool:
        said = (self.home / "log").read_text()
        assert self.head.poll() is None, said
        return "--block" in said

    def config(self, types: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The launcher's file for the fake provider: its node types, its limits, nodes that are idle for 15 s go."""
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        kept = ("max_workers", "upscaling_speed")
        provider = {"type": "fake_multinode", "gcs_address": self.address, "use_node_id_as_ip": True,
                    "disable_node_updaters": True, "disable_launch_config_check": True}  # fmt: skip
        return {
            **BASE_READONLY_CONFIG, **{name: LAUNCHER[name] for name in kept}, "idle_timeout_minutes": 0.25,
            "provider": provider, "head_node_type": FAKE_HEAD_NODE_TYPE,
            "available_node_types": {FAKE_HEAD_NODE_TYPE: head, **types},
        }  # fmt: skip

    def nodes(self) -> Counter[str]:
        """How many nodes of each type are running beside the head, by the environments of their raylets."""
        found: set[tuple[str, str]] = set()
        for pid in descendants(self.head.pid):
            if "/raylet/raylet " in title_of(pid):  # or a process that it is just starting
                with suppress(OSError):
                    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
                    variables = {name: value for name, _, value in (word.partition("=") for word in words)}
                    found.add((variables[NODE_ID], variables.get("RAY_NODE_TYPE_NAME", FAKE_HEAD_NODE_TYPE)))
        assert (FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE) in found, (self.home / "log").read_text()
        return Counter(kind for node, kind in found if node != FAKE_HEAD_NODE_ID)

    def close(self) -> None:
        """End the processes of this cluster, and no others."""
        kill_tree(self.head)
        shutil.rmtree(self.home, ignore_errors=True)


@contextmanager
def scaling(change: Callable[[dict[str, float]], dict[str, float]]) -> Iterator[Cluster]:
    """A cluster of the launcher's node types, with the resources of each changed."""
    types = {
        name: {"resources": change(given["resources"]) | {"object_store_memory": STORE}, "node_config": {},
               "min_workers": given["min_workers"], "max_workers": given["max_workers"]}
        for name, given in LAUNCHER["available_node_types"].items() if name != LAUNCHER["head_node_type"]
    }  # fmt: skip
    cluster = Cluster(types)
    try:
        wait_for(cluster.started, "the head's start", cluster.head)
        yield cluster
    finally:
        cluster.close()


def test_workers_with_gpus_bring_up_the_nodes_that_hold_them_and_the_nodes_go_again(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=40, size=40).directory
    with scaling(lambda resources: resources) as cluster:
        assert cluster.nodes() == {}
        asked = (
            f"run.address={cluster.address}",
            "train.gpus=true",
            "train.workers=5",
            "train.wait=120",
            "train.global_batch=20",
            "model.image_size=32",
            f"data.shards={data}",
            f"run.directory={tmp_path}/run",
        )
        output = (tmp_path / "doctor.txt").open("w")
        doctor = subprocess.Popen(
            [sys.executable, "-m", "mmearth_ray.doctor", *asked], stdout=output, stderr=output, text=True, env=environment()
        )
        try:
            wait_for(lambda: cluster.nodes()["train_spot"] == 2, "two nodes of four GPUs", doctor)
            assert cluster.nodes() == {"train_spot": 2}
            assert doctor.wait(timeout=300) == 1  # there are no GPUs
        finally:
            kill(doctor.pid, signal.SIGKILL)
            doctor.wait()
            output.close()
        said = (tmp_path / "doctor.txt").read_text()
        assert "ok       room             5 workers with a GPU each" in said
        assert "none, but Ray offers 4; install NVIDIA's driver" in said
        assert "sees no GPU on " in said
        wait_for(lambda: cluster.nodes() == {}, "the end of the idle nodes", cluster.head)


def test_a_run_brings_up_what_its_workers_and_data_tasks_need_trains_and_lets_it_go(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=64, size=40).directory
    run, workers = tmp_path / "run", 3
    with scaling(lambda resources: {"CPU": resources["CPU"] // 16}) as cluster:
        limits = {name: given.get("max_workers", 0) for name, given in LAUNCHER["available_node_types"].items()}
        cpus = {"train_spot": 3, "train_on_demand": 3, "data": 1}
        asked = (f"run.address={cluster.address}", "train.gpus=false", f"train.workers={workers}", "train.wait=180",
                 "train.global_batch=12", f"train.steps={STEPS}", "train.ledger=true", "model.targets=[aster]",
                 "validate.tiles=0")  # fmt: skip
        seen: Counter[str] = Counter()
        with pretraining(*SMALL, *asked, f"data.shards={data}", f"run.directory={run}") as process:
            wait_for(lambda: len(metrics(run)) >= 1, "the first step", process)
            while process.poll() is None:
                seen |= cluster.nodes()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
            assert process.stdout
            assert process.returncode == 0, process.stdout.read()
        assert seen["train_spot"] >= 1  # the first choice for workers, before on-demand nodes
        assert sum(cpus[name] * count for name, count in seen.items()) >= workers + 1, seen
        assert all(count <= limits[name] for name, count in seen.items()), seen
        assert [entry["step"] for entry in metrics(run)] == list(range(1, STEPS + 1))
        lines = [json.loads(line) for line in (run / "ledger" / "rank-2.jsonl").read_text().splitlines()]
        assert [line["world"] for line in lines] == [workers] * STEPS
        wait_for(lambda: cluster.nodes() == {}, "the end of the idle nodes", cluster.head)
