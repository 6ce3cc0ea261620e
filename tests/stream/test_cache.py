"""The cache: what was put comes back, what was used longest ago goes, a directory that takes nothing is an error."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from mmearth_ray.errors import DataError
from mmearth_ray.stream.cache import FILL, STALE, UNFINISHED, Cache


def held(cache: Cache) -> int:
    sizes = []
    for path in cache.directory.iterdir():
        with suppress(FileNotFoundError):  # another process removed it
            sizes.append(path.stat().st_size)
    return sum(sizes)


def test_what_was_put_comes_back_under_its_names_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "made" / "here", 1000)
    assert cache.get("a", 1) is None
    cache.put(b"one", "a", 1)
    assert cache.get("a", 1) == b"one"
    assert cache.get("a", 2) is None
    assert cache.get("a1") is None
    cache.drop("a", 1)
    assert cache.get("a", 1) is None
    assert list((tmp_path / "made" / "here").iterdir()) == []


def test_the_directory_never_exceeds_its_limit_and_loses_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    for number in range(9):
        cache.put(bytes([number]) * 96, number)
        os.utime(cache._path((number,)), (number, number))
    assert held(cache) == FILL * 1000
    assert cache.get(0) == bytes(96)  # used again
    cache.put(b"x" * 100, "new")
    assert held(cache) <= FILL * 1000
    assert cache.get(1) is None
    assert cache.get(0) == bytes(96)
    assert cache.get("new") == b"x" * 100
    for number in range(100):
        cache.put(b"y" * 150, "more", number)
        assert held(cache) <= 1000


def test_what_would_fill_the_directory_alone_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    cache.put(b"a" * 10, "small")
    cache.put(b"z" * 950, "large")
    assert cache.get("large") is None
    assert cache.get("small") == b"a" * 10


def test_what_another_is_writing_stays_and_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    being_written, left = tmp_path / f".a.other.1{UNFINISHED}", tmp_path / f".b.other.2{UNFINISHED}"
    for path in (being_written, left):
        path.write_bytes(bytes(400))
    long_ago = time.time() - 2 * STALE
    os.utime(left, (long_ago, long_ago))
    cache.put(bytes(400), "new")
    assert being_written.exists()
    assert not left.exists()
    assert cache.get("new") == bytes(400)


def fill(folder: Path, limit: int, writer: int) -> int:
    cache = Cache(folder, limit)
    for number in range(40):
        cache.put(bytes([writer]) * 40_000, writer, number)
    return held(cache)


def test_many_processes_fill_one_directory_without_disturbing_each_other(tmp_path: Path) -> None:
    limit = 400_000
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(fill, [tmp_path] * 4, [limit] * 4, range(4)))
    assert len(found) == 4
    assert held(Cache(tmp_path, limit)) <= limit


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "below", 1000)
    with pytest.raises(DataError, match=r"^data\.cache=.*file/below: cannot write .*") as caught:
        cache.check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [(28, "no space left on the disk of .*; free some"), (30, "cannot write .*Read-only")])
def test_a_full_or_read_only_disk_is_named_and_nothing_half_written_stays(
    error: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, 1000)

    def fail(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(error[0], os.strerror(error[0]))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DataError, match=rf"^data\.cache={tmp_path}: {error[1]}"):
        cache.put(b"abcdef", "a")
    assert list(tmp_path.iterdir()) == []
