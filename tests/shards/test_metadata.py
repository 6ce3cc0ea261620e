"""The metadata beside the shards: the rows of all of them, in order; anything else that lies there is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray.errors import DataError
from mmearth_ray.shards.manifest import MANIFEST, Manifest, load_manifest
from mmearth_ray.shards.metadata import COLUMNS, METADATA, SCHEMA, read_metadata, write_metadata
from mmearth_ray.shards.verify import VerifyOptions, verify
from mmearth_ray.storage import locate

QUICKLY = VerifyOptions(values=False, sample=0)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Three shards of 10, 10 and 4 tiles."""
    return with_metadata(make_data_set(tmp_path / "tiny", tiles=24, size=8, row_group=5, shard_rows=10))


def with_metadata(made: Manifest) -> Manifest:
    manifest = replace(made, metadata=write_metadata(made.directory, made.shards))
    manifest.save()
    return load_manifest(manifest.directory)


def read(manifest: Manifest) -> pa.Table:
    assert manifest.metadata
    return read_metadata(manifest, manifest.metadata)


def test_it_holds_the_rows_of_all_shards_in_order(manifest: Manifest) -> None:
    table = read(manifest)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert table.column("id").to_pylist() == [str(i) for i in range(24)]
    shards = [pq.read_table(manifest.directory / record.file, columns=list(COLUMNS)) for record in manifest.shards]
    assert table.to_pylist() == [row for shard in shards for row in shard.select(COLUMNS).to_pylist()]


def test_the_manifest_names_it_under_its_digest_and_need_not(manifest: Manifest) -> None:
    body = manifest.to_json()
    assert body["metadata"]["file"] == METADATA
    assert body["metadata"]["bytes"] == (Path(str(manifest.directory)) / METADATA).stat().st_size
    before = replace(manifest, metadata=None)
    assert "metadata" not in before.to_json()
    assert before.digest != manifest.digest
    before.save()
    assert load_manifest(manifest.directory).metadata is None


def test_it_is_the_same_in_a_store(manifest: Manifest, s3: S3) -> None:
    place = locate(f"{s3.make_bucket()}/tiny", "data.shards")
    for record in manifest.shards:
        (place / record.file).write_bytes((manifest.directory / record.file).read_bytes())
    written = write_metadata(place, manifest.shards)
    assert written == manifest.metadata
    s3.reset_counts()
    away = replace(manifest, directory=place)
    assert read(away).equals(read(manifest))
    counts = s3.counts()
    assert (counts["HEAD"], counts["GET"], counts["bytes"]) == (1, 1, written.bytes)
    (place / METADATA).write_bytes(b"short")
    with pytest.raises(DataError, match=f"^{place / METADATA} is not the one that the manifest describes"):
        read(away)
    (place / METADATA).unlink()
    with pytest.raises(DataError, match=f"^{place / METADATA} is missing; restore it, or build the data set again$"):
        read(away)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.unlink(), "is missing; restore it, or build the data set again"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not the one that the manifest describes"),
    (lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]), "is not the one that the manifest describes"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(manifest: Manifest, damage: Callable[[Path], object], message: str) -> None:
    path = Path(str(manifest.directory)) / METADATA
    damage(path)
    with pytest.raises(DataError, match=f"^{path} {message}"):
        read(manifest)
    (problem,) = verify(manifest.directory, QUICKLY).problems
    assert problem.startswith(f"{path} {message}")


def test_a_shard_that_cannot_be_read_is_named(manifest: Manifest) -> None:
    path = Path(str(manifest.directory)) / manifest.shards[1].file
    path.write_bytes(b"no shard")
    with pytest.raises(DataError, match=f"^{path} cannot be read "):
        write_metadata(manifest.directory, manifest.shards)
    pq.write_table(pa.table({"id": ["1"]}), path)
    with pytest.raises(DataError, match=f"^the metadata of {path} cannot be read "):
        write_metadata(manifest.directory, manifest.shards)


def test_verification_compares_it_with_the_shards(manifest: Manifest) -> None:
    assert verify(manifest.directory, QUICKLY).problems == []
    with_metadata(replace(manifest, shards=manifest.shards[::-1]))
    replace(load_manifest(manifest.directory), shards=manifest.shards).save()
    found = verify(manifest.directory, QUICKLY).problems
    assert found == [
        f"{record.file}: {METADATA} says something else of its tiles; build the data set again" for record in manifest.shards
    ]


def test_rows_that_are_too_many_or_too_few_are_refused(manifest: Manifest) -> None:
    part = with_metadata(replace(manifest, shards=manifest.shards[:2]))
    with pytest.raises(DataError, match=f"{METADATA} has 20 rows, its manifest says 24; build the data set again$"):
        read(replace(part, shards=manifest.shards))


def test_it_is_a_stray_file_where_the_manifest_does_not_name_it(manifest: Manifest) -> None:
    replace(manifest, metadata=None).save()
    assert verify(manifest.directory, QUICKLY).problems == [f"{METADATA}: not in the manifest; remove it"]
    assert (Path(str(manifest.directory)) / MANIFEST).exists()
