"""Stores that fail under a run: while it saves, and by never answering."""

import re
import time
from functools import partial
from pathlib import Path

import fsspec
import pytest
from command import SMALL, ledger, losses, metrics, pretrain, pretraining, wait_for
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.storage import locate
from mmearth_ray.train.checkpoint import committed, load_state, opened

pytestmark = pytest.mark.drill
STEPS = 9
RUN = (*SMALL, f"train.steps={STEPS}", "train.ledger=true", "train.workers=2", "checkpoint.every=3", "checkpoint.keep=0",
       "validate.tiles=0", "model.targets=[aster]")  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("data") / "tiny", tiles=70, held_out=6, size=40, row_group=5)


@pytest.fixture(scope="module")
def undisturbed(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the disk that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = pretrain(*RUN, f"data.shards={manifest.directory}", f"run.directory={run}")
    assert done.returncode == 0, done.stderr
    return run


def steps_that_load(folder: str) -> list[int]:
    """The steps of all committed checkpoints, each of which is read whole."""
    steps = []
    for path in committed(locate(folder, "checkpoint.directory")):
        with opened(path) as (weights, moments):
            assert sum(weights[name].numel() for name in weights) > 1e6
            assert sum(moments[name].numel() for name in moments) > 2e6
        steps.append(load_state(path).step)
    return steps


@pytest.mark.long
def test_checkpoints_on_a_store_that_throttles_breaks_and_resets_are_all_whole(
    manifest: Manifest, undisturbed: Path, s3: S3, tmp_path: Path
) -> None:
    """Their files go in several parts.  The run is stopped and goes on from the store, which fails all the time."""
    kept = f"{s3.make_bucket()}/kept"
    s3.fail(slow_down=0.15, internal_error=0.1, reset=0.1, lost=0.05, only="^(PUT|POST)", seed=7)
    arguments = (*RUN, f"data.shards={manifest.directory}", f"run.directory={tmp_path}", f"checkpoint.directory={kept}")
    for last in (5, STEPS):
        done = pretrain(*arguments, f"train.stop_at={last}")
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    counts = s3.counts()
    assert all(counts[fault] for fault in ("slow_down", "internal_error", "reset", "lost")), counts
    assert counts["POST"] >= 2 * 4  # the beginning and the end of an upload in parts, in each checkpoint
    s3.fail()
    assert steps_that_load(kept) == [3, 5, 6, 9]
    assert ledger(tmp_path) == ledger(undisturbed)
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), abs=1e-6)
    assert sum(entry["storage_faults"] for entry in metrics(tmp_path)) > 0


@pytest.mark.long
@pytest.mark.parametrize("what", ["shards", "checkpoints"])
def test_a_store_that_never_answers_ends_the_run_before_a_worker_is_taken_for_hung(
    what: str, manifest: Manifest, s3: S3, tmp_path: Path
) -> None:
    """However many attempts are allowed: the patience is that of the shortest `train.hang_timeout` with a store.

    The first checkpoint has arrived; where checkpoints fail, that is the newest one in the end.
    """
    bucket, shards = s3.make_bucket(), str(manifest.directory)
    if what == "shards":
        shards = f"{bucket}/tiny"
        for path in sorted(manifest.directory.iterdir()):
            fsspec.filesystem("s3").put_file(str(path), f"{shards}/{path.name}")
    kept = partial(committed, locate(f"{bucket}/kept", "checkpoint.directory"))
    places = (f"data.shards={shards}", f"checkpoint.directory={bucket}/kept", f"run.directory={tmp_path}")
    limits = ("train.steps=4000", "data.attempts=20", "train.hang_timeout=150")
    with pretraining(*RUN, *places, *limits) as process:
        wait_for(lambda: len(metrics(tmp_path)) >= 4 and bool(kept()), "step 4 and the checkpoint of step 3", process)
        s3.fail(silent=1.0, only="^(GET|HEAD).*/tiny/" if what == "shards" else "^(PUT|POST).*/step-")
        began = time.monotonic()
        assert process.wait(timeout=400) == 1
        took = time.monotonic() - began
        output = process.stdout.read() if process.stdout else ""
    print(f"gave up after {took:.0f} s")
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    place = f"{bucket}/tiny/part-" if what == "shards" else f"{bucket}/kept/step-"
    assert len(errors) == 1, output
    assert re.match(rf"error: .*{place}\S* cannot be reached in \d+ attempts \(.*\); run the command again once", errors[0])
    assert "Traceback" not in output
    steps = [entry["step"] for entry in metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    s3.fail()
    assert 3 in steps_that_load(f"{bucket}/kept")
