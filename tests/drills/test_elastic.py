"""A cluster of several nodes on this machine that loses one and gains one: the run goes on with what there is."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import SMALL, descendants, environment, kill, ledger, losses, metrics, pretrain, pretraining, wait_for
from tiny_earth import make_data_set

pytestmark = pytest.mark.drill
STEPS = 60
RUN = (*SMALL, f"train.steps={STEPS}", "train.ledger=true", "checkpoint.every=5", "validate.tiles=0")
FAST = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4", "RAY_AUTH_MODE": "token"}  # fmt: skip


class Nodes:
    """A Ray head without CPUs, and machines that join it: real raylets, each in a process group of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.processes: list[subprocess.Popen[str]] = []
        self.add("--head", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0", "--include-dashboard=false")

    def add(self, *arguments: str) -> int:
        """Start a node; returns its number."""
        own = arguments or (f"--address={self.address}", "--num-cpus=2")
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1", *own]
        process = subprocess.Popen(
            [*command, "--disable-usage-stats", "--object-store-memory=200000000"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment() | FAST,
        )  # fmt: skip
        self.processes.append(process)
        assert process.stdout
        for line in process.stdout:
            if "--block" in line:  # the last lines of a start that has gone well
                return len(self.processes) - 1
        raise AssertionError(f"a node did not start: {process.wait()}")

    def lose(self, number: int) -> None:
        """Take a machine away without a word."""
        process = self.processes[number]
        for pid in [*descendants(process.pid), process.pid]:
            kill(pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()

    def close(self) -> None:
        for number in reversed(range(len(self.processes))):
            self.lose(number)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.mark.long
def test_a_run_goes_on_with_fewer_workers_and_grows_again(nodes: Nodes, tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=90, size=40).directory
    alone = tmp_path / "alone"
    done = pretrain(*RUN, f"data.shards={data}", f"run.directory={alone}", "train.workers=2")
    assert done.returncode == 0, done.stderr

    nodes.add()
    second, run = nodes.add(), tmp_path / "run"
    elastic = (f"run.address={nodes.address}", "train.workers=[1,2]", "train.wait=120", "train.hang_timeout=60")

    def worlds() -> list[int]:
        path = run / "ledger" / "rank-0.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split('"world": ')[1].split(",")[0]) for line in lines if line.endswith("}")]

    with pretraining(*RUN, f"data.shards={data}", f"run.directory={run}", *elastic) as process:
        wait_for(lambda: len(metrics(run)) >= 8, "step 8", process)
        assert set(worlds()) == {2}
        nodes.lose(second)
        wait_for(lambda: worlds()[-1:] == [1] and len(worlds()) >= 15, "going on with one worker", process)
        nodes.add()
        wait_for(lambda: worlds()[-1:] == [2], "growing to two workers again", process)
        assert process.wait(timeout=300) == 0
        output = process.stdout.read() if process.stdout else ""
    assert "workers were lost" in output
    assert "going on with 1 worker instead of 2" in output
    assert "going on with 2 workers instead of 1" in output
    assert ledger(run) == ledger(alone)
    assert [entry["step"] for entry in metrics(run)] == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
