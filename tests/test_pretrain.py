"""The command's answers to data sets that cannot be used: one line that names the object, before anything is started."""

import json
import time
from pathlib import Path

import fsspec
import pytest
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray.errors import DataError, UsageError, run_command
from mmearth_ray.experiment import Experiment
from mmearth_ray.patience import take_noted
from mmearth_ray.pretrain import main
from mmearth_ray.shards.manifest import MANIFEST, digest_of
from mmearth_ray.train.ownership import require_claim


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


class Launched(Exception):
    """The workers would be started now."""


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Experiment:
    """Run the command up to the point where it hands the experiment to its workers."""
    handed = []

    def launch(experiment: Experiment) -> bool:
        handed.append(experiment)
        raise Launched

    monkeypatch.setattr("mmearth_ray.train.launch.start_ray", lambda config: None)
    monkeypatch.setattr("mmearth_ray.train.launch.launch", launch)
    with pytest.raises(Launched):
        main(["model.image_size=16", *arguments])
    return handed[0]


def test_two_runs_do_not_share_a_folder_of_checkpoints(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they before the first checkpoint.  A fresh machine goes on by the run's id; the command that it replaces stops."""
    data, kept = make_data_set(tmp_path / "data").directory, f"{s3.make_bucket()}/first"
    same = (f"data.shards={data}", f"checkpoint.directory={kept}")
    first = command(monkeypatch, *same, f"run.directory={tmp_path / 'a'}")
    name = json.loads((tmp_path / "a" / "run.json").read_text())["run"]
    require_claim(first)
    code, error = answer(capsys, *same, f"run.directory={tmp_path / 'b'}")
    assert code == 2
    assert error.startswith(f"error: the checkpoints in {kept} are those of the run {name} ({tmp_path / 'a'} on ")
    assert error.endswith(f"a checkpoint.directory of its own, or go on with that one from here by run.id={name}\n")
    assert not (tmp_path / "b").exists()
    require_claim(first)
    again = command(monkeypatch, *same, f"run.directory={tmp_path / 'a'}")
    fresh = command(monkeypatch, *same, f"run.directory={tmp_path / 'b'}", f"run.id={name}")
    assert json.loads((tmp_path / "b" / "run.json").read_text())["run"] == name
    for replaced in (first, again):
        with pytest.raises(DataError, match=f"^{kept} was claimed by another command .* this one saves nothing more there"):
            require_claim(replaced)
    require_claim(fresh)
    command(monkeypatch, f"data.shards={data}", f"run.directory={tmp_path / 'c'}")
    assert (tmp_path / "c" / "checkpoints" / "owner.json").exists()
    kept = str(tmp_path / "c" / "checkpoints")
    code, error = answer(capsys, f"data.shards={data}", f"checkpoint.directory={kept}", f"run.directory={tmp_path / 'd'}")
    assert code == 2
    assert f"the checkpoints in {kept} are those of the run" in error


def test_a_timeout_shorter_than_the_patience_with_a_store_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = make_data_set(tmp_path / "data").directory
    for arguments in (["data.shards=s3://b/earth"], [f"data.shards={local}", "checkpoint.directory=s3://b/first"]):
        code, error = answer(capsys, *arguments, "train.hang_timeout=149", f"run.directory={tmp_path / 'run'}")
        assert code == 2
        place = "s3://b/earth" if len(arguments) == 1 else "s3://b/first"
        assert error == (
            f"error: train.hang_timeout=149: workers may wait longer for {place}; use at least 150, or a local directory\n"
        )


def test_faults_before_the_start_are_said(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the manifest, of choosing tiles and of looking for checkpoints, each request of which fails once."""
    bucket = s3.make_bucket()
    make_data_set(tmp_path / "data", tiles=20, held_out=4)
    for path in (tmp_path / "data").iterdir():
        fsspec.filesystem("s3").put_file(str(path), f"{bucket}/earth/{path.name}")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    arguments = (f"data.shards={bucket}/earth", f"checkpoint.directory={bucket}/kept", f"run.directory={tmp_path / 'run'}")
    take_noted()
    command(monkeypatch, *arguments)
    assert "failed" not in capsys.readouterr().out
    s3.reset_counts()
    s3.fail(slow_down=0.25, internal_error=0.2, seed=2)
    command(monkeypatch, *arguments, "data.attempts=20")
    counts = s3.counts()
    failed = counts["slow_down"] + counts["internal_error"]
    assert failed > 3
    assert f"requests to a store that failed so far and were asked again: {failed}\n" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["run.directory", "checkpoint.directory"])
def test_a_file_where_a_directory_is_wanted_is_named(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    data = make_data_set(tmp_path / "data").directory
    for given in (tmp_path / "file", tmp_path / "file" / "run"):
        code, error = answer(capsys, f"data.shards={data}", f"run.directory={tmp_path / 'run'}", f"{key}={given}")
        assert (code, error) == (2, f"error: {key}={given}: {tmp_path / 'file'} is a file; name a directory\n")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("key", ["run.directory", "checkpoint.directory"])
def test_a_job_does_not_write_into_a_copy_that_ray_throws_away(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UsageError, match=rf"{key}=runs/a is relative to a copy of the working directory"):
        main([f"run.directory={tmp_path}", f"{key}=runs/a"])
    assert list(copy.iterdir()) == []


def test_nothing_to_evaluate_on_is_said_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data_set(tmp_path / "data").directory
    given = [f"data.shards={data}", f"run.directory={tmp_path / 'run'}", "eval.every=5"]
    code, error = answer(capsys, *given)
    assert code == 2
    assert error.startswith("error: eval.every=5: no tile is held out (data.validate_where=")
    code, error = answer(capsys, *given, f"eval.task={tmp_path / 'nowhere'}")
    assert code == 1
    assert f"{tmp_path / 'nowhere'} is no labelled data set" in error
    assert not (tmp_path / "run" / "config.yaml").exists()
