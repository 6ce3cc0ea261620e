"""Checkpoints: whole under their name or not there, equal after a round trip, clear errors for what cannot be used."""

import json
from pathlib import Path

import pytest
import torch
from processes import settings, train
from s3_server import S3
from safetensors.torch import save_file
from tiny_checkpoint import FILES, commit, load_tensors, names, same, state, tensors
from tiny_earth import make_data_set
from torch import Tensor, nn
from upath import UPath

from mmearth_ray.checkpoints.folder import read_tensors
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.storage import Location, below, read_bytes
from mmearth_ray.train import checkpoint
from mmearth_ray.train.checkpoint import (
    FOLDER,
    INCOMING,
    checkpoint_path,
    committed,
    load_state,
    newest,
    save,
)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_tensors_and_state_are_equal_after_a_round_trip(kind: torch.dtype, tmp_path: Path) -> None:
    weights, moments = tensors(1, kind), tensors(2, kind)
    weights["view"] = weights["a.weight"].t()
    path = save(tmp_path, state(7), weights, moments, keep=3)
    assert path == checkpoint_path(tmp_path, 7) == tmp_path / "step-00000007"
    assert load_state(path) == state(7)
    for given, found in zip((weights, moments), load_tensors(path), strict=True):
        assert found.keys() == given.keys()
        for name in given:
            assert found[name].dtype == given[name].dtype
            assert torch.equal(found[name], given[name])


def test_parameters_that_need_gradients_are_saved_by_value(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    path = save(tmp_path, state(1), dict(module.named_parameters()), {}, keep=0)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        module.weight.add_(1)
    assert same(load_tensors(path)[0], expected)


def test_the_newest_is_the_one_of_most_steps_whatever_the_order_of_writing(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    commit(tmp_path, 100, 9, 2000)
    assert names(tmp_path) == ["step-00000009", "step-00000100", "step-00002000"]
    assert newest(tmp_path) == checkpoint_path(tmp_path, 2000)


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


def test_what_is_not_committed_is_not_found(tmp_path: Path) -> None:
    commit(tmp_path, 5)
    for name in ("step-5", "step-00000006.tmp", "other", INCOMING + "/step-00000009"):
        (tmp_path / name).mkdir(parents=True)
    assert names(tmp_path) == ["step-00000005"]


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

    monkeypatch.setattr(checkpoint, "save_file", save_file_until)
    if fails == "state":
        monkeypatch.setattr(Path, "write_text", full)
    if fails == "flush":
        monkeypatch.setattr(checkpoint, "flush", full)
    for step in (1, 2):
        with pytest.raises(DataError) as caught:
            save(tmp_path, state(step), tensors(8), tensors(9), keep=1)
        message = str(caught.value)
        assert message.startswith(f"cannot write the checkpoint {checkpoint_path(tmp_path, step)}: [Errno 28]")
        assert message.endswith("free space and run the command again")
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]
    assert list((tmp_path / INCOMING).iterdir()) == []
    assert same(load_tensors(checkpoint_path(tmp_path, 1))[0], tensors(1))


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

    monkeypatch.setattr(checkpoint.shutil, "rmtree", slowly)
    monkeypatch.setattr(checkpoint, "flush", lambda path: look())
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


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 1}', json.dumps(vars(state(1)) | {"more": 1}), None])
def test_a_damaged_state_is_a_data_error_with_the_remedy(text: str | None, tmp_path: Path) -> None:
    commit(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    (path / "state.json").unlink()
    if text is not None:
        (path / "state.json").write_text(text)
    said = rf"the checkpoint {path} cannot be read \(.*\); remove it to resume from the one before"
    with pytest.raises(DataError, match=said):
        load_state(path)


@pytest.mark.parametrize("data", [b"", b"junk that is no safetensors file", None])
def test_damaged_tensors_are_a_data_error(data: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path} cannot be read"):
        read_tensors(path)


# ---- on an object store ----


def test_a_setting_says_where_they_are(tmp_path: Path) -> None:
    def where(*arguments: str) -> Location:
        return checkpoint.directory_of(settings(tmp_path, tmp_path / "run", *arguments))

    assert where() == tmp_path / "run" / FOLDER
    assert where(f"checkpoint.directory={tmp_path / 'other'}") == tmp_path / "other"
    assert str(where("checkpoint.directory=s3://bucket/run/")) == "s3://bucket/run"
    with pytest.raises(UsageError, match=r"checkpoint\.directory=s4://bucket/run: Protocol not known: s4"):
        where("checkpoint.directory=s4://bucket/run")


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


def test_damage_on_a_store_is_a_data_error_with_the_remedy(store: UPath) -> None:
    commit(store, 1)
    path = checkpoint_path(store, 1)
    assert isinstance(path, UPath)
    (path / "optimizer.safetensors").write_bytes(b"junk")
    said = rf"the checkpoint {path} cannot be read \(.*\); remove it to resume from the one before"
    with pytest.raises(DataError, match=said):
        load_tensors(path)
    (path / "state.json").write_bytes(b"{}")
    with pytest.raises(DataError, match=said):
        load_state(path)


def test_the_moments_of_a_store_stay_there_where_weights_alone_are_wanted(store: UPath, s3: S3, tmp_path: Path) -> None:
    commit(tmp_path, 1)
    commit(store, 1)
    s3.fail(denied=1, only="(GET|HEAD) .*optimizer")
    for folder in (store, tmp_path):
        with checkpoint.opened(checkpoint_path(folder, 1), moments=False) as (weights, moments):
            assert same({name: weights[name] for name in weights}, tensors(1))
            assert not moments
    with pytest.raises(DataError, match="access denied"), checkpoint.opened(checkpoint_path(store, 1)):
        pass


def test_a_run_resumes_from_a_store_bit_for_bit(store: UPath, s3: S3, tmp_path: Path) -> None:
    shards = tmp_path / "tiny"
    make_data_set(shards, tiles=18, size=32)
    recipe = ("train.steps=2", "optimizer.lr=1e-3", "checkpoint.every=1", "checkpoint.keep=1", "validate.tiles=0")
    train(shards, tmp_path / "whole", *recipe)
    s3.fail(slow_down=0.1, internal_error=0.1, seed=4)
    for stop in (1, 2):
        train(shards, tmp_path / "parts", *recipe, f"checkpoint.directory={store}", f"train.stop_at={stop}")
        assert names(store) == [f"step-{stop:08d}"]
    assert not (tmp_path / "parts" / FOLDER).exists()
    away, whole = checkpoint_path(store, 2), checkpoint_path(tmp_path / "whole" / FOLDER, 2)
    assert all(read_bytes(away / name) == read_bytes(whole / name) for name in FILES[:2])
