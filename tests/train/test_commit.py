"""Checkpoints as they are written: whole under their name or not there, on a store while training goes on."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from s3_server import S3
from safetensors.torch import save_file
from tiny_checkpoint import FILES, commit, load_tensors, names, same, save, state, tensors
from torch import Tensor, nn
from upath import UPath

from mmearth_ray.errors import DataError
from mmearth_ray.storage import below, read_bytes
from mmearth_ray.storage import names as names_in
from mmearth_ray.train import checkpoint
from mmearth_ray.train import commit as commit_module
from mmearth_ray.train.checkpoint import INCOMING, checkpoint_path, committed, load_state, newest
from mmearth_ray.train.commit import Keeping, begin


def test_parameters_that_need_gradients_are_saved_by_value(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    path = save(tmp_path, state(1), dict(module.named_parameters()), {}, keep=0)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        module.weight.add_(1)
    assert same(load_tensors(path)[0], expected)


def test_only_the_newest_are_kept_or_all_of_them(tmp_path: Path) -> None:
    commit(tmp_path / "two", 1, 2, 3, 4, keep=2)
    assert names(tmp_path / "two") == ["step-00000003", "step-00000004"]
    commit(tmp_path / "all", 1, 2, 3, 4, keep=0)
    assert len(names(tmp_path / "all")) == 4
    assert list((tmp_path / "two" / INCOMING).iterdir()) == []


def test_those_of_every_so_many_steps_are_kept_for_ever(tmp_path: Path) -> None:
    for step in (10, 20, 30, 45, 50, 60):
        save(tmp_path, state(step), tensors(step), {}, keep=2, keep_every=30)
    assert names(tmp_path) == ["step-00000030", "step-00000050", "step-00000060"]


@pytest.mark.parametrize("fails", ["model", "optimizer", "state", "flush"])
def test_a_failure_while_writing_leaves_nothing_behind_and_keeps_what_was_there(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def save_file_until(given: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        if path.stem == fails:
            full()
        save_file(given, path)

    monkeypatch.setattr(commit_module, "save_tensors", save_file_until)
    if fails == "state":
        monkeypatch.setattr(Path, "write_text", full)
    if fails == "flush":
        monkeypatch.setattr(commit_module, "flush", full)
    for step in (1, 2):
        with pytest.raises(DataError) as caught:
            save(tmp_path, state(step), tensors(8), tensors(9), keep=1)
        message = str(caught.value)
        place = checkpoint_path(tmp_path, step).name
        assert message == (
            f"no space left on the disk of {tmp_path} while writing {place}; free some and run the command again"
        )
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]
    assert list((tmp_path / INCOMING).iterdir()) == []
    assert same(load_tensors(checkpoint_path(tmp_path, 1))[0], tensors(1))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_what_no_space_would_help_is_not_told_to_free_some(
    number: int, tmp_path: Path, store: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(commit_module, "save_tensors", refused)
    why = os.strerror(number)
    with pytest.raises(DataError, match=rf"^cannot write {checkpoint_path(tmp_path, 2)}: {why}$"):
        commit(tmp_path, 2)
    with pytest.raises(DataError, match=rf"^cannot write /\S+/model\.safetensors: {why}, on its way to {store}"):
        commit(store, 2)


def test_a_team_that_was_succeeded_while_it_wrote_touches_nothing_of_its_successor(tmp_path: Path) -> None:
    later = tmp_path / INCOMING / "step-00000008.later" / "half"
    asked: list[int] = []

    def succeeded() -> None:
        """From the second time on another team has saved the same step, and is about to save the next one."""
        asked.append(len(asked))
        if len(asked) == 2:
            save(tmp_path, state(4), tensors(2), tensors(3), keep=0, mark="later")
            later.parent.mkdir(parents=True)
            later.write_text("half")
            raise DataError("taken over")

    with pytest.raises(DataError, match="taken over"):
        save(tmp_path, state(4), tensors(8), tensors(9), keep=0, check=succeeded, mark="earlier")
    assert same(load_tensors(checkpoint_path(tmp_path, 4))[0], tensors(2))
    assert [path.name for path in (tmp_path / INCOMING).iterdir()] == [later.parent.name]
    assert later.read_text() == "half"


def test_at_no_moment_has_an_incomplete_directory_a_checkpoints_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is deleted or written, the names of checkpoints always stand for three whole files."""
    commit(tmp_path, 1, 2)
    seen = 0

    def look() -> None:
        nonlocal seen
        seen += 1
        for path in committed(tmp_path):
            assert load_state(path).step == int(path.name[-8:])
            assert all(load_tensors(path))

    def slowly(path: Path, **_: object) -> None:
        for file in sorted(path.iterdir()) if path.exists() else []:
            file.unlink()
            look()
        if path.exists():
            path.rmdir()

    monkeypatch.setattr(commit_module.shutil, "rmtree", slowly)
    monkeypatch.setattr(commit_module, "flush", lambda path: look())
    commit(tmp_path, 2, 3, keep=1)
    monkeypatch.undo()
    assert seen > 15
    assert names(tmp_path) == ["step-00000003"]


def test_a_leftover_of_a_kill_is_overwritten(tmp_path: Path) -> None:
    leftover = tmp_path / INCOMING / "step-00000001"
    leftover.mkdir(parents=True)
    (leftover / "junk").write_text("half")
    commit(tmp_path, 1)
    assert sorted(p.name for p in checkpoint_path(tmp_path, 1).iterdir()) == FILES


def test_on_a_store_they_are_the_same_and_only_the_newest_are_kept(store: UPath, tmp_path: Path) -> None:
    assert newest(store) is None
    commit(store, 100, 9, 2000, keep=2)
    assert names(store) == ["step-00000100", "step-00002000"]
    assert below(store) == [f"{step}/{name}" for step in names(store) for name in FILES]
    found = checkpoint_path(store, 2000)
    assert newest(store) == found
    assert load_state(found) == state(2000)
    weights, moments = load_tensors(found)
    assert same(weights, tensors(2000))
    assert same(moments, tensors(2001))
    commit(tmp_path, 2000)
    assert same(weights, load_tensors(checkpoint_path(tmp_path, 2000))[0])
    for name in FILES:
        assert read_bytes(found / name) == (checkpoint_path(tmp_path, 2000) / name).read_bytes()


@pytest.mark.parametrize("fails", FILES)
def test_what_was_not_written_to_its_end_is_no_checkpoint(fails: str, store: UPath, s3: S3) -> None:
    commit(store, 1)
    (store / "step-notes").write_text("mine")
    s3.fail(denied=1, only=f"PUT .*{fails}")
    with pytest.raises(DataError, match=f"{checkpoint_path(store, 2) / fails}: access denied"):
        commit(store, 2, keep=1)
    s3.fail()
    assert names(store) == ["step-00000001"]
    assert len(below(store)) == 4 + FILES.index(fails)
    checkpoint.clear_incoming(store)
    assert below(store) == [*(f"step-00000001/{name}" for name in FILES), "step-notes"]
    commit(store, 2, keep=1)
    assert names(store) == ["step-00000002"]


def test_what_was_not_removed_to_its_end_is_no_checkpoint(store: UPath, s3: S3) -> None:
    commit(store, 1)
    s3.fail(denied=1, only="DELETE .*model")
    commit(store, 2, keep=1)
    s3.fail()
    assert names(store) == ["step-00000002"]
    assert below(store)[:2] == [f"step-00000001/{name}" for name in FILES[:2]]
    commit(store, 1)  # under the same name as the remains
    assert names(store) == ["step-00000001", "step-00000002"]


def test_a_store_that_fails_is_asked_again_and_one_that_stays_away_is_named(store: UPath, s3: S3) -> None:
    s3.fail(slow_down=0.1, internal_error=0.1, reset=0.05, truncated=0.05, seed=2)
    commit(store, 2, 3)
    assert names(store) == ["step-00000002", "step-00000003"]
    assert same(load_tensors(checkpoint_path(store, 3))[0], tensors(3))
    assert s3.counts()["slow_down"] > 0
    s3.fail(slow_down=1)
    said = rf"{checkpoint_path(store, 4) / 'state.json'} cannot be reached in 8 attempts \(.*\); run the command again"
    with pytest.raises(DataError, match=said):
        commit(store, 4)
    with pytest.raises(DataError, match=rf"{store} cannot be reached in 8 attempts"):
        newest(store)
    s3.fail()
    assert names(store) == ["step-00000002", "step-00000003"]


# ---- while training goes on ----


class Gate:
    """Uploads of tensors wait until it opens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.upload = commit_module.upload
        monkeypatch.setattr(commit_module, "upload", self)

    def __call__(self, local: Path, place: UPath) -> None:
        if local.suffix == ".safetensors":
            self.reached.set()
            assert self.opened.wait(60)
        self.upload(local, place)


def test_what_is_uploaded_is_what_the_tensors_were_when_it_was_begun(store: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, weights, moments = Gate(monkeypatch), tensors(2), tensors(3)
    begun = begin(store, state(2), weights, moments, Keeping())
    assert gate.reached.wait(60)
    for tensor in (*weights.values(), *moments.values()):
        tensor.zero_()
    assert not begun.arrived()
    assert newest(store) is None
    gate.opened.set()
    path = begun.commit()
    assert begun.arrived()
    assert newest(store) == path
    found = load_tensors(path)
    assert same(found[0], tensors(2))
    assert same(found[1], tensors(3))


def test_what_has_arrived_is_no_checkpoint_before_its_commit(store: UPath) -> None:
    begun = begin(store, state(2), tensors(2), tensors(3), Keeping())
    for uploaded in begun.uploads:  # pyright: ignore[reportAttributeAccessIssue]
        uploaded.result(60)
    assert begun.arrived()
    assert names_in(checkpoint_path(store, 2)) == FILES[:2]
    assert newest(store) is None
    begun.close()
    checkpoint.clear_incoming(store)
    assert below(store) == []


def test_what_is_given_up_is_no_checkpoint_and_leaves_nothing_on_the_disk(
    store: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gate = Gate(monkeypatch)
    begun = begin(store, state(2), tensors(2), tensors(3), Keeping())
    assert gate.reached.wait(60)
    assert [path.name.startswith("mmearth-ray-") for path in tmp_path.iterdir()] == [True]
    begun.close()
    assert list(tmp_path.iterdir()) == []
    gate.opened.set()
    assert newest(store) is None


def test_an_upload_that_fails_is_told_at_the_commit(store: UPath, s3: S3) -> None:
    s3.fail(denied=1, only="PUT .*optimizer")
    begun = begin(store, state(2), tensors(2), tensors(3), Keeping())
    with pytest.raises(DataError, match=r"optimizer\.safetensors: access denied"):
        begun.commit()
    assert newest(store) is None
