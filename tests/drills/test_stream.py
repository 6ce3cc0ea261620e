"""The stream under everything that may happen to a run: other numbers of workers, kills, a store that fails."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from command import SMALL, ledger, losses, metrics, pretrain, pretraining, wait_for, workers_of
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray.shards.manifest import Manifest

pytestmark = pytest.mark.drill
TILES, HELD_OUT, GLOBAL_BATCH = 70, 6, 16
EPOCH = TILES - HELD_OUT
STEPS = 18  # four and a half epochs of four steps
RUN = (*SMALL, f"train.steps={STEPS}", "train.ledger=true", "checkpoint.every=3", "validate.tiles=0", "model.targets=[aster]")

OTHER_TILES, OTHER_HELD_OUT = 45, 5
OTHER_EPOCH = OTHER_TILES - OTHER_HELD_OUT
MIXED_STEPS = 24  # 3.6 epochs of the one set and 3.84 of the other
MIXED = (*RUN, f"train.steps={MIXED_STEPS}", "data.weights=[3,2]")

LAYOUTS = ((4, 2), (2, 4), (1, 4), (4, 4), (2, 2), (4, 1))
"""Workers and micro-batch of each stretch; all but one take several micro-batches a step."""

KILLS = 5
SHORTEST = 2


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("data") / "tiny", tiles=TILES, held_out=HELD_OUT, size=40, row_group=5)


@pytest.fixture(scope="module")
def undisturbed(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker on local shards that nothing happened to."""
    return run_undisturbed(tmp_path_factory.mktemp("runs"), *RUN, f"data.shards={manifest.directory}")


def run_undisturbed(folder: Path, *arguments: str) -> Path:
    run = folder / "undisturbed"
    done = pretrain(*arguments, f"run.directory={run}")
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.long
def test_changing_workers_and_five_kills_change_nothing(manifest: Manifest, undisturbed: Path, tmp_path: Path) -> None:
    disturb(STEPS, tmp_path, *RUN, f"data.shards={manifest.directory}", "data.tiles_per_task=16")
    assert ledger(tmp_path) == ledger(undisturbed)
    assert_each_epoch_holds_each_tile_once(tmp_path, {"": EPOCH})
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), abs=1e-4)


@pytest.mark.long
def test_nor_do_they_to_two_sets_with_the_same_ids_from_a_store_through_one_cache(
    manifest: Manifest, s3: S3, tmp_path: Path
) -> None:
    other = make_data_set(
        tmp_path / "data" / "other", tiles=OTHER_TILES, held_out=OTHER_HELD_OUT, size=48, row_group=7, name="other"
    )
    undisturbed = run_undisturbed(tmp_path, *MIXED, f"data.shards=[{manifest.directory},{other.directory}]")
    bucket, run, cache = s3.make_bucket(), tmp_path / "run", tmp_path / "cache"
    for each in (manifest, other):
        upload(each, bucket)
    s3.reset_counts()
    s3.fail(slow_down=0.03, reset=0.03, truncated=0.03, only="^(GET|HEAD)", seed=5)
    shards = f"data.shards=[{bucket}/tiny,{bucket}/other]"
    disturb(MIXED_STEPS, run, *MIXED, shards, f"data.cache={cache}", "data.tiles_per_task=16")
    assert ledger(run) == ledger(undisturbed)
    assert_each_epoch_holds_each_tile_once(run, {"tiny/": EPOCH, "other/": OTHER_EPOCH})
    assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-4)
    counts, kept = s3.counts(), sum(path.stat().st_size for path in cache.iterdir())
    assert counts["slow_down"], counts
    assert counts["reset"], counts
    assert 0 < counts["bytes"] < 3 * kept  # epochs are more than three, and without a shared cache each would read everything


def disturb(steps: int, run: Path, *arguments: str) -> None:
    """Train in stretches of random lengths, one for each of LAYOUTS; in KILLS of them kill -9 a worker or the whole command."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    extra = draw.choices(range(len(LAYOUTS)), k=steps - SHORTEST * len(LAYOUTS))
    victims = {stretch: draw.choice(["worker", "command"]) for stretch in draw.sample(range(len(LAYOUTS)), KILLS)}
    expected: list[int] = []
    for stretch, (workers, micro_batch) in enumerate(LAYOUTS):
        begun = len(expected)
        expected += [workers] * (SHORTEST + extra.count(stretch))
        layout = f"train.workers={workers}", f"train.micro_batch={micro_batch}", f"train.stop_at={len(expected)}"
        command = (*arguments, f"run.directory={run}", *layout)
        victim = victims.get(stretch)
        if victim:
            after, pause = draw.randrange(begun, len(expected)), draw.uniform(0, 0.2)
            print(f"{workers} workers, to step {len(expected)}: kill a {victim} {pause:.2f} s after step {after}")
            kill_once(command, run, victim, after, pause, draw)
        if victim != "worker":
            done = pretrain(*command)
            assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        assert worlds(run) == expected


def kill_once(command: tuple[str, ...], run: Path, victim: str, after: int, pause: float, draw: random.Random) -> None:
    """Start the command and kill -9 the victim so long after that step (or after the workers' start, if it is done already).
    A lost worker is replaced, and the command goes on to its end."""
    with pretraining(*command) as process:
        wait_for(lambda: workers_of(process.pid) and len(metrics(run)) >= after, f"step {after}", process, seconds=500)
        time.sleep(pause)
        os.kill(draw.choice(workers_of(process.pid)) if victim == "worker" else process.pid, signal.SIGKILL)
        code = process.wait(timeout=400)
        output = process.stdout.read() if process.stdout and victim == "worker" else ""
    assert code == (0 if victim == "worker" else -signal.SIGKILL), output


def worlds(run: Path) -> list[int]:
    """How many workers made each step, from the first on, as every one of their ledgers tells."""
    lines = [line for path in (run / "ledger").glob("rank-*.jsonl") for line in path.read_text().splitlines()]
    told = Counter((entry["step"], entry["world"]) for entry in map(json.loads, lines))
    assert all(times == world for (_, world), times in told.items()), told
    assert [step for step, _ in sorted(told)] == list(range(1, len(told) + 1))
    return [world for _, world in sorted(told)]


def assert_each_epoch_holds_each_tile_once(run: Path, epochs: dict[str, int]) -> None:
    """`epochs`: how many tiles those of each data set have, by what comes before its ids."""
    ids = [tile for step in ledger(run).values() for tile in step]
    own = {prefix: [int(tile.removeprefix(prefix)) for tile in ids if tile.startswith(prefix)] for prefix in epochs}
    assert sum(map(len, own.values())) == len(ids) == len(metrics(run)) * GLOBAL_BATCH
    for prefix, epoch in epochs.items():
        whole, rest = divmod(len(own[prefix]), epoch)
        assert whole >= 3
        for number in range(whole):
            assert sorted(own[prefix][number * epoch : (number + 1) * epoch]) == list(range(epoch))
        assert len(set(own[prefix][whole * epoch :])) == rest


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
    """Put the data set's files under BUCKET/, in a folder of its name."""
    system = fsspec.filesystem("s3")
    for path in sorted(manifest.directory.iterdir()):
        system.put_file(str(path), f"{bucket}/{manifest.name}/{path.name}")
