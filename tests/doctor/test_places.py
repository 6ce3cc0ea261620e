"""Places: what is written is read back and goes again, whatever happens; what is wrong is one line."""

import errno
import os
import threading
from pathlib import Path

import pytest
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray.doctor import places
from mmearth_ray.doctor.places import Speed, made, read_shards, standing, write_and_read
from mmearth_ray.errors import DataError
from mmearth_ray.shards.manifest import load_manifest
from mmearth_ray.storage import locate, names

SIZE = 20 << 20
"""More than goes up at once, so that it goes in pieces."""


def test_a_directory_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    speed = write_and_read(tmp_path / "a" / "b", SIZE)
    assert speed.size == SIZE
    assert speed.read > 0
    assert speed.write > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_text("")
    write_and_read(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_directory_that_was_made_stays_if_others_use_it(tmp_path: Path) -> None:
    with made(tmp_path / "a" / "b"):
        (tmp_path / "a" / "other").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"cannot write {tmp_path}/file/run: .*; correct the path, or its permissions"):
        write_and_read(tmp_path / "file" / "run")


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=f"no space left on the disk of {tmp_path}/run while writing .mmearth-ray-doctor-"):
        write_and_read(tmp_path / "run", SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_does_not_hold_what_was_written_is_noticed(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(100))
    with pytest.raises(DataError, match="ended 28 bytes early"):
        places._read(short, 128)


def test_a_store_is_measured_and_left_as_it_was(s3: S3) -> None:
    bucket = s3.make_bucket()
    folder = locate(f"{bucket}/runs/one", "checkpoint.directory")
    speed = write_and_read(folder, SIZE)
    assert speed.size == SIZE
    assert s3.counts()["bytes"] == SIZE
    assert names(locate(f"{bucket}/runs", "x")) == []


def test_a_bucket_that_is_missing_is_named(s3: S3) -> None:
    with pytest.raises(DataError, match=r"the bucket of s3://nowhere/runs/.* does not exist; check its name"):
        write_and_read(locate("s3://nowhere/runs", "checkpoint.directory"), SIZE)


def test_a_store_that_may_not_be_written_is_named(s3: S3) -> None:
    bucket = s3.make_bucket()
    s3.fail(denied=1.0, only="PUT|POST")
    with pytest.raises(DataError, match=r"access denied .*; check the credentials and what they allow"):
        write_and_read(locate(f"{bucket}/runs", "checkpoint.directory"), 1000)


def test_shards_are_read_up_to_a_limit(s3: S3, tmp_path: Path) -> None:
    manifest = make_data_set(tmp_path / "data")
    total = sum(shard.bytes for shard in manifest.shards)
    assert len(manifest.shards) == 2
    assert read_shards(manifest).size == total
    assert read_shards(manifest, total - 1).size == total - 1
    bucket = s3.make_bucket("tiles-for-the-doctor")
    place = locate(f"{bucket}/tiny", "data.shards")
    for path in (tmp_path / "data").iterdir():
        place.joinpath(path.name).write_bytes(path.read_bytes())
    s3.reset_counts()
    remote = load_manifest(place)
    before = s3.counts()["bytes"]
    assert read_shards(remote, 1000).size == 1000
    assert s3.counts()["bytes"] - before == 1000
    (tmp_path / "data" / manifest.shards[1].file).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_shards(manifest)


def test_speeds_are_said_of_what_was_done() -> None:
    assert str(Speed(64_000_000, 0.5, 2.0)) == "64.0 MB written at 32 MB/s and read at 128 MB/s"
    assert str(Speed(64_000_000, 0.5)) == "64.0 MB read at 128 MB/s"


def test_what_a_check_that_was_given_up_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_standing", {})
    hung = standing(tmp_path / "run")
    probe = hung.__enter__()
    assert isinstance(probe, Path)
    probe.write_text("")
    probe.with_name(f".{probe.name}.1.tmp").write_text("")  # half of one
    assert places.sweep() == []
    assert list(tmp_path.iterdir()) == []
    hung.__exit__(None, None, None)  # the check ends after all
    assert places.sweep() == []


def test_what_cannot_be_swept_in_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_standing", {})
    answered = threading.Event()
    with standing(tmp_path) as probe, monkeypatch.context() as patch:
        patch.setattr(places, "_clear", lambda place: answered.wait(60))
        assert places.sweep(0.05) == [probe]
        answered.set()
    assert places.sweep() == []


def test_a_store_that_went_away_leaves_a_name_until_it_is_back(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_standing", {})
    folder = locate(f"{s3.make_bucket()}/runs", "checkpoint.directory")
    check = standing(folder)
    probe = check.__enter__()
    probe.write_bytes(b"word")
    s3.fail(denied=1.0)
    with pytest.raises(DataError, match="access denied"):
        check.__exit__(None, None, None)
    assert places.sweep() == [probe]
    s3.fail()
    assert places.sweep() == []
    assert names(folder) == []
