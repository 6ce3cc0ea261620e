"""Joining a cluster that is not there is answered at once; a Ray of our own is nobody else's."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import descendants, free_address

from mmearth_ray import cluster
from mmearth_ray.cluster import join_or_start
from mmearth_ray.errors import DataError, UsageError


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = free_address()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=f"cannot join the Ray cluster at {address}"):
        join_or_start(1)


OWN = """
import sys
from mmearth_ray import cluster
from mmearth_ray.cluster import join_or_start
join_or_start(2)
import ray
ray.get(ray.remote(lambda: 1).remote())
print("ready", flush=True)
sys.stdin.read()
"""


def listening(pid: int) -> set[str]:
    """Addresses on which a process listens, as the kernel writes them (hexadecimal, host byte order)."""
    links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    inodes = {found.group(1) for link in links if (found := re.fullmatch(r"socket:\[(\d+)\]", link))}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_ray_of_our_own_listens_on_this_machine_only() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", OWN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        found = set().union(*(listening(pid) for pid in [process.pid, *descendants(process.pid)]))
        process.communicate("")
    assert found
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_ray_that_does_not_come_up_is_started_again_and_then_given_up_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, object]] = []

    def busy(**options: object) -> None:
        started.append(options)
        if len(started) != 2:
            raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr(cluster.ray, "init", busy)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    join_or_start(3)
    assert [options["num_cpus"] for options in started] == [3, 3]
    started[:] = [{}, {}]
    with pytest.raises(DataError, match=r"^Ray did not start on this machine in 3 attempts \(The current node timed out "):
        join_or_start(3)


def test_what_a_ray_that_did_not_come_up_left_running_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, mine = "import subprocess; subprocess.run(['sleep', '600'])", set(descendants(os.getpid()))
    started: list[int] = []

    def busy(**options: object) -> None:
        assert set(descendants(os.getpid())) == mine | {other.pid}
        started.append(subprocess.Popen([sys.executable, "-c", parents]).pid)
        while len(descendants(os.getpid())) < len(mine) + 3:
            time.sleep(0.05)
        raise RuntimeError("no")

    monkeypatch.setattr(cluster.ray, "init", busy)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with subprocess.Popen(["sleep", "600"]) as other:
        with pytest.raises(DataError, match="in 3 attempts"):
            join_or_start(3)
        assert len(started) == 3
        assert set(descendants(os.getpid())) == mine | {other.pid}
        other.kill()


def test_settings_that_ray_refuses_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        assert not started
        started.append(options)
        raise ValueError("RAY_x is\nno number")

    started: list[dict[str, object]] = []
    monkeypatch.setattr(cluster.ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(DataError, match=r"^Ray does not start on this machine \(RAY_x is no number\)$"):
        join_or_start(3)
