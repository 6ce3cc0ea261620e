"""The command's answers to data sets that cannot be used: one line that names the object, before anything is started."""

import json
from pathlib import Path

import fsspec
import pytest
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray.errors import DataError, UsageError, run_command
from mmearth_ray.pretrain import main
from mmearth_ray.shards.manifest import MANIFEST, digest_of


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    code = run_command(main, ["model.image_size=16", *arguments])
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return code, error


def test_a_bucket_or_data_set_that_is_missing_is_named(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"run.directory={tmp_path / 'run'}"
    code, error = answer(capsys, "data.shards=s3://nowhere/earth", run)
    assert code == 1
    assert "the bucket of s3://nowhere/earth/manifest.json does not exist; check its name" in error
    bucket = s3.make_bucket()
    code, error = answer(capsys, f"data.shards={bucket}/earth", run)
    assert code == 1
    assert f"{bucket}/earth/manifest.json does not exist, so {bucket}/earth is no data set" in error
    code, error = answer(capsys, "data.shards=gopher://old/earth", run)
    assert code == 2
    assert error.startswith("error: data.shards=gopher://old/earth: ")
    assert not (tmp_path / "run").exists()


def test_denied_credentials_are_named(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bucket = s3.make_bucket()
    s3.fail(denied=1.0)
    code, error = answer(capsys, f"data.shards={bucket}/earth", f"run.directory={tmp_path / 'run'}")
    assert code == 1
    assert f"{bucket}/earth/manifest.json: access denied (" in error
    assert "check the credentials and what they allow" in error


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data_set(tmp_path / "data").directory
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    code, error = answer(capsys, f"data.shards={data}", f"data.cache={cache}", f"run.directory={tmp_path / 'run'}")
    assert code == 1
    assert error.startswith(f"error: data.cache={cache}: cannot write ")


def test_data_sets_with_different_tables_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (make_data_set(tmp_path / name, name=name).directory for name in ("one", "other"))
    path = tmp_path / "other" / MANIFEST
    body = json.loads(path.read_text())
    body["table_hash"] = "0" * 64
    body["digest"] = digest_of(body)
    path.write_text(json.dumps(body))
    code, error = answer(capsys, f"data.shards=[{one},{other}]", f"run.directory={tmp_path / 'run'}")
    assert code == 1
    assert error == f"error: {other} was written with another table of modalities; build the data set again\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["data.weights=[1]"], "data.weights has 1 numbers for 2 data sets in data.shards; give one each"),
    (["data.weights=[1,0]"], r"data.weights=\[1.0, 0.0\]: must be above 0"),
    (["data.shards=[]"], r"data.shards=\[\]: name at least one directory or URL of shards"),
    (["data.statistics=release"], "have statistics of their own each; use data.statistics=manifest or a JSON file"),
])  # fmt: skip
def test_settings_of_several_data_sets_are_checked(arguments: list[str], message: str, tmp_path: Path) -> None:
    one, other = (make_data_set(tmp_path / name, name=name).directory for name in ("one", "other"))
    with pytest.raises((UsageError, DataError), match=message):
        main([f"data.shards=[{one},{other}]", "model.image_size=16", f"run.directory={tmp_path / 'run'}", *arguments])


def test_a_store_that_fails_now_and_then_is_read_all_the_same(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the point where Ray would be started."""
    bucket, manifest = s3.make_bucket(), make_data_set(tmp_path / "data", tiles=40, shard_rows=8)
    for path in (tmp_path / "data").iterdir():
        fsspec.filesystem("s3").put_file(str(path), f"{bucket}/earth/{path.name}")
    s3.fail(slow_down=0.1, reset=0.1, truncated=0.1, seed=1)
    seen = []

    def stop(config: object, *places: object) -> None:
        seen.append(places)
        raise DataError("as far as this goes")

    monkeypatch.setattr("mmearth_ray.pretrain.check_initial", lambda experiment: stop(experiment.config, experiment.source))
    with pytest.raises(DataError, match="as far as this goes"):
        main([f"data.shards={bucket}/earth", "model.image_size=16", f"run.directory={tmp_path / 'run'}"])
    ((source,),) = seen
    assert source.samples == manifest.rows == 40
    assert sum(s3.counts()[fault] for fault in ("slow_down", "reset", "truncated")) > 0
