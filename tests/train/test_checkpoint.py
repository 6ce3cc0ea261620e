"""Checkpoints: whole under their name or not there, equal after a round trip, clear errors for what cannot be used."""

import json
from pathlib import Path

import pytest
import torch
from processes import settings, train
from s3_server import S3
from tiny_checkpoint import FILES, commit, load_tensors, names, same, save, state, tensors
from tiny_earth import make_data_set
from upath import UPath

from mmearth_ray.checkpoints.folder import read_tensors
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.storage import Location, read_bytes
from mmearth_ray.train import checkpoint
from mmearth_ray.train.checkpoint import (
    FOLDER,
    INCOMING,
    checkpoint_path,
    load_state,
    newest,
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


def test_the_newest_is_the_one_of_most_steps_whatever_the_order_of_writing(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    commit(tmp_path, 100, 9, 2000)
    assert names(tmp_path) == ["step-00000009", "step-00000100", "step-00002000"]
    assert newest(tmp_path) == checkpoint_path(tmp_path, 2000)


def test_what_is_not_committed_is_not_found(tmp_path: Path) -> None:
    commit(tmp_path, 5)
    for name in ("step-5", "step-00000006.tmp", "other", INCOMING + "/step-00000009"):
        (tmp_path / name).mkdir(parents=True)
    assert names(tmp_path) == ["step-00000005"]


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
