"""Checkpoints: whole under their name or not there, equal after a round trip, clear errors for what cannot be used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmearth_ray.checkpoints.folder import read_tensors
from mmearth_ray.errors import DataError
from mmearth_ray.train import checkpoint
from mmearth_ray.train.checkpoint import (
    FOLDER,
    INCOMING,
    State,
    checkpoint_path,
    committed,
    load_state,
    newest,
    save,
)


def tensors(seed: int, kind: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 4), "a.bias": (3,), "scalar": (), "empty": (0, 2)}
    return {name: (100 * torch.randn(shape, generator=generator)).to(kind) for name, shape in shapes.items()}


def state(step: int) -> State:
    settings = {"model.size": "atto", "model.targets": ["x", "y"], "optimizer.lr": None, "optimizer.base_lr": 1.5e-4, "seed": 0}
    return State(step, step * 64, settings, {"data": "d1", "table": "t1"}, {"torch": "2", "commit": "å"})


def commit(run: Path, *steps: int, keep: int = 0) -> None:
    for step in steps:
        save(run, state(step), tensors(step), tensors(step + 1), keep)


def names(run: Path) -> list[str]:
    return [path.name for path in committed(run)]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_tensors_and_state_are_equal_after_a_round_trip(kind: torch.dtype, tmp_path: Path) -> None:
    weights, moments = tensors(1, kind), tensors(2, kind)
    weights["view"] = weights["a.weight"].t()
    path = save(tmp_path, state(7), weights, moments, keep=3)
    assert path == checkpoint_path(tmp_path, 7) == tmp_path / "checkpoints" / "step-00000007"
    assert load_state(path) == state(7)
    for given, part in ((weights, "model"), (moments, "optimizer")):
        found = read_tensors(path / f"{part}.safetensors")
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
    found = read_tensors(path / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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
    assert list((tmp_path / "two" / FOLDER / INCOMING).iterdir()) == []


def test_what_is_not_committed_is_not_found(tmp_path: Path) -> None:
    commit(tmp_path, 5)
    for name in ("step-5", "step-00000006.tmp", "other", INCOMING + "/step-00000009"):
        (tmp_path / FOLDER / name).mkdir(parents=True)
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
    assert list((tmp_path / FOLDER / INCOMING).iterdir()) == []
    assert torch.equal(read_tensors(checkpoint_path(tmp_path, 1) / "model.safetensors")["a.weight"], tensors(1)["a.weight"])


def test_at_no_moment_has_an_incomplete_directory_a_checkpoints_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is deleted or written, the names of checkpoints always stand for three whole files."""
    commit(tmp_path, 1, 2)
    seen = 0

    def look() -> None:
        nonlocal seen
        seen += 1
        for path in committed(tmp_path):
            assert load_state(path).step == int(path.name[-8:])
            assert read_tensors(path / "model.safetensors")
            assert read_tensors(path / "optimizer.safetensors")

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
    leftover = tmp_path / FOLDER / INCOMING / "step-00000001"
    leftover.mkdir(parents=True)
    (leftover / "junk").write_text("half")
    commit(tmp_path, 1)
    assert sorted(p.name for p in checkpoint_path(tmp_path, 1).iterdir()) == [
        "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 1}', json.dumps(vars(state(1)) | {"more": 1}), None])
def test_a_damaged_state_is_a_data_error_with_the_remedy(text: str | None, tmp_path: Path) -> None:
    commit(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    (path / "state.json").unlink()
    if text is not None:
        (path / "state.json").write_text(text)
    with pytest.raises(
        DataError, match=rf"the checkpoint {path} cannot be read \(.*\); remove it to resume from the one before"
    ):
        load_state(path)


@pytest.mark.parametrize("data", [b"", b"junk that is no safetensors file", None])
def test_damaged_tensors_are_a_data_error(data: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path} cannot be read"):
        read_tensors(path)
