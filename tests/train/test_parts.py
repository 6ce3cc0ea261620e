"""Checkpoints of several files, written by several workers: whole or absent, whoever of them fails."""

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import commit, load_tensors, names, same, save, state, tensors
from torch import Tensor

from mmearth_ray import storage
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.storage import Location, read_bytes
from mmearth_ray.train import commit as committing
from mmearth_ray.train.checkpoint import INCOMING, checkpoint_path
from mmearth_ray.train.initial import initial_tensors
from mmearth_ray.train.parts import Team
from mmearth_ray.train.tensors import Gathered, shape_only


class Workers:
    """Threads that stand for workers: each saves as one of them, and what one says all hear."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.said = count, threading.Barrier(count), [""] * count

    def share(self, rank: int, text: str) -> str:
        self.said[rank] = text
        self.barrier.wait(30)
        first = next((said for said in self.said if said), "")
        self.barrier.wait(30)
        return first

    def save(self, folder: Location, step: int, given: Callable[[int], Mapping[str, Tensor]]) -> list[BaseException | None]:
        """Save from every worker, `given` what that one has; returns what each of them raised."""

        def one(rank: int) -> BaseException | None:
            try:
                team = Team(rank, self.count, lambda text: self.share(rank, text))
                save(folder, state(step), given(rank), tensors(step + 1), keep=0, team=team)
            except DataError as error:
                return error
            return None

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


def parted(seed: int) -> dict[str, Tensor]:
    """Eight tensors of 400 bytes."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(100, generator=generator) for i in range(8)}


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("kind", ["folder", "store"])
def test_tensors_too_large_for_a_file_are_several_and_every_worker_writes_its_share(
    workers: int, kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path if kind == "folder" else request.getfixturevalue("store")
    monkeypatch.setattr(committing, "LIMIT", 1000)
    written, group, held = [], Workers(workers), parted(3)

    def recorded(given: dict[str, Tensor], path: Path) -> None:
        written.append((threading.get_ident(), path.name, sum(t.nbytes for t in given.values())))
        save_file(given, path)

    monkeypatch.setattr(committing, "save_tensors", recorded)
    turns: dict[int, list[str]] = {rank: [] for rank in range(workers)}

    def given(rank: int) -> Gathered:
        def gather(name: str) -> Tensor:
            turns[rank].append(name)
            return held[name]

        return Gathered({name: shape_only(t.shape) for name, t in held.items()}, gather)

    assert group.save(folder, 5, given) == [None] * workers
    assert all(asked == list(held) for asked in turns.values())  # gathering takes all of them, in one order
    parts = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(name for _, name, _ in written if name.startswith("model")) == parts
    assert all(size <= 1000 for _, _, size in written)
    assert len({thread for thread, _, _ in written}) == workers
    path = checkpoint_path(folder, 5)
    assert [name for name in storage.names(path) if "model" in name] == [*parts, "model.safetensors.index.json"]
    index = json.loads(read_bytes(path / "model.safetensors.index.json"))
    assert index["metadata"] == {"total_size": 3200}
    assert list(index["weight_map"]) == list(held)
    weights, moments = load_tensors(path)
    assert same(weights, held)
    assert same(moments, tensors(6))


def test_a_checkpoint_of_several_files_starts_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "LIMIT", 1000)
    path = save(tmp_path, state(5), parted(3), {}, keep=0)
    assert isinstance(path, Path)
    assert same(initial_tensors(path), parted(3))


def test_what_one_worker_cannot_write_all_of_them_raise_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tmp_path, 1)
    monkeypatch.setattr(committing, "LIMIT", 1000)

    def full(given: dict[str, Tensor], path: Path) -> None:
        if path.name.startswith("model-00002"):
            raise OSError(28, "No space left on device")
        save_file(given, path)

    monkeypatch.setattr(committing, "save_tensors", full)
    raised = Workers(2).save(tmp_path, 2, lambda rank: parted(4))
    assert len({str(error) for error in raised}) == 1
    assert str(raised[0]).startswith(f"no space left on the disk of {tmp_path} while writing step-00000002; free some")
    assert names(tmp_path) == ["step-00000001"]
    assert list((tmp_path / INCOMING).iterdir()) == []


@pytest.mark.parametrize("kind", [UsageError, DataError])
def test_what_one_worker_refuses_reaches_all_of_them(kind: type[Exception], tmp_path: Path) -> None:
    group = Workers(2)

    def one(rank: int) -> None:
        with Team(rank, 2, lambda text: group.share(rank, text)).together(tmp_path):
            if rank == 0:
                raise kind("eval.task= names no data set")

    with ThreadPoolExecutor(2) as pool:
        found = [task.exception(60) for task in [pool.submit(one, rank) for rank in range(2)]]
    assert [type(error) for error in found] == [kind, DataError]
    assert {str(error) for error in found} == {"eval.task= names no data set"}


def test_an_index_that_cannot_be_read_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "LIMIT", 1000)
    path = save(tmp_path, state(5), parted(3), {}, keep=0)
    for text in ("{", "{}", "[]"):
        (path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(DataError, match=r"index\.json"):
            load_tensors(path)
