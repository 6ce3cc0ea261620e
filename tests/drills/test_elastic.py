"""A cluster of several nodes on this machine that loses one and gains one: the run goes on with what there is."""

from pathlib import Path

import pytest
from command import SMALL, ledger, losses, metrics, pretrain, pretraining, wait_for
from nodes import Nodes
from tiny_earth import make_data_set

pytestmark = pytest.mark.drill
STEPS = 60
RUN = (*SMALL, f"train.steps={STEPS}", "train.ledger=true", "checkpoint.every=5", "validate.tiles=0")


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
