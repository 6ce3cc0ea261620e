"""`ray job submit` to a cluster that the README's command started: success, failure, stop, and no way in without the token."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from command import SMALL, kill_tree, metrics, wait_for
from tiny_earth import make_data_set

pytest.importorskip("aiohttp_cors", reason="jobs need ray[default]")
pytestmark = pytest.mark.drill
ROOT = Path(__file__).parents[2]
RUN = (*SMALL, "validate.tiles=0", "train.workers=2", "model.targets=[aster]")


def documented(beginning: str) -> str:
    """The first command of the cluster's README that begins so."""
    (command,) = re.findall(rf"^({re.escape(beginning)}.*?)(?:\s+#.*)?$", (ROOT / "cluster" / "README.md").read_text(), re.M)[
        :1
    ]
    return command


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A head on ports of its own; what a user's shell has in its environment to reach it."""
    home = Path(tempfile.mkdtemp(prefix="jobs-", dir="/tmp"))  # Ray's sockets are in it: a path must stay short
    ports = free_ports(4)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    subprocess.run(documented("ray get-auth-token --generate"), shell=True, env=environment, check=True)
    flags = f"--block --num-cpus=4 --object-store-memory=300000000 --port={ports[0]} --dashboard-port={ports[1]} "
    more = f"--ray-client-server-port={ports[2]} --dashboard-agent-listen-port={ports[3]}"
    start = documented("RAY_AUTH_MODE=token RAY_JOB_STOP_WAIT_TIME_S=300 ray start --head")
    head = subprocess.Popen(
        f"exec env {start} {flags} {more}", shell=True, env=environment, text=True,
        stdout=(home / "log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_for(lambda: answers(ports[1]), "the dashboard", head)
        yield environment | {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
    finally:
        kill_tree(head)
        shutil.rmtree(home, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports below those that the system hands out by itself: Ray binds some of them only after many of those."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
    return found[:count]


def answers(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def submit(cluster: dict[str, str], *arguments: str, options: str = "") -> subprocess.CompletedProcess[str]:
    """The README's `ray job submit`, from the repository's root."""
    assert documented("ray job submit").split()[5:9] == ["--working-dir", ".", "--", "python"]
    command = ["ray", "job", "submit", *options.split(), "--working-dir", ".", "--", "python", "-m", "mmearth_ray.pretrain"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=560, check=False
    )


def ray(cluster: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ray", *arguments], env=cluster, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=48, size=40)
    return folder


def test_a_job_trains_shows_its_progress_and_ends_with_0(cluster: dict[str, str], shards: Path, tmp_path: Path) -> None:
    arguments = (*RUN, "train.steps=6", f"data.shards={shards}", f"run.directory={tmp_path}")
    done = submit(cluster, *arguments, options="--submission-id first")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert re.search(r"^step 6/6  loss [\d.]+ ", output, re.M), output
    assert re.search(r"^done: step 6 of 6$", output, re.M)
    assert [entry["step"] for entry in metrics(tmp_path)] == list(range(1, 7))
    assert (tmp_path / "exported" / "encoder.safetensors").exists()
    again = ray(cluster, "job", "logs", "first")
    assert "done: step 6 of 6" in again.stdout + again.stderr


def test_a_wrong_setting_ends_the_job_with_1_and_one_line(cluster: dict[str, str], shards: Path, tmp_path: Path) -> None:
    done = submit(cluster, *RUN, "train.stpes=6", f"data.shards={shards}", f"run.directory={tmp_path / 'run'}")
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert re.search(r"^error: train\.stpes=6: there is no key .*did you mean train\.steps\?$", output, re.M), output
    assert "Job entrypoint command failed with exit code 2" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_nobody_gets_in_without_the_token(cluster: dict[str, str], tmp_path: Path) -> None:
    done = submit(cluster | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}, "--help")
    assert done.returncode != 0
    assert re.search(r"\b401\b|[Aa]uthentication", done.stdout + done.stderr)
    listed = ray(cluster, "job", "list")
    assert "--help" not in listed.stdout + listed.stderr


@pytest.mark.long
def test_a_stopped_job_leaves_a_checkpoint_from_which_the_same_command_resumes(
    cluster: dict[str, str], shards: Path, tmp_path: Path
) -> None:
    arguments = (*RUN, "train.steps=4000", "checkpoint.every=4000", f"data.shards={shards}", f"run.directory={tmp_path}")
    submitted = submit(cluster, *arguments, options="--no-wait --submission-id stopped")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    follow = subprocess.Popen(
        ["ray", "job", "logs", "stopped", "--follow"], env=cluster, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        wait_for(lambda: len(metrics(tmp_path)) >= 3, "step 3", follow, seconds=400)
        stopped = ray(cluster, "job", "stop", "stopped")
        output = follow.communicate(timeout=60)[0]
    finally:
        follow.kill()
    assert "was stopped" in stopped.stdout + stopped.stderr
    reached = metrics(tmp_path)[-1]["step"]
    assert reached < 4000
    assert (tmp_path / "checkpoints" / f"step-{reached:08d}" / "state.json").exists(), output
    assert "the same command resumes" in output
    again = submit(cluster, *arguments, f"train.stop_at={reached + 2}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming" in again.stdout + again.stderr
    assert [entry["step"] for entry in metrics(tmp_path)] == list(range(1, reached + 3))
