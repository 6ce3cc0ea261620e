"""Checkpoints of a run on a store: steps go on while they are uploaded, and none is lost or early."""

import threading
import time
from pathlib import Path

import pytest
from command import metrics
from groups import in_a_group
from processes import settings, train, train_as
from s3_server import S3
from tiny_checkpoint import names
from tiny_earth import make_data_set
from upath import UPath

from mmearth_ray.errors import DataError
from mmearth_ray.keys import Config
from mmearth_ray.storage import read_bytes
from mmearth_ray.train import commit, loop
from mmearth_ray.train.checkpoint import checkpoint_path

RECIPE = ("train.steps=6", "optimizer.lr=1e-3", "checkpoint.every=2", "checkpoint.keep=0", "validate.tiles=0")

PATIENCE = 8.0
"""Seconds that a collective operation is given, where that is tried."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=18, size=32)
    return folder


def test_steps_go_on_while_a_checkpoint_is_uploaded(
    shards: Path, store: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors of step 2 leave when step 3 is done; the checkpoint is whole before that of step 4 is begun."""
    train(shards, tmp_path / "local", *RECIPE)
    gate, upload, fetch = threading.Event(), commit.upload, loop.fetch
    steps, committed = iter(range(1, 7)), {}

    def held(local: Path, place: UPath) -> None:
        if "step-00000002" in place.path and local.suffix == ".safetensors":
            assert gate.wait(60)
        upload(local, place)

    def fetched(*given: object) -> object:
        committed[step := next(steps)] = names(store)
        if step == 3:
            gate.set()
        return fetch(*given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(commit, "upload", held)
    monkeypatch.setattr(loop, "fetch", fetched)
    train(shards, tmp_path / "away", *RECIPE, f"checkpoint.directory={store}")
    assert committed[3] == []
    assert "step-00000002" in committed[5]
    assert names(store) == [f"step-0000000{step}" for step in (2, 4, 6)]
    assert [entry["loss"] for entry in metrics(tmp_path / "away")] == [entry["loss"] for entry in metrics(tmp_path / "local")]
    for step in (2, 4, 6):
        for file in ("model.safetensors", "optimizer.safetensors"):
            here = checkpoint_path(tmp_path / "local" / "checkpoints", step) / file
            assert read_bytes(checkpoint_path(store, step) / file) == read_bytes(here)


def slowly(rank: int, workers: int, config: Config, shards: Path) -> None:
    """Train; the second worker's files take twice as long to the store as a collective operation is given."""
    upload, waited = commit.upload, iter((2 * PATIENCE,))

    def late(local: Path, place: UPath) -> None:
        time.sleep(next(waited, 0) if rank == 1 else 0)
        upload(local, place)

    commit.upload = late
    train_as(rank, workers, config, shards)
    assert next(waited, None) == (None if rank == 1 else 2 * PATIENCE)


def test_an_upload_may_take_longer_than_a_collective_operation(shards: Path, store: UPath, tmp_path: Path) -> None:
    """Begun after step 2; the third and last step soon waits for it."""
    config = settings(shards, tmp_path, *RECIPE, "train.steps=3", "train.workers=2", f"checkpoint.directory={store}")
    in_a_group(2, tmp_path, slowly, config, shards, patience=PATIENCE)
    assert names(store) == ["step-00000002", "step-00000003"]


def test_an_upload_that_fails_ends_the_run_some_steps_later_and_resuming_begins_at_the_one_before(
    shards: Path, store: UPath, s3: S3, tmp_path: Path
) -> None:
    where = f"checkpoint.directory={store}"
    train(shards, tmp_path / "whole", *RECIPE)
    s3.fail(denied=1, only="PUT .*step-00000004/model")
    with pytest.raises(DataError, match=r"step-00000004/model\.safetensors: access denied"):
        train(shards, tmp_path / "run", *RECIPE, where)
    assert names(store) == ["step-00000002"]
    s3.fail()
    train(shards, tmp_path / "run", *RECIPE, where)
    assert names(store) == [f"step-0000000{step}" for step in (2, 4, 6)]
    assert [entry["loss"] for entry in metrics(tmp_path / "run")] == [entry["loss"] for entry in metrics(tmp_path / "whole")]
