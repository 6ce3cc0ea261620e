from pathlib import Path

import pytest
from release_fixture import write_release

from mmearth_ray.errors import run_command
from mmearth_ray.settings import load, walk
from mmearth_ray.shards.__main__ import PROGRAM, main


def run(*arguments: object) -> int:
    return run_command(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("main") / "r", tiles=6, size=8)


def test_convert_verify_inspect(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    assert run("convert", release, out, "workers=1", "name=small") == 0
    assert "6 tiles in 1 shard, digest " in capsys.readouterr().out
    assert run("verify", out) == 0
    assert capsys.readouterr().out == "ok: 6 tiles in 1 shard\n"
    assert run("inspect", out) == 0
    assert "name       small" in capsys.readouterr().out
    (out / "part-00000.parquet").unlink()
    assert run("verify", out) == 1
    assert capsys.readouterr().out == "problem: part-00000.parquet: is missing\n1 problem in 6 tiles in 1 shard\n"
    assert run("inspect", out, f"figure={tmp_path / 'f.png'}") == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", PROGRAM.commands)
def test_help_lists_every_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    text = capsys.readouterr().out
    assert run("--help") == 0
    whole = capsys.readouterr().out
    for key, entry, _ in walk(PROGRAM.commands[name].settings()):
        assert f"  {key}=" in text
        assert f"  {key}=" in whole
        assert entry.metadata["meaning"] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a command"),
        (("converge",), "there is no command 'converge'"),
        (("convert",), "usage: python -m mmearth_ray.shards convert RELEASE_DIR OUT"),
        (("convert", "r", "seed=1"), "usage: "),
        (("convert", "--fast", "r"), "usage: "),
        (("convert", "r", "o", "sed=1"), "did you mean seed"),
        (("convert", "r", "o", "workers=-1"), "workers=-1: must be at least 0"),
        (("convert", "r", "o", "holdout=1"), "must be below 1"),
        (("convert", "r", "o", "statistics=none"), "must be one of release, manifest"),
        (("convert", "r", "o", "seed=x"), "seed must be a whole number"),
        (("convert", "r", "o", "--force"), "not of the form key=value"),
        (("verify", "o", "sample=2"), "must be at most 1"),
        (("inspect", "o", "tile=3"), "add figure=PATH"),
    ],
)
def test_wrong_commands_exit_2_with_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [("convert", "/nowhere", "/tmp/never"), ("verify", "/nowhere"), ("inspect", "/nowhere")])
def test_wrong_data_exits_1_with_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "/nowhere" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("tile", ["12_0", "007", "1e3", "true", "840"])
def test_a_tile_id_is_taken_as_it_stands(tile: str) -> None:
    assert load(PROGRAM.commands["inspect"].settings(), (), [f"tile={tile}"]).tile == tile
    assert load(PROGRAM.commands["inspect"].settings(), (), ["tile=null"]).tile is None
