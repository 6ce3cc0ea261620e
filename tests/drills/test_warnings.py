"""What workers have to say reaches the person who gave the command."""

from pathlib import Path

import pytest
from command import SMALL, metrics, pretrain
from tiny_earth import make_block, make_data_set

from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.write import write_shard


@pytest.mark.drill
@pytest.mark.long
def test_a_tracker_that_fails_and_a_step_that_is_skipped_are_told_on_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data_set(tmp_path / "clean", tiles=64, size=40)
    block = make_block(range(64), 40, 64)
    block.layers["era5"][5, :3] = 1e30
    record = write_shard(tmp_path / "bad.parquet", [block], 40)
    Manifest(tmp_path, "tiny", 40, (record,), {"kind": "tiny"}).save()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run = tmp_path / "run"
    done = pretrain(
        f"data.shards={tmp_path}", f"data.statistics={tmp_path / 'clean' / 'manifest.json'}", f"run.directory={run}", *SMALL,
        "train.nonfinite=skip", "train.steps=4", "log.wandb=online",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    skipped = [line["step"] for line in metrics(run) if "skipped" in line]
    warned = sorted(line for line in done.stderr.splitlines() if line.startswith("warning: "))
    assert len(skipped) == 1
    assert len(warned) == 2
    assert warned[0].startswith("warning: Weights & Biases gets no more of this run until it is resumed (")
    assert warned[1].startswith(
        f"warning: the loss of step {skipped[0]} is not finite (era5), by tile 5; its update was left out"
    )
