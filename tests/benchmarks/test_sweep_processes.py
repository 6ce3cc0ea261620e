"""A sweep in real processes: its points killed, itself interrupted and killed, and started again."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import descendants, environment, kill, kill_tree, wait_for

from benchmarks.sweep_store import read_all

ROOT = Path(__file__).parents[2]


@contextmanager
def sweeping(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command on tiny points, in the background; whatever is left of it is killed at the end."""
    fixed = ["shapes=[16/8]", "batches=[1]", "device=cpu", f"directory={directory}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.sweep", *fixed, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=ROOT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # shells turn it off in the background
    )  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process)
        process.communicate()


def measuring(pid: int) -> list[int]:
    """The processes of a sweep's points."""
    found = []
    for child in descendants(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::measure_here"):
            found.append(child)
    return found


def run_sweep(directory: Path, *arguments: str) -> tuple[int, str]:
    """The command to its end: its exit code and what it said."""
    with sweeping(directory, *arguments) as process:
        output, _ = process.communicate(timeout=300)
        return process.returncode, output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two points that nothing happened to."""
    directory = tmp_path_factory.mktemp("finished")
    code, output = run_sweep(directory, "sizes=[atto,femto]", "steps=1")
    assert code == 0, output
    return directory


def files(directory: Path) -> dict[str, int]:
    """When each point's file was written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("points/*.json")}


@pytest.mark.drill
def test_a_finished_sweep_measures_nothing_again(finished: Path) -> None:
    before = files(finished)
    code, output = run_sweep(finished, "sizes=[atto,femto]", "steps=1")
    assert code == 0
    assert "2 of 2 points finished before" in output
    assert files(finished) == before
    assert sum(record.result is not None for record in read_all(finished)) == 2


@pytest.mark.drill
@pytest.mark.long
def test_a_killed_point_is_recorded_and_stops_nothing(tmp_path: Path) -> None:
    victims: list[int] = []
    with sweeping(tmp_path, "sizes=[atto,femto]", "steps=100000", "plain=false") as process:
        for _ in range(2):
            (victim,) = wait_for(lambda: [pid for pid in measuring(process.pid) if pid not in victims], "a point", process)
            kill(victim, signal.SIGKILL)
            victims.append(victim)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "2 of 2 points failed (atto 16/8" in output
    assert output.count("its process died") == 4  # as each fails, and at the end
    assert [record.result for record in read_all(tmp_path)] == [None, None]
    assert "its process died" in (tmp_path / "report.html").read_text()


@pytest.mark.drill
@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_sweep_that_is_stopped_or_killed_goes_on_where_it_was(number: int, code: int, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "points", tmp_path / "points")
    before = files(tmp_path)
    arguments = ("sizes=[atto,femto,pico]", "steps=1", "batches=[2]")
    with sweeping(tmp_path, *arguments) as process:
        wait_for(lambda: len(files(tmp_path)) > len(before) and measuring(process.pid), "the second point", process)
        left = descendants(process.pid)
        kill(process.pid, number)
        process.communicate(timeout=300)
    assert process.returncode == code
    wait_for_end(left)
    kept = files(tmp_path)
    code, output = run_sweep(tmp_path, *arguments)
    assert code == 0, output
    assert f"{len(kept) - len(before)} of 3 points finished before" in output
    assert kept.items() <= files(tmp_path).items()
    assert len(read_all(tmp_path)) == len(before) + 3


def wait_for_end(processes: Sequence[int]) -> None:
    """Wait until none of these processes runs: a Ray of its own ends with its driver."""
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.2)
