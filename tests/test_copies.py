"""Whole files on their way to a store that loses, breaks and forgets, and from it."""

import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from s3_server import S3
from upath import UPath

from mmearth_ray import copies
from mmearth_ray.copies import at_hand, scratch, upload
from mmearth_ray.errors import DataError
from mmearth_ray.files import atomic_text
from mmearth_ray.patience import SLOWEST, Patience, take_noted
from mmearth_ray.storage import below, exists, locate, read_bytes

QUICK = Patience(first_wait=0.001, longest_wait=0.01)
PIECE = 5 << 20  # the least that S3 takes


def place(s3: S3) -> UPath:
    """A place in a bucket of its own."""
    found = locate(f"{s3.make_bucket()}/folder/x", "data.shards")
    assert isinstance(found, UPath)
    return found


@pytest.fixture
def long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three pieces."""
    monkeypatch.setattr(copies, "PIECE", PIECE)
    path = tmp_path / "long"
    path.write_bytes(random.Random(0).randbytes(2 * PIECE + 5))
    return path


def test_only_the_pieces_that_failed_are_sent_again_and_every_fault_is_noted(s3: S3, long_file: Path) -> None:
    target = place(s3)
    s3.fail(slow_down=0.3, internal_error=0.2, only="^(PUT|POST)", seed=4, at_most=5)
    s3.reset_counts()
    take_noted()
    upload(long_file, target, QUICK)
    counts = s3.counts()
    assert counts["slow_down"] + counts["internal_error"] == take_noted() == 5
    assert counts["PUT"] + counts["POST"] == 3 + 2 + 5
    assert read_bytes(target) == long_file.read_bytes()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_upload_whose_end_was_answered_but_not_heard_is_whole(number: int, s3: S3, long_file: Path) -> None:
    """The answers to the first, both or none of create and complete are lost after the store did what it was asked."""
    target = place(s3)
    s3.fail(lost=1.0, only="^POST", at_most=number)
    upload(long_file, target, QUICK)
    assert s3.counts()["lost"] == number
    assert read_bytes(target) == long_file.read_bytes()
    target.unlink()
    s3.fail(lost=0.5, only="^(PUT|POST)", seed=number)
    upload(long_file, target, Patience(40, first_wait=0.001, longest_wait=0.01))
    assert read_bytes(target) == long_file.read_bytes()


def test_a_long_upload_that_fails_shows_nothing_and_is_taken_back(s3: S3, long_file: Path) -> None:
    target = place(s3)
    s3.fail(denied=1.0, only="^PUT")
    with pytest.raises(DataError, match=f"{target}: access denied"):
        upload(long_file, target, QUICK)
    assert s3.counts()["DELETE"] == 1
    assert not exists(target)
    s3.fail(slow_down=1.0, only="^PUT")
    with pytest.raises(DataError, match=f"{target} cannot be reached in 3 attempts"):
        upload(long_file, target, Patience(3, first_wait=0.001))
    assert below(target.parent) == []


@contextmanager
def deaf() -> Iterator[str]:
    """The address of a server that takes connections and reads nothing from them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("size", [10, 2 * PIECE])
def test_a_store_that_reads_nothing_is_given_up(size: int, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer body does not fit into the buffers of a connection, so that its sending never ends."""
    target = UPath(place(s3), skip_instance_cache=True)
    (tmp_path / "x").write_bytes(bytes(size))
    patience = Patience(attempts=20, first_wait=0.01, seconds=1.0, request=0.5 - size / SLOWEST)
    with deaf() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(DataError, match=rf"{target} cannot be reached( in [123] attempts)? \(no answer within 0\.5 s\)"):
            upload(tmp_path / "x", target, patience)


def test_without_a_place_for_temporary_files_the_error_names_it(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = place(s3)
    target.write_bytes(b"1")
    gone = tmp_path / "gone"
    monkeypatch.setenv("TMPDIR", str(gone))
    monkeypatch.setattr(tempfile, "tempdir", str(gone))

    def copy() -> None:
        with at_hand(target.parent, ["x"]):
            pass

    said = rf"^TMPDIR={gone} cannot be used \(No such file or directory\); set TMPDIR to a directory that can be written"
    for call in (copy, lambda: atomic_text(target, "2")):
        with pytest.raises(DataError, match=said):
            call()
    monkeypatch.delenv("TMPDIR")
    with pytest.raises(DataError, match=r"^the directory for temporary files cannot be used \("):
        copy()
    assert read_bytes(target) == b"1"


def test_temporary_files_go_whatever_happens_to_them() -> None:
    with scratch() as folder:
        (folder / "x").write_text("x")
    assert not folder.exists()
    with scratch() as folder:
        folder.rmdir()


def test_a_disk_of_temporary_files_that_is_full_is_named(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    target = place(s3)
    target.write_bytes(b"1")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    said = rf"cannot copy {target} to .* \(No space left on device\); free some space, or set"
    with pytest.raises(DataError, match=said), at_hand(target.parent, ["x"]):
        pass
