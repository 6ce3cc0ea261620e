"""A Ray cluster of several nodes on this machine: real raylets, which a test adds and takes away."""

import subprocess
import sys
from pathlib import Path

from command import descendants, environment, free_address, kill_tree, title_of, workers_of

FAST = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4", "RAY_AUTH_MODE": "token"}  # fmt: skip


class Nodes:
    """A Ray head without CPUs, and machines that join it: real raylets, each in a process group of its own."""

    def __init__(self) -> None:
        self.address = free_address()
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
        kill_tree(process)
        if process.stdout:
            process.stdout.close()

    def id_of(self, number: int) -> str:
        """Ray's name of a node, which its raylet was started with."""
        (found,) = {word.removeprefix("--node_id=") for child in descendants(self.processes[number].pid)
                    for word in title_of(child).split() if word.startswith("--node_id=")}  # fmt: skip
        return found

    def workers(self) -> list[int]:
        """The train workers on all nodes."""
        return [worker for process in self.processes for worker in workers_of(process.pid)]

    def close(self) -> None:
        for number in reversed(range(len(self.processes))):
            self.lose(number)
