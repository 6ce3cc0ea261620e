"""The watcher of the cloud's notices: what it asks, when it has Ray drain its node, and that worker nodes start it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command import environment, kill, wait_for
from metadata_server import metadata
from ray.scripts.scripts import drain_node

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "spot_notice.py"


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 120), ("gcp", 30)])
def test_a_notice_drains_the_node_once_ray_accepts_it_and_nothing_before(cloud: str, seconds: int, tmp_path: Path) -> None:
    """Its `ray` is one that refuses the first time, and writes down how it was called."""
    calls = tmp_path / "calls"
    fake = tmp_path / "ray"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ntest $(wc -l < {calls}) -gt 1\n')
    fake.chmod(0o755)
    with metadata() as server:
        server.failures = 1
        variables = environment() | server.environment | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        watcher = subprocess.Popen([sys.executable, SCRIPT, cloud], stderr=subprocess.PIPE, text=True, env=variables)
        try:
            wait_for(lambda: server.asked >= 2, "two questions", watcher)
            assert not calls.exists()
            server.leaving = True
            assert watcher.wait(timeout=60) == 0
            said = watcher.stderr.read() if watcher.stderr else ""
        finally:
            watcher.kill()
            watcher.communicate()
    assert said == "HTTPError: HTTP Error 503: Service Unavailable\n"
    first, second = calls.read_text().splitlines()
    assert first == second
    assert first.startswith("drain-node --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message=")
    assert first.endswith(f" --deadline-remaining-seconds={seconds}")


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
        """The words of the last watcher, after the command has run once more; it has been started so many times."""
        subprocess.run(["bash", "-c", f"({here})"], check=True, timeout=30, env=variables)
        deadline = time.monotonic() + 30
        while not note.exists() or len(note.read_text().splitlines()) < times:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lines = note.read_text().splitlines()
        assert len(lines) == times
        return lines[-1].split()

    pid, *words = started(1)
    try:
        assert words == ["/home/ray/spot_notice.py", cloud]
        assert started(1)[0] == pid
    finally:
        kill(int(pid), signal.SIGKILL)
    kill(int(started(2)[0]), signal.SIGKILL)
