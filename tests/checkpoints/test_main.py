"""The commands import and export: every form there and back, one line for every mistake."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import train
from published_case import STRUCTURES, make_case
from s3_server import S3
from safetensors.torch import load_file
from tiny_earth import make_data_set
from torch import Tensor

from mmearth_ray.checkpoints.__main__ import main
from mmearth_ray.checkpoints.folder import open_exported
from mmearth_ray.errors import run_command
from mmearth_ray.storage import locate, names
from mmearth_ray.train import checkpoint, commit

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must succeed and returns what it printed."""

    def command(*arguments: object) -> str:
        assert run_command(main, [str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    return command


def save(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state, "epoch": 3, "args": None}, path)
    return path


def test_import_then_export_gives_the_file_back(run: Run, tmp_path: Path) -> None:
    state = make_case(STRUCTURES["patch 32, two decoder blocks"]).state
    printed = run("import", save(tmp_path / "a.pth", state), tmp_path / "model")
    assert "channels [8, 16, 16, 24], patch 32 px, modified stem" in printed
    assert "no statistics" in printed
    run("export", tmp_path / "model", tmp_path / "b.pth")
    again = torch.load(tmp_path / "b.pth", weights_only=False)["model"]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_statistics_come_from_the_converted_release(run: Run, tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=8, size=32)
    pth = save(tmp_path / "a.pth", make_case({}).state)
    assert run_command(main, ["import", str(pth), str(tmp_path / "model"), f"shards={data.directory}"]) == 1
    replace(data, release_statistics=data.statistics).save()
    run("import", pth, tmp_path / "model", f"shards={data.directory}")
    description = open_exported(tmp_path / "model").description
    assert description.statistics is not None
    expected = data.statistics["sentinel2"]["l2a"]["B3"]["mean"]
    assert description.statistics["l2a"]["mean"][2] == pytest.approx(expected, rel=1e-6)
    assert description.data_set == data.name


def test_a_run_and_its_checkpoint_export_alike(run: Run, tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=8, size=32).directory
    train(data, tmp_path / "run", "train.steps=2", "model.stem=original", "model.image_size=32", "model.patch_size=16")
    from_run, from_checkpoint = tmp_path / "run.pth", tmp_path / "checkpoint.pth"
    run("export", tmp_path / "run", from_run)
    run("export", tmp_path / "run" / "checkpoints" / "step-00000002", from_checkpoint)
    states = [torch.load(path, weights_only=False)["model"] for path in (from_run, from_checkpoint)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    run("import", from_run, tmp_path / "again")
    ours, back = (open_exported(tmp_path / name) for name in ("run", "again"))
    assert all(torch.equal(value, back.tensors()[name]) for name, value in ours.tensors().items())
    assert ours.description == back.description


def test_a_checkpoint_on_a_store_exports_alike_however_many_files_hold_it(
    run: Run, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data_set(tmp_path / "data", tiles=8, size=32)
    monkeypatch.setattr(commit, "LIMIT", 1 << 20)
    kept = f"{s3.make_bucket()}/kept"
    train(data.directory, tmp_path / "run", "train.steps=1", "validate.tiles=0", f"checkpoint.directory={kept}")
    (place,) = checkpoint.committed(locate(kept, "checkpoint.directory"))
    assert sum(name.startswith("model-") for name in names(place)) > 3
    s3.fail(denied=1, only="(GET|HEAD) .*optimizer")  # the moments stay where they are
    run("export", place, tmp_path / "a", "format=model")
    run("export", tmp_path / "run", tmp_path / "b", "format=model")
    for name in ("encoder.safetensors", "pretraining.safetensors"):
        ours, theirs = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_what_lies_in_the_way_is_never_lost(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pth, model, home = save(tmp_path / "a.pth", make_case({}).state), tmp_path / "model", tmp_path / "home"
    run("import", pth, model)
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for arguments, message in [
        (("import", pth, home), "holds other things (thesis.txt), which would be lost"),
        (("export", model, home), "holds other things (thesis.txt), which would be lost"),
        (("export", model, tmp_path), "holds other things"),
        (("export", model, model), "is the model itself"),
        (("export", model, home, "format=onnx"), "it is a folder; format=onnx writes a file"),
        (("import", pth, pth), "is a file"),
    ]:
        assert run_command(main, [str(a) for a in arguments]) == 2
        assert message in capsys.readouterr().err
    assert (home / "thesis.txt").read_text() == "years of work"
    assert (model / "pretraining.safetensors").is_file()
    run("import", pth, model)  # another model may be replaced


def test_the_encoder_alone_is_a_folder_with_a_card(run: Run, tmp_path: Path) -> None:
    run("import", save(tmp_path / "a.pth", make_case({}).state), tmp_path / "model")
    run("export", tmp_path / "model", tmp_path / "encoder")
    assert sorted(p.name for p in (tmp_path / "encoder").iterdir()) == ["README.md", "config.json", "encoder.safetensors"]
    run("export", tmp_path / "model", tmp_path / "whole", "format=model")
    assert (tmp_path / "whole" / "pretraining.safetensors").is_file()
    weights = [load_file(tmp_path / name / "encoder.safetensors") for name in ("model", "encoder")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["bands"][0] == "B1"


def test_of_several_image_sizes_each_goes_out_by_itself_and_the_model_with_all(run: Run, tmp_path: Path) -> None:
    make_data_set(tmp_path / "data", tiles=8, size=64)
    train(tmp_path / "data", tmp_path / "run", "train.steps=2", "model.image_sizes=[32,64]")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    weights = load_file(checkpoint / "model.safetensors")

    run("export", checkpoint, tmp_path / "all", "format=model")
    run("export", checkpoint, tmp_path / "all", "format=model")  # what was there is an exported model, and replaced
    for name in ("config.json", "encoder.safetensors", "pretraining.safetensors"):
        for place in (name, f"patch-16/{name}"):
            assert (tmp_path / "all" / place).read_bytes() == (tmp_path / "run" / "exported" / place).read_bytes()
    assert open_exported(tmp_path / "all").tensors().keys() == weights.keys()

    run("export", checkpoint, tmp_path / "encoder")
    assert sorted(p.name for p in (tmp_path / "encoder").iterdir()) == ["README.md", "config.json", "encoder.safetensors"]
    assert open_exported(tmp_path / "encoder").description.image_sizes == []

    for source, prefix in ((checkpoint, "model."), (tmp_path / "run" / "exported" / "patch-16", "model.sizes.16.")):
        pth, again = tmp_path / f"{source.name}.pth", tmp_path / f"{source.name}-again"
        run("export", source, pth)
        run("import", pth, again)
        back, stem = open_exported(again), "encoder.stem.0.weight"
        assert torch.equal(back.tensors()[f"model.{stem}"], weights[f"{prefix}{stem}"])
        assert back.description.patch_size == (16 if "sizes" in prefix else 8)
        assert not any("sizes" in name for name in back.tensors())


def test_timm_names_where_the_structure_is_the_same(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("import", save(tmp_path / "a.pth", make_case({"stem": "original", "patch_size": 32}).state), tmp_path / "same")
    run("export", tmp_path / "same", tmp_path / "timm.safetensors")
    assert "stages.1.downsample.1.weight" in load_file(tmp_path / "timm.safetensors")
    run("import", save(tmp_path / "b.pth", make_case({}).state), tmp_path / "other")
    assert run_command(main, ["export", str(tmp_path / "other"), str(tmp_path / "no.safetensors")]) == 1
    assert "original" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "name a command: import, export"),
        (("improt",), 2, "there is no command 'improt'"),
        (("import", "FILE"), 2, "usage: python -m mmearth_ray.checkpoints import FILE.pth OUT [key=value ...]"),
        (("import", "none.pth", "OUT"), 1, "cannot be read as a PyTorch checkpoint"),
        (("export", "nothing", "OUT.pth"), 1, "nothing is no exported model"),
        (("export", "nothing", "OUT.h5"), 2, "its suffix is none of .pth, .onnx and .safetensors"),
        (("export", "nothing", "OUT", "format=tensorflow"), 2, "format"),
        (("export", "nothing", "no/such/folder/OUT.pth"), 2, "there is no folder no/such/folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_command(main, list(arguments)) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
