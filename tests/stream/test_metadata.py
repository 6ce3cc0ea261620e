"""Metadata: read once for all that choose tiles, alike from the file beside the shards and from the shards."""

from dataclasses import replace
from pathlib import Path

import pytest
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray.errors import DataError
from mmearth_ray.patience import Patience
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.metadata import METADATA, SCHEMA, write_metadata
from mmearth_ray.storage import locate
from mmearth_ray.stream.cache import Cache
from mmearth_ray.stream.metadata import Metadata
from mmearth_ray.stream.select import select
from mmearth_ray.stream.shard import Reading

QUICK = Reading(Patience(attempts=3, first_wait=0.01))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Three shards of 10, 10 and 4 tiles, without a file of their metadata."""
    return make_data_set(tmp_path / "tiny", tiles=24, size=8, row_group=5, shard_rows=10, held_out=7)


def with_metadata(made: Manifest) -> Manifest:
    return replace(made, metadata=write_metadata(made.directory, made.shards))


def moved(manifest: Manifest, s3: S3) -> Manifest:
    place = locate(f"{s3.make_bucket()}/tiny", "data.shards")
    for path in Path(str(manifest.directory)).iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    s3.reset_counts()
    return replace(manifest, directory=place)


def test_the_file_tells_what_the_shards_do(manifest: Manifest) -> None:
    found = [Metadata(given) for given in (manifest, with_metadata(manifest))]
    assert found[0].table.equals(found[1].table)
    assert found[0].table.schema.equals(SCHEMA, check_metadata=True)
    assert found[0].table.num_rows == 24
    for where in ("split == 'val'", "latitude > 4 and product == 'l2a'", "id == 'none'"):
        one, other = (select(metadata, where) for metadata in found)
        assert [array.tobytes() for array in one.arrays] == [array.tobytes() for array in other.arrays]
        assert [array.dtype for array in one.arrays] == ["int32", "int32", "int32", "int64"]


def test_several_choices_read_the_file_once_and_no_shard(manifest: Manifest, s3: S3) -> None:
    metadata = Metadata(moved(with_metadata(manifest), s3), QUICK)
    assert s3.counts()["GET"] == 0
    assert [len(select(metadata, where).rows) for where in ("split == 'train'", "split == 'val'")] == [17, 7]
    counts = s3.counts()
    assert (counts["HEAD"], counts["GET"]) == (1, 1)


def test_without_the_file_each_shard_is_asked_once(manifest: Manifest, s3: S3, tmp_path: Path) -> None:
    away = moved(manifest, s3)
    reading = replace(QUICK, cache=Cache(tmp_path / "cache", 10_000_000))
    metadata = Metadata(away, reading)
    assert [len(select(metadata, where).rows) for where in ("split == 'train'", "split == 'val'")] == [17, 7]
    counts = s3.counts()
    assert (counts["HEAD"], counts["GET"]) == (3, 3 + 5)  # footers, and the neighbouring columns of five row groups
    s3.reset_counts()
    assert Metadata(away, reading).table.equals(metadata.table)
    assert s3.counts()["HEAD"] == s3.counts()["GET"] == 0


def test_a_local_shard_that_is_missing_or_shorter_is_noticed_before_it_is_needed(manifest: Manifest) -> None:
    made = with_metadata(manifest)
    shard = Path(str(made.directory)) / made.shards[1].file
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(DataError, match=rf"^the shard {shard} is damaged \(.*\); `shards verify` tells more$"):
        select(Metadata(made), "")
    shard.unlink()
    with pytest.raises(DataError, match=f"^the shard {shard} is missing; restore it, or build the data set again$"):
        select(Metadata(made), "")
    shard.write_bytes(data)
    (Path(str(made.directory)) / METADATA).unlink()
    with pytest.raises(DataError, match=f"{METADATA} is missing; restore it, or build the data set again$"):
        select(Metadata(made), "")


def test_a_data_set_without_shards_has_no_tiles(manifest: Manifest) -> None:
    assert len(select(Metadata(replace(manifest, shards=())), "").rows) == 0
