"""A cluster of several nodes on this machine that loses one and gains one: the run goes on with what there is."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import SMALL, environment, ledger, losses, metrics, pretrain, pretraining, wait_for
from metadata_server import metadata
from nodes import Nodes
from tiny_earth import make_data_set

from mmearth_ray.train.checkpoint import FOLDER, committed, step_of

pytestmark = [pytest.mark.drill, pytest.mark.long]
STEPS = 60
RUN = (*SMALL, f"train.steps={STEPS}", "train.ledger=true", "validate.tiles=0")
SAVING = "checkpoint.every=5"
WATCHER = Path(__file__).parents[2] / "cluster" / "spot_notice.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=90, size=40)
    return f"data.shards={folder}"


@pytest.fixture(scope="module")
def alone(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers on this machine that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    done = pretrain(*RUN, SAVING, data, f"run.directory={run}", "train.workers=2")
    assert done.returncode == 0, done.stderr
    return run


def joined(nodes: Nodes, run: Path, workers: str) -> tuple[str, ...]:
    return (f"run.address={nodes.address}", f"train.workers={workers}", "train.wait=120", "train.hang_timeout=60",
            f"run.directory={run}")  # fmt: skip


def worlds_of(run: Path) -> Callable[[], list[int]]:
    """How many workers made each step so far."""

    def worlds() -> list[int]:
        path = run / "ledger" / "rank-0.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split('"world": ')[1].split(",")[0]) for line in lines if line.endswith("}")]

    return worlds


def output_of(process: subprocess.Popen[str]) -> str:
    """All that a run has said, once it has ended well."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def assert_as_undisturbed(run: Path, alone: Path) -> None:
    assert ledger(run) == ledger(alone)
    assert [entry["step"] for entry in metrics(run)] == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)


def test_a_run_goes_on_with_fewer_workers_and_grows_again(nodes: Nodes, data: str, alone: Path, tmp_path: Path) -> None:
    nodes.add()
    second, worlds = nodes.add(), worlds_of(tmp_path)
    with pretraining(*RUN, SAVING, data, *joined(nodes, tmp_path, "[1,2]")) as process:
        wait_for(lambda: len(metrics(tmp_path)) >= 8, "step 8", process)
        assert set(worlds()) == {2}
        nodes.lose(second)
        wait_for(lambda: worlds()[-1:] == [1] and len(worlds()) >= 15, "going on with one worker", process)
        nodes.add()
        wait_for(lambda: worlds()[-1:] == [2], "growing to two workers again", process)
        output = output_of(process)
    assert "workers were lost" in output
    assert "going on with 1 worker instead of 2" in output
    assert "going on with 2 workers instead of 1" in output
    assert_as_undisturbed(tmp_path, alone)


def test_a_fixed_number_of_workers_waits_for_a_node_in_the_place_of_a_lost_one(
    nodes: Nodes, data: str, alone: Path, tmp_path: Path
) -> None:
    nodes.add()
    second, said = nodes.add(), ""
    with pretraining(*RUN, SAVING, data, *joined(nodes, tmp_path, "2")) as process:
        wait_for(lambda: len(metrics(tmp_path)) >= 8, "step 8", process)
        nodes.lose(second)
        assert process.stdout
        for line in process.stdout:
            said += line
            if line.startswith("waiting up to 120 s for room: "):
                break
        else:
            raise AssertionError(said)
        reached = len(metrics(tmp_path))
        assert "train.workers=2 would leave no CPU for data tasks: the cluster has 2, training needs at least 3" in line
        assert reached < STEPS
        assert process.poll() is None
        nodes.add()
        output_of(process)
    assert "workers were lost" in said
    assert set(worlds_of(tmp_path)()) == {2}
    assert_as_undisturbed(tmp_path, alone)


def test_a_notice_of_the_cloud_lets_the_run_save_and_leave_the_node_in_time(
    nodes: Nodes, data: str, alone: Path, tmp_path: Path
) -> None:
    """From the metadata server to the checkpoint, which nothing else asks for, with the files that a node has."""
    nodes.add()
    second, run = nodes.add(), tmp_path / "run"
    ray = Path(sys.executable).with_name("ray")
    mine = tmp_path / "ray"  # on a machine with several nodes: one of a cloud has its own
    mine.write_text(f'#!/bin/sh\nexec {ray} "$@" --node-id={nodes.id_of(second)}\n')
    mine.chmod(0o755)
    keeping = ("checkpoint.every=1000", "checkpoint.keep=0")
    with metadata() as server, pretraining(*RUN, *keeping, data, *joined(nodes, run, "[1,2]")) as process:
        own = {"RAY_ADDRESS": nodes.address, "RAY_AUTH_MODE": "token", "PATH": f"{tmp_path}:/usr/bin:/bin"}
        watcher = subprocess.Popen([sys.executable, WATCHER, "aws"], env=environment() | server.environment | own)
        try:
            wait_for(lambda: len(metrics(run)) >= 8, "step 8", process)
            server.leaving = True
            assert watcher.wait(timeout=120) == 0
        finally:
            watcher.kill()
            watcher.wait()
        wait_for(lambda: worlds_of(run)()[-1:] == [1], "going on with one worker", process)
        nodes.lose(second)
        output = output_of(process)
    worlds = worlds_of(run)()
    left = worlds.count(2)
    assert worlds == [2] * left + [1] * (STEPS - left)
    assert [step_of(path) for path in committed(run / FOLDER)] == [left, STEPS]
    assert "going on with 1 worker instead of 2" in output
    assert "workers were lost" not in output
    assert_as_undisturbed(run, alone)
