"""Every request to a store that failed is in the metrics, whatever it was for."""

import time
from pathlib import Path

import fsspec
import pytest
from command import losses, metrics
from processes import train
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray.patience import take_noted
from mmearth_ray.storage import locate
from mmearth_ray.train.checkpoint import committed, load_state

RECIPE = (
    "train.steps=6",
    "checkpoint.every=2",
    "checkpoint.keep=1",
    "validate.every=2",
    "validate.tiles=4",
    "data.attempts=20",
)


@pytest.mark.parametrize("place", ["shards", "checkpoints"])
def test_every_fault_of_a_run_is_counted_and_changes_nothing(
    place: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one worker in this process, whose faults before the first step are in its line; the last save's are in none."""
    make_data_set(tmp_path / "tiny", tiles=22, held_out=4, size=32, row_group=4)
    train(tmp_path / "tiny", tmp_path / "undisturbed", *RECIPE)
    bucket, run = s3.make_bucket(), tmp_path / "run"
    for path in (tmp_path / "tiny").iterdir():
        fsspec.filesystem("s3").put_file(str(path), f"{bucket}/tiny/{path.name}")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    s3.reset_counts()
    s3.fail(slow_down=0.08, internal_error=0.08, seed=5)
    take_noted()
    if place == "shards":
        train(locate(f"{bucket}/tiny", "data.shards"), run, *RECIPE)
    else:
        train(tmp_path / "tiny", run, *RECIPE, f"checkpoint.directory={bucket}/kept")
    s3.fail()
    lines, left = metrics(run), take_noted()
    trained, validated = (sum(e["storage_faults"] for e in found) for found in
                          (lines, [line["validation"] for line in lines if "validation" in line]))  # fmt: skip
    counts = s3.counts()
    assert trained + validated + left == counts["slow_down"] + counts["internal_error"]
    assert trained > 0
    assert (validated > 0, left > 0) == (place == "shards", place == "checkpoints")
    assert losses(run) == losses(tmp_path / "undisturbed")
    if place == "checkpoints":
        assert [load_state(path).step for path in committed(locate(f"{bucket}/kept", "checkpoint.directory"))] == [6]
