import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import TABLE
from mmearth_ray.shards.build import BUILDING, build, file_identity, rows_per_group, rows_per_shard
from mmearth_ray.shards.manifest import MANIFEST, Manifest
from mmearth_ray.shards.metadata import METADATA
from mmearth_ray.shards.read import filler
from mmearth_ray.shards.schema import TileBlock

SIZE = 4


@dataclass
class Counting:
    """A source of empty tiles that notes what it was asked for and can fail at a tile."""

    fail_at: int = -1

    def __post_init__(self) -> None:
        self.asked: list[int] = []

    def blocks(self, start: int, stop: int) -> Iterator[TileBlock]:
        self.asked.append(start)
        if start <= self.fail_at < stop:
            raise DataError(f"tile {self.fail_at} is damaged")
        n = stop - start
        yield TileBlock(
            id=[str(i) for i in range(start, stop)], latitude=np.zeros(n), longitude=np.zeros(n), date=[None] * n,
            product=["l1c"] * n, crs=[None] * n, split=["train"] * n, source=["test"] * n,
            layers={m.name: filler(m, n, SIZE) for m in TABLE}, present={m.name: np.zeros(n, bool) for m in TABLE},
        )  # fmt: skip


def make(out: Path, source: Counting, **changed: Any) -> Manifest:
    given: dict[str, Any] = {"name": "n", "tiles": 10, "tile_size": SIZE, "shard_rows": 4, "origin": {"kind": "test"}}
    return build(out, source, **{**given, **changed})


def test_it_makes_every_shard_once(tmp_path: Path) -> None:
    source = Counting()
    manifest = make(tmp_path / "o", source)
    assert [shard.rows for shard in manifest.shards] == [4, 4, 2]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        MANIFEST,
        METADATA,
        *(f"part-0000{i}.parquet" for i in range(3)),
    ]
    assert make(tmp_path / "o", source).digest == manifest.digest
    assert source.asked == [0, 4, 8], "a finished data set is not made again"


def test_a_relative_directory_is_made_absolute_before_anyone_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Moving(Counting):
        """Changes the working directory, as a task on another machine has another."""

        def blocks(self, start: int, stop: int) -> Iterator[TileBlock]:
            monkeypatch.chdir("/")
            return super().blocks(start, stop)

    monkeypatch.chdir(tmp_path)
    assert make(Path("o"), Moving()).directory == tmp_path / "o"
    assert (tmp_path / "o" / MANIFEST).exists()


def test_it_continues_after_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "o"
    with pytest.raises(DataError, match="tile 9"):
        make(out, Counting(fail_at=9))
    assert not (out / MANIFEST).exists()
    (out / ".part-00002.parquet.77.tmp").write_text("of a writer that was killed")
    again = Counting()
    resumed = make(out, again)
    assert again.asked == [8]
    assert not list(out.glob(".*"))
    whole = make(tmp_path / "whole", Counting())
    assert (out / MANIFEST).read_bytes() == (tmp_path / "whole" / MANIFEST).read_bytes()
    assert resumed.digest == whole.digest


def test_a_shard_that_shrank_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "o"
    with pytest.raises(DataError):
        make(out, Counting(fail_at=9))
    (out / "part-00001.parquet").write_bytes(b"short")
    (out / BUILDING / "00000.json").write_text("{")
    again = Counting()
    make(out, again)
    assert again.asked == [0, 4, 8]


@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_before_the_first_shard_leaves_nothing(tmp_path: Path, existed: bool) -> None:
    out = tmp_path / "o"
    if existed:
        out.mkdir()
    with pytest.raises(DataError, match="tile 1 is damaged"):
        make(out, Counting(fail_at=1))
    assert out.exists() == existed
    assert not existed or not list(out.iterdir())


def test_it_never_touches_what_is_not_its_own(tmp_path: Path) -> None:
    make(tmp_path / "done", Counting())
    before = (tmp_path / "done" / MANIFEST).read_bytes()
    with pytest.raises(DataError, match="already holds another data set"):
        make(tmp_path / "done", Counting(), origin={"kind": "other"})
    assert (tmp_path / "done" / MANIFEST).read_bytes() == before

    with pytest.raises(DataError):
        make(tmp_path / "half", Counting(fail_at=9))
    with pytest.raises(DataError, match="unfinished data set of another origin"):
        make(tmp_path / "half", Counting(), shard_rows=2)
    assert len(list((tmp_path / "half").glob("*.parquet"))) == 2

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("draft")
    with pytest.raises(DataError, match="already holds other files"):
        make(tmp_path / "mine", Counting())
    with pytest.raises(DataError, match="is a file"):
        make(tmp_path / "mine" / "thesis.txt", Counting())
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_shards_are_whole_row_groups() -> None:
    for size in (64, 128):
        rows = rows_per_shard(size, 512)
        assert rows % rows_per_group(size) == 0
        assert 400e6 < rows * size * size * 71 < 600e6  # a tile has 71 bytes per pixel
    assert rows_per_shard(128, 1) == rows_per_group(128) == 8
    assert [rows_per_group(size) for size in (8, 32, 64, 100, 256, 1024)] == [32, 32, 16, 10, 4, 4]


def test_a_file_is_known_by_its_size_and_edges(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(3 << 20))
    first = file_identity(path)
    path.write_bytes(bytes((3 << 20) - 1) + b"x")
    assert file_identity(path) != first
    assert json.dumps(first)


def test_a_record_is_a_plain_fact(tmp_path: Path) -> None:
    manifest = make(tmp_path / "o", Counting())
    assert replace(manifest.shards[0]) == manifest.shards[0]
    assert manifest.shards[0].present["sentinel2"] == 0
