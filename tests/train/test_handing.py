"""A checkpoint that the first worker reads for all of them."""

import json
import time
from pathlib import Path

import pytest
import torch
from groups import in_a_group
from s3_server import S3
from tiny_checkpoint import commit, same, state, tensors
from upath import UPath

from mmearth_ray.errors import DataError
from mmearth_ray.storage import Location
from mmearth_ray.train import handing
from mmearth_ray.train.checkpoint import State, checkpoint_path
from mmearth_ray.train.handing import handed_out

CPU = torch.device("cpu")
PATIENCE = 8.0
"""Seconds that a collective operation is given, where that is tried."""


def take(rank: int, workers: int, path: Location, folder: Path) -> None:
    with handed_out(path, rank, workers, CPU) as (found, weights, moments):
        assert found == state(1)
        assert "a.weight" in weights
        assert "other" not in moments
        torch.save((dict(weights), dict(moments)), folder / f"rank-{rank}")


def slowly(rank: int, workers: int, path: Location, folder: Path) -> None:
    load = handing.load_state

    def late(checkpoint: Location) -> State:
        time.sleep(2 * PATIENCE)
        return load(checkpoint)

    handing.load_state = late
    take(rank, workers, path, folder)


def nothing(rank: int, workers: int, folder: Path) -> None:
    with handed_out(folder / "none", rank, workers, CPU) as (found, weights, moments):
        learned = {"state": found, "weights": dict(weights), "moments": dict(moments)}
    (folder / f"rank-{rank}-of-{workers}").write_text(json.dumps(learned))


def refused(rank: int, workers: int, path: Location, folder: Path) -> None:
    with pytest.raises(DataError) as caught, handed_out(path, rank, workers, CPU):
        pass
    (folder / f"rank-{rank}").write_text(str(caught.value))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_worker_has_the_tensors_and_the_store_is_asked_by_one(workers: int, store: UPath, s3: S3, tmp_path: Path) -> None:
    commit(store, 1)
    s3.reset_counts()
    in_a_group(workers, tmp_path, take, store, tmp_path)
    for rank in range(workers):
        weights, moments = torch.load(tmp_path / f"rank-{rank}", weights_only=True)
        assert same(weights, tensors(1))
        assert same(moments, tensors(2))
    sizes = [(checkpoint_path(store, 1) / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer")]
    sizes.append((checkpoint_path(store, 1) / "state.json").stat().st_size)
    assert s3.counts()["bytes"] == sum(sizes)


def test_reading_a_store_may_take_longer_than_a_collective_operation(store: UPath, tmp_path: Path) -> None:
    commit(store, 1)
    in_a_group(2, tmp_path, slowly, store, tmp_path, patience=PATIENCE)
    first, second = (torch.load(tmp_path / f"rank-{rank}", weights_only=True) for rank in (0, 1))
    assert same(first[0], tensors(1))
    assert same(second[0], tensors(1))
    assert same(second[1], tensors(2))


@pytest.mark.parametrize("workers", [1, 2])
def test_where_there_is_none_every_worker_learns_it(workers: int, tmp_path: Path) -> None:
    in_a_group(workers, tmp_path, nothing, tmp_path)
    learned = [json.loads((tmp_path / f"rank-{rank}-of-{workers}").read_text()) for rank in range(workers)]
    assert learned == [{"state": None, "weights": {}, "moments": {}}] * workers


def test_what_cannot_be_read_every_worker_says_alike(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    (checkpoint_path(tmp_path, 1) / "optimizer.safetensors").write_bytes(b"junk")
    in_a_group(2, tmp_path, refused, tmp_path, tmp_path)
    first, second = ((tmp_path / f"rank-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith(f"the checkpoint {checkpoint_path(tmp_path, 1)} cannot be read (")
