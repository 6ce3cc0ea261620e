"""Places: against a real S3 server that throttles, breaks and forbids."""

import pickle
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3
from upath import UPath

from mmearth_ray.copies import at_hand
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.files import atomic_text, complete_or_absent
from mmearth_ray.patience import Absent, Patience, explained, is_passing, patiently
from mmearth_ray.storage import (
    PART,
    Location,
    below,
    exists,
    is_remote,
    locate,
    merged,
    names,
    read_bytes,
    read_ranges,
    remove,
    sizes,
    stamp,
)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which take no time here."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def place(s3: S3, name: str = "") -> UPath:
    """A place in a bucket of its own."""
    found = locate(f"{s3.make_bucket()}/{name or 'folder'}", "data.shards")
    assert isinstance(found, UPath)
    return found


def message(call: Any, kind: type[Exception] = DataError) -> str:
    """The one line that a call fails with."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- places ----


def test_a_setting_names_a_path_or_a_url(tmp_path: Path) -> None:
    assert locate("a/b", "k") == Path("a/b")
    assert locate("~/b", "k") == Path.home() / "b"
    assert locate(f"file://{tmp_path}", "k") == tmp_path
    found = locate("s3://bucket/some/prefix/", "k")
    assert is_remote(found)
    assert not is_remote(tmp_path)
    assert str(found / "part.parquet") == "s3://bucket/some/prefix/part.parquet"
    assert pickle.loads(pickle.dumps(found)) == found
    assert len({found, locate("s3://bucket/some/prefix", "k")}) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s4://b/x", "k=s4://b/x: Protocol not known: s4; use a path, s3://bucket/prefix or another URL that fsspec knows"),
        ("://b", "k=://b: no protocol is named; use a path, s3://bucket/prefix or another URL that fsspec knows"),
        ("s3://", "k=s3://: names no bucket; write s3://bucket/prefix"),
        ("s3:///", "k=s3:///: names no bucket; write s3://bucket/prefix"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_at_once(text: str, said: str) -> None:
    assert message(lambda: locate(text, "k"), UsageError) == said


def test_a_protocol_without_its_package_says_which_to_install() -> None:
    assert message(lambda: locate("gs://b/x", "k"), UsageError).startswith("k=gs://b/x: Please install gcsfs")


def test_any_file_system_of_fsspec_will_do() -> None:
    folder = locate("memory://somewhere/x", "k")
    assert isinstance(folder, UPath)
    atomic_text(folder / "a", "text")
    assert read_bytes(folder / "a") == b"text"
    assert names(folder) == ["a"]
    assert read_ranges(folder / "a", [(1, 3)]) == ([b"ex"], 0)
    remove(folder)
    assert names(folder) == []


# ---- files and folders, local or not ----


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return tmp_path / "folder" if request.param == "local" else place(request.getfixturevalue("s3"))


def test_files_are_written_listed_read_and_removed(folder: Location) -> None:
    assert not exists(folder)
    assert names(folder) == []
    if isinstance(folder, Path):
        folder.mkdir()
        (folder / "inner").mkdir()
    for name, text in (("b", "two"), ("a", "öne"), ("inner/c", "x"), ("empty", "")):
        atomic_text(folder / name, text)
    assert exists(folder)
    assert names(folder) == ["a", "b", "empty", "inner"]
    assert {name: size for name, size in sizes(folder).items() if name != "inner"} == {"a": 4, "b": 3, "empty": 0}
    assert read_bytes(folder / "a").decode() == "öne"
    atomic_text(folder / "a", "again")
    assert read_bytes(folder / "a") == b"again"
    assert names(folder / "a") == []
    remove(folder / "a")
    remove(folder / "a")
    assert message(lambda: read_bytes(folder / "a"), Absent) == f"{folder / 'a'} does not exist"
    assert names(folder) == ["b", "empty", "inner"]
    with at_hand(folder, ["b", "inner"] if isinstance(folder, Path) else ["b", "empty"]) as local:
        assert (local / "b").read_text() == "two"
        assert (local == folder) == isinstance(folder, Path)
    assert isinstance(folder, Path) or not local.exists()
    remove(folder)
    assert not exists(folder)


def test_nothing_is_remembered_of_what_another_process_changes(s3: S3) -> None:
    here = place(s3)
    elsewhere = UPath(str(here), skip_instance_cache=True)
    elsewhere.joinpath("a").write_bytes(b"1")
    assert (names(here), sizes(here), stamp(here / "a").size) == (["a"], {"a": 1}, 1)
    before = stamp(here / "a")
    elsewhere.joinpath("a").write_bytes(b"2")
    elsewhere.joinpath("b").write_bytes(b"22")
    assert (names(here), exists(here / "b")) == (["a", "b"], True)
    assert stamp(here / "a") != before
    elsewhere.joinpath("b").unlink()
    assert (names(here), below(here), exists(here / "b")) == (["a"], ["a"], False)


def test_an_upload_happens_only_when_all_went_well(s3: S3) -> None:
    target = place(s3) / "x"

    def write(divisor: int) -> None:
        with complete_or_absent(target) as temporary:
            temporary.write_text(f"{temporary.name} {1 / divisor}")

    with pytest.raises(ZeroDivisionError):
        write(0)
    assert not exists(target)
    write(1)
    assert read_bytes(target) == b"x 1.0"


# ---- faults ----


@pytest.mark.parametrize("kind", ["slow_down", "internal_error", "reset", "truncated"])
def test_passing_faults_are_waited_for_and_counted(kind: str, s3: S3, waits: list[float]) -> None:
    target, data = place(s3) / "x", random.Random(0).randbytes(5000)
    target.write_bytes(data)
    s3.reset_counts()
    s3.fail(**{kind: 1.0}, at_most=3)
    parts, faults = read_ranges(target, [(0, 1000), (1500, 1510), (4000, 5000)])
    assert parts == [data[:1000], data[1500:1510], data[4000:]]
    counts = s3.counts()
    assert counts[kind] == 3
    if kind != "reset":  # aiohttp asks again by itself when a connection that it had kept is cut
        assert faults == 3
        assert counts["GET"] == 6
    assert len(waits) == (1 if faults else 0)
    s3.fail(**{kind: 1.0}, at_most=4)
    assert read_bytes(target) == data


def test_only_what_failed_is_asked_for_again(s3: S3, waits: list[float]) -> None:
    target, data = place(s3) / "x", random.Random(1).randbytes(100_000)
    target.write_bytes(data)
    s3.reset_counts()
    s3.fail(slow_down=0.3, internal_error=0.2, truncated=0.1, seed=3)
    ranges = [(start, start + 500) for start in range(0, 100_000, 1000)]
    parts, faults = read_ranges(target, ranges)
    assert parts == [data[start:stop] for start, stop in ranges]
    counts = s3.counts()
    assert faults == counts["slow_down"] + counts["internal_error"] + counts["truncated"] > 80
    assert counts["GET"] == len(ranges) + faults
    assert counts["bytes"] == 500 * len(ranges) + 250 * counts["truncated"]


def test_long_ranges_go_in_parts_and_copies_are_whole(s3: S3, waits: list[float]) -> None:
    target, data = place(s3) / "x", random.Random(2).randbytes(2 * PART + 5)
    with complete_or_absent(target) as temporary:
        temporary.write_bytes(data)
    s3.reset_counts()
    s3.fail(truncated=0.5, slow_down=0.5, at_most=4, seed=5)
    (whole, nothing), faults = read_ranges(target, [(0, len(data)), (7, 7)])
    assert (whole, nothing) == (data, b"")
    assert s3.counts()["GET"] == 3 + faults > 3
    with at_hand(target.parent, ["x"]) as local:
        assert (local / "x").read_bytes() == data


def test_waits_double_up_to_the_longest() -> None:
    patience = Patience(attempts=8, first_wait=0.2, longest_wait=5)
    for attempt, most in enumerate([0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]):
        drawn = [patience.wait(attempt) for _ in range(200)]
        assert most / 2 <= min(drawn) < max(drawn) <= most
        assert max(drawn) > 1.2 * min(drawn)


def test_it_ends_after_so_many_attempts(s3: S3, waits: list[float]) -> None:
    target = place(s3) / "x"
    target.write_bytes(b"123")
    s3.fail(slow_down=1)
    said = f"{target} cannot be reached in 8 attempts (Please reduce your request rate.); "
    said += "run the command again once its store answers"
    assert message(lambda: read_bytes(target)) == said
    assert len(waits) == 7
    assert message(lambda: read_ranges(target, [(0, 3)])) == said
    assert message(lambda: read_ranges(target, [(0, 3)], Patience(2))) == said.replace("8 attempts", "2 attempts")
    said = said.replace("Please reduce your request rate.", "Service Unavailable")  # HEAD has no body
    assert message(lambda: stamp(target)) == said
    s3.fail()
    assert message(lambda: read_ranges(target, [(1, 5)], Patience(1))).startswith(f"{target} cannot be reached (2 of 4 bytes")


def test_a_store_that_is_not_there_is_named(s3: S3, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    target = UPath(place(s3), skip_instance_cache=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    said = message(lambda: read_bytes(target))
    assert re.fullmatch(rf"{target} cannot be reached in 8 attempts \(Could not connect to the endpoint URL: .*\); .*", said)


# ---- what will not get better ----


def test_lasting_errors_come_at_once_and_say_what_to_do(s3: S3, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = place(s3)
    absent = UPath("s3://no-such-bucket/x", **bucket.storage_options)
    said = f"the bucket of {absent} does not exist; check its name, and AWS_ENDPOINT_URL if it is not on AWS"
    for call in (read_bytes, stamp, lambda p: read_ranges(p, [(0, 1)])):
        assert message(lambda call=call: call(absent), Absent) == said
        assert message(lambda call=call: call(bucket / "x"), Absent) == f"{bucket / 'x'} does not exist"
    assert message(lambda: atomic_text(absent, "x"), Absent) == said
    malformed = UPath("s3://no_Bucket!/x", **bucket.storage_options)
    assert message(lambda: read_bytes(malformed)).startswith(f"{malformed} cannot be used (Parameter validation failed")
    s3.fail(denied=1)
    denied = f"{bucket}: access denied (Access Denied); check the credentials and what they allow"
    assert message(lambda: read_bytes(bucket)) == denied
    assert message(lambda: read_ranges(bucket, [(0, 1)])) == denied
    assert message(lambda: atomic_text(bucket, "x")) == denied
    assert message(lambda: names(bucket)) == denied
    assert message(lambda: exists(bucket)) == denied.replace("Access Denied", "Forbidden")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    stranger = UPath("s3://bucket/x", skip_instance_cache=True)
    assert message(lambda: read_bytes(stranger)) == (
        "s3://bucket/x: there are no usable credentials (Unable to locate credentials); set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket"
    )
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    stranger = UPath("s3://bucket/y", skip_instance_cache=True)
    assert message(lambda: read_bytes(stranger)).startswith(
        "s3://bucket/y cannot be used (The config profile (nobody) could not"
    )
    assert waits == []


def test_a_mistake_in_a_program_is_neither_asked_for_again_nor_taken_for_a_fault() -> None:
    for error in (TypeError("x"), KeyError("x"), DataError("x"), ImportError("x"), PermissionError("x"), OSError(28, "full")):
        assert not is_passing(error)
    for error in (OSError(5, "i/o"), TimeoutError("late"), ConnectionResetError("cut"), RuntimeError("odd")):
        assert is_passing(error)
    assert str(explained("s3://b/x", KeyError("x"), 1)) == (
        "s3://b/x cannot be used (KeyError 'x'); check the URL and the settings of its store"
    )
    with pytest.raises(Absent):
        patiently("s3://b/x", lambda: (_ for _ in ()).throw(Absent("gone")))


def test_ranges_are_joined_over_small_gaps() -> None:
    assert merged([(10, 20), (0, 5), (22, 30), (15, 18)], 2) == [(0, 5), (10, 30)]
    assert merged([(0, 1), (4, 5)], 3) == [(0, 5)]
    assert merged([], 3) == []
