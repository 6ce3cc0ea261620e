"""What a run holds in memory: over a thousand steps no more than the README says, and nothing spilled to disk."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import environment, metrics, pretraining
from tiny_earth import make_data_set
from watch import Sample, Watch

from mmearth_ray import config as configuration
from mmearth_ray.experiment import open_experiment
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.stream.prepare import bytes_per_tile

pytestmark = [pytest.mark.drill, pytest.mark.long]
STEPS, WORKERS, MICRO_BATCH, READ_AHEAD, TILES_PER_TASK = 1000, 2, 8, 4, 32
SIZE = 32
RUN = ("model.decoder_width=32", "figure.tiles=0", "validate.tiles=0", f"train.steps={STEPS}", "checkpoint.every=200",
       f"model.image_size={SIZE}", f"train.workers={WORKERS}", f"train.global_batch={WORKERS * MICRO_BATCH}",
       f"data.read_ahead={READ_AHEAD}", f"data.tiles_per_task={TILES_PER_TASK}")  # fmt: skip
WARM = 200
"""Steps after which every buffer has been needed, and every kind of batch been made."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("data") / "tiny", tiles=70, held_out=6, size=40, row_group=5)


def test_a_run_of_a_thousand_steps_holds_no_more_than_the_readme_says(manifest: Manifest, tmp_path: Path) -> None:
    arguments = (*RUN, f"data.shards={manifest.directory}", f"run.directory={tmp_path}")
    samples: list[Sample] = []
    with pretraining(*arguments) as process:
        watch = Watch(process.pid)
        while process.poll() is None:
            if steps := len(metrics(tmp_path)):
                samples.append(watch.look(steps))
            time.sleep(0.5)
        assert process.returncode == 0, process.stdout and process.stdout.read()
    assert len(metrics(tmp_path)) == STEPS
    store = max(sample.store for sample in samples)
    assert 0 < store <= WORKERS * stated_bytes_of_the_store(manifest)
    assert not any(sample.spilled for sample in samples)
    assert len({pid for sample in samples for pid in sample.trainers}) == WORKERS  # a worker that came anew would hide growth
    for kind in ("trainers", "data_tasks"):
        largest = [(sample.step, max(held.values())) for sample in samples if (held := getattr(sample, kind))]
        early, late = [held for step, held in largest if step < WARM], [held for step, held in largest if step >= WARM]
        print(f"{kind}: {max(early):,} bytes at most before step {WARM}, {max(late):,} after; store: {store:,}")
        assert len(early) >= 5
        assert len(late) >= 20
        assert max(late) <= 1.1 * max(early)


def stated_bytes_of_the_store(manifest: Manifest) -> int:
    """What the README says of each worker, whose data tasks run one at a time here, at the joints of datasets too."""
    spec = open_experiment(configuration.load(list(RUN)), manifest.directory).source.spec
    tiles = 3 * READ_AHEAD * MICRO_BATCH + 5 * TILES_PER_TASK
    return tiles * bytes_per_tile(spec)


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
