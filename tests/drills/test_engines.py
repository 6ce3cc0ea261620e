"""Engines in real runs of the loop: every one goes on from every other's checkpoint, and trains alike for long."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command import losses, metrics
from groups import in_a_group
from processes import Quiet, local_stream, settings
from tiny_earth import make_data_set

from mmearth_ray.experiment import open_experiment
from mmearth_ray.train.loop import Worker, run

pytestmark = [pytest.mark.drill, pytest.mark.long]

ENGINES = ("ddp", "zero1", "zero2", "zero3")
WORKERS = (1, 2, 4)
SECONDS = 2400.0  # a processor that does not multiply bfloat16 takes many times as long for it
TILES, HALF, STEPS = 22, 3, 6  # steps of 8 tiles: the first epoch ends within the third, the second within the sixth
RECIPE = (f"train.steps={STEPS}", "optimizer.lr=1e-3", "checkpoint.keep=0", "validate.tiles=0", "schedule.warmup_fraction=0")
RANDOM_PAIRS = 6


@dataclass(frozen=True)
class Job:
    """A run of the loop in `directory`, which begins as a copy of `origin` if that is given."""

    directory: Path
    engine: str
    extra: tuple[str, ...] = ()
    origin: Path | None = None


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=TILES, size=40)
    return folder


def run_jobs(rank: int, workers: int, shards: Path, jobs: list[Job]) -> None:
    for job in jobs:
        if rank == 0 and job.origin:
            shutil.copytree(job.origin, job.directory)
        if workers > 1:
            torch.distributed.barrier()
        arguments = (*RECIPE, f"train.engine={job.engine}", f"train.workers={workers}", *job.extra)
        experiment = open_experiment(settings(shards, job.directory, *arguments), shards)
        job.directory.mkdir(parents=True, exist_ok=True)
        run(experiment, Worker(rank, workers, torch.device("cpu"), 1), local_stream, Quiet())


def in_groups(folder: Path, shards: Path, jobs: dict[int, list[Job]]) -> None:
    for workers, mine in jobs.items():
        in_a_group(workers, folder, run_jobs, shards, sorted(mine, key=lambda job: job.engine), seconds=SECONDS)


@pytest.fixture(scope="module")
def grid(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of all steps of an undisturbed run, and of every run that changed its engine or workers in the middle."""
    folder = tmp_path_factory.mktemp("grid")
    places = [(engine, workers) for workers in WORKERS for engine in ENGINES]
    draw = random.Random(6)
    pairs = [(("ddp", 1), place) for place in places] + [(place, ("ddp", 1)) for place in places]
    pairs += [tuple(draw.sample(places, 2)) for _ in range(RANDOM_PAIRS)]

    def half(place: tuple[str, int]) -> Path:
        return folder / f"half-{place[0]}-{place[1]}"

    def whole(one: tuple[str, int], other: tuple[str, int]) -> Path:
        return folder / f"{one[0]}-{one[1]}-to-{other[0]}-{other[1]}"

    in_groups(folder, shards, {
        w: [Job(half((e, w)), e, (f"train.stop_at={HALF}",)) for e in ENGINES] for w in WORKERS
    })  # fmt: skip
    in_groups(folder, shards, {1: [Job(folder / "undisturbed", "ddp")]})
    unique = sorted(set(pairs))
    in_groups(folder, shards, {
        w: [Job(whole(a, b), b[0], (), half(a)) for a, b in unique if b[1] == w] for w in WORKERS
    })  # fmt: skip
    assert len(unique) >= 2 * len(places) - 1
    return {path.name: losses(path) for path in [folder / "undisturbed", *(whole(a, b) for a, b in unique)]}


def test_every_checkpoint_goes_on_under_any_engine_and_number_of_workers(grid: dict[str, list[float]]) -> None:
    expected = grid.pop("undisturbed")
    assert len(expected) == STEPS
    assert TILES < HALF * 8 < 2 * TILES < STEPS * 8
    for name, found in grid.items():
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), name


def test_losses_stay_together_for_fifty_steps(shards: Path, tmp_path: Path) -> None:
    long = ("train.steps=50", "schedule.warmup_fraction=0.2", "checkpoint.every=50")
    micro = {"ddp": 4, "zero1": 4, "zero2": 2, "zero3": 1}
    jobs = [Job(tmp_path / engine, engine, (*long, f"train.micro_batch={micro[engine]}")) for engine in ENGINES]
    in_groups(tmp_path, shards, {1: [Job(tmp_path / "alone", "ddp", long)], 2: jobs})
    expected = losses(tmp_path / "alone")
    assert len(expected) == 50
    for engine in ENGINES:
        assert losses(tmp_path / engine)[:20] == pytest.approx(expected[:20], rel=1e-5, abs=1e-5), engine
        assert losses(tmp_path / engine) == pytest.approx(expected, rel=1e-4, abs=1e-4), engine


def test_bf16_ends_where_float32_does(shards: Path, tmp_path: Path) -> None:
    long = ("train.steps=200", "schedule.warmup_fraction=0.2", "checkpoint.every=200", "train.global_batch=2")
    low = (*long, "train.precision=bf16")
    in_groups(tmp_path, shards, {1: [
        Job(tmp_path / "fp32", "ddp", long), *(Job(tmp_path / engine, engine, low) for engine in ENGINES)
    ]})  # fmt: skip
    expected = [entry["loss"] for entry in metrics(tmp_path / "fp32")][-10:]
    for engine in ENGINES:
        found = losses(tmp_path / engine)
        assert len(found) == 200
        assert found[-10:] == pytest.approx(expected, rel=1e-2, abs=1e-2), engine
        assert found != losses(tmp_path / "fp32")
