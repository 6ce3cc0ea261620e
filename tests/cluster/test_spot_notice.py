"""The watcher of the cloud's notices: what it asks, when it has Ray drain its node, and that worker nodes start it."""

import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from command import environment, kill, wait_for
from metadata_server import MetadataServer, metadata
from ray.scripts.scripts import drain_node

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "spot_notice.py"


class Watched:
    """The watcher of a cloud; its `ray` is one that refuses the first time, and writes down how it was called."""

    def __init__(self, cloud: str, folder: Path, server: MetadataServer) -> None:
        self.calls = folder / "calls"
        folder.mkdir()
        (folder / "ray").write_text(f'#!/bin/sh\necho "$@" >> {self.calls}\ntest $(wc -l < {self.calls}) -gt 1\n')
        (folder / "ray").chmod(0o755)
        variables = environment() | server.environment | {"PATH": f"{folder}:/usr/bin:/bin"}
        self.process = subprocess.Popen([sys.executable, SCRIPT, cloud], stderr=subprocess.PIPE, text=True, env=variables)


def test_a_notice_drains_the_node_once_ray_accepts_it_and_nothing_before(tmp_path: Path) -> None:
    seconds = {"aws": 120, "gcp": 30}
    with ExitStack() as stack:
        servers = {cloud: stack.enter_context(metadata()) for cloud in seconds}
        for server in servers.values():
            server.failures = 1
        watched = {cloud: Watched(cloud, tmp_path / cloud, server) for cloud, server in servers.items()}
        for each in watched.values():
            stack.callback(each.process.communicate)
            stack.callback(each.process.kill)
        for cloud, server in servers.items():
            wait_for(lambda server=server: server.asked >= 2, "two questions", watched[cloud].process)
            assert not watched[cloud].calls.exists()
            server.leaving = True
        for cloud, each in watched.items():
            assert each.process.wait(timeout=60) == 0
            assert each.process.stderr
            assert each.process.stderr.read() == "HTTPError: HTTP Error 503: Service Unavailable\n"
            first, second = each.calls.read_text().splitlines()
            assert first == second
            assert first.startswith("drain-node --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message=")
            assert first.endswith(f" --deadline-remaining-seconds={seconds[cloud]}")


def test_ray_has_the_command_with_these_options() -> None:
    options = {name for parameter in drain_node.params for name in parameter.opts}
    assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= options
    (reason,) = (parameter for parameter in drain_node.params if parameter.name == "reason")
    assert "DRAIN_NODE_REASON_PREEMPTION" in reason.type.choices  # pyright: ignore[reportAttributeAccessIssue]


def test_other_clouds_are_refused() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "azure"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: spot_notice.py aws|gcp\n")


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_worker_nodes_start_it_beside_ray_and_only_once(cloud: str, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text())
    assert config["file_mounts"]["/home/ray/spot_notice.py"] == "cluster/spot_notice.py"
    *_, start, watch = config["worker_start_ray_commands"]
    assert "ray start" in start
    assert f"python /home/ray/spot_notice.py {cloud} " in watch
    assert not any("spot_notice" in command for command in config["head_start_ray_commands"])
    note = tmp_path / "note"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$$ $@" >> {note}\nexec sleep 60\n')
    fake.chmod(0o755)
    here = watch.replace("/tmp/spot_notice", str(tmp_path / "watch"))
    variables = environment() | {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    def started(times: int) -> list[str]:
        """The words of the last watcher, after the command has run, until it has started so many; no more than these run."""
        deadline = time.monotonic() + 30
        while True:
            subprocess.run(["bash", "-c", f"({here})"], check=True, timeout=30, env=variables)
            time.sleep(0.3)
            lines = note.read_text().splitlines() if note.exists() else []
            if len(lines) >= times:
                assert len(lines) == times
                return lines[-1].split()
            assert time.monotonic() < deadline

    pid, *words = started(1)
    try:
        assert words == ["/home/ray/spot_notice.py", cloud]
        assert started(1)[0] == pid
    finally:
        kill(int(pid), signal.SIGKILL)
    kill(int(started(2)[0]), signal.SIGKILL)
