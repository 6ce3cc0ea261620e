"""The stream under everything that may happen to a run: other numbers of workers, kills, a store that fails, many steps."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from command import SMALL, environment, kill, ledger, losses, metrics, pretrain, pretraining, wait_for, workers_of
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray import config as configuration
from mmearth_ray.experiment import open_experiment
from mmearth_ray.shards.manifest import Manifest

pytestmark = pytest.mark.drill
TILES, HELD_OUT, GLOBAL_BATCH = 70, 6, 16
EPOCH = TILES - HELD_OUT
STEPS = 18  # four and a half epochs of four steps
RUN = (*SMALL, f"train.steps={STEPS}", "train.ledger=true", "checkpoint.every=3", "validate.tiles=0", "model.targets=[aster]")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("data") / "tiny", tiles=TILES, held_out=HELD_OUT, size=40, row_group=5)


@pytest.fixture(scope="module")
def undisturbed(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker on local shards that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = pretrain(*RUN, f"data.shards={manifest.directory}", f"run.directory={run}")
    assert done.returncode == 0, done.stderr
    return run


def assert_each_epoch_holds_each_tile_once(run: Path) -> None:
    ids = [tile for step in ledger(run).values() for tile in step]
    assert len(ids) == STEPS * GLOBAL_BATCH
    for start in range(0, len(ids) - EPOCH + 1, EPOCH):
        assert sorted(map(int, ids[start : start + EPOCH])) == list(range(EPOCH))


@pytest.mark.long
def test_changing_workers_and_five_kills_change_nothing(manifest: Manifest, undisturbed: Path, tmp_path: Path) -> None:
    """4, 2, 1, 4, 2, 4 workers, each for two steps or more, drawn at random; in five of the stretches a worker or the whole
    command is killed after its first step."""
    draw = random.Random()
    seed = draw.randrange(10**6)
    draw.seed(seed)
    print(f"seed {seed}")
    workers = (4, 2, 1, 4, 2, 4)
    lengths = [2 + extra for extra in np.bincount(draw.choices(range(6), k=STEPS - 12), minlength=6).tolist()]
    kills = {stretch: draw.choice(["worker", "command"]) for stretch in draw.sample(range(6), 5)}
    for stretch, last in enumerate(np.cumsum(lengths).tolist()):
        arguments = (*RUN, f"data.shards={manifest.directory}", f"run.directory={tmp_path}", "data.tiles_per_task=16",
                     f"train.workers={workers[stretch]}", f"train.stop_at={last}")  # fmt: skip
        if stretch in kills:
            before = [entry["step"] for entry in metrics(tmp_path)]
            with pretraining(*arguments) as process:
                wait_for(lambda before=before: [e["step"] for e in metrics(tmp_path)] != before, "another step", process)
                kill(draw.choice(workers_of(process.pid)) if kills[stretch] == "worker" else process.pid, signal.SIGKILL)
                if kills[stretch] == "worker":
                    assert process.wait(timeout=400) == 0
        done = pretrain(*arguments)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert ledger(tmp_path) == ledger(undisturbed)
    assert_each_epoch_holds_each_tile_once(tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), abs=1e-4)


@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_store_that_throttles_resets_and_truncates_gives_the_local_stream(
    cached: bool, manifest: Manifest, undisturbed: Path, s3: S3, tmp_path: Path
) -> None:
    bucket = s3.make_bucket()
    upload(manifest, bucket)
    s3.fail(slow_down=0.08, internal_error=0.05, reset=0.05, truncated=0.05, only="^(GET|HEAD)", seed=3)
    cache = (f"data.cache={tmp_path / 'cache'}", "data.cache_gb=0.001") if cached else ()
    done = pretrain(*RUN, f"data.shards={bucket}/tiny", f"run.directory={tmp_path / 'run'}", "train.workers=2", *cache)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    counts = s3.counts()
    assert all(counts[fault] for fault in ("slow_down", "internal_error", "reset", "truncated")), counts
    assert ledger(tmp_path / "run") == ledger(undisturbed)
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), abs=1e-4)
    assert sum(entry["storage_faults"] for entry in metrics(tmp_path / "run")) > 0
    if cached:
        assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 1e6


def test_a_store_that_stays_away_ends_the_run_with_its_last_checkpoint(manifest: Manifest, s3: S3, tmp_path: Path) -> None:
    bucket = s3.make_bucket()
    upload(manifest, bucket)
    arguments = (*RUN, "train.steps=4000", f"data.shards={bucket}/tiny", f"run.directory={tmp_path}", "data.attempts=3")
    with pretraining(*arguments) as process:
        wait_for(lambda: len(metrics(tmp_path)) >= 4, "step 4", process)
        s3.fail(slow_down=1.0)
        assert process.wait(timeout=200) == 1
        output = process.stdout.read() if process.stdout else ""
    error = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, output
    assert f"{bucket}/tiny/part-" in error[0]
    assert "cannot be reached in 3 attempts" in error[0]
    assert "Traceback" not in output
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert json.loads((newest / "state.json").read_text())["step"] >= 3


def upload(manifest: Manifest, bucket: str) -> None:
    """Put the data set's files under BUCKET/tiny."""
    system = fsspec.filesystem("s3")
    for path in sorted(manifest.directory.iterdir()):
        system.put_file(str(path), f"{bucket}/tiny/{path.name}")


PROBE = """
import json, os, sys
from pathlib import Path
import ray
from mmearth_ray import config as configuration
from mmearth_ray.experiment import open_experiment
from mmearth_ray.stream.pipeline import Share, stream
from mmearth_ray.stream.plan import MicroBatches

shards, steps, window = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ray.init("local", num_cpus=3, object_store_memory=400_000_000, logging_level="ERROR", include_dashboard=False)
config = configuration.load(["model.image_size=32", "train.global_batch=16", "validate.tiles=0"])
experiment = open_experiment(config, shards)
ranges = MicroBatches(1, steps, 16, 1, 0, 16)
page, total = os.sysconf("SC_PAGE_SIZE"), ray.cluster_resources()["object_store_memory"]
batches = stream(experiment.source, ranges, tiles_per_task=32, read_ahead=4, share=Share(2, 200_000_000), window=window)
seen = []
for step, batch in enumerate(batches, 1):
    if step % 50 == 0:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        held = total - ray.available_resources().get("object_store_memory", 0)
        seen.append([step, resident, held, batch["id"].tolist()])
print(json.dumps(seen))
"""


@pytest.mark.long
def test_memory_stays_bounded_over_a_thousand_steps_and_windows_join(manifest: Manifest) -> None:
    """Windows of 20 tasks, so that 25 boundaries are crossed: the same samples, and no more memory at the end."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(manifest.directory), "1000", "20"],
        capture_output=True, text=True, timeout=500, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert [step for step, *_ in seen] == list(range(50, 1001, 50))
    resident, held = [r for _, r, _, _ in seen], [h for _, _, h, _ in seen]
    assert max(resident[10:]) < 1.1 * max(resident[:10])
    assert max(held) < 30e6, held  # 2 x (read_ahead + 4) batches of 0.7 MB, and what tasks are writing
    config = configuration.load(["model.image_size=32", "train.global_batch=16", "validate.tiles=0"])
    source = open_experiment(config, manifest.directory).source
    for step, _, _, ids in seen:
        assert next(source.batches([((step - 1) * 16, step * 16)]))["id"].tolist() == ids
