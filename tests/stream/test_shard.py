"""Shards: only used bytes are read, from a disk or a store; a shard that was replaced is noticed; the cache saves requests."""

import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from s3_server import S3
from tiny_earth import make_block, make_data_set
from upath import UPath

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import TABLE, get, tasks
from mmearth_ray.patience import Patience
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.write import write_shard
from mmearth_ray.storage import locate
from mmearth_ray.stream import footer
from mmearth_ray.stream import shard as shard_module
from mmearth_ray.stream.cache import Cache
from mmearth_ray.stream.pages import read_strings
from mmearth_ray.stream.reader import read_group, used_columns
from mmearth_ray.stream.shard import Reading, Shard, fetch

SIZE = 32
QUICK = Reading(Patience(attempts=6, first_wait=0.01))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("data") / "tiny", tiles=24, size=SIZE)


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> None:
    forget()


def forget() -> None:
    """As in another process."""
    shard_module._indices.clear()
    shard_module._files.clear()


def remote(manifest: Manifest, s3: S3) -> Shard:
    """The data set's shard in a bucket of its own."""
    place = locate(f"{s3.make_bucket()}/tiny", "data.shards")
    assert isinstance(place, UPath)
    (record,) = manifest.shards
    put(manifest.directory / record.file, place / record.file)  # type: ignore[operator]
    s3.reset_counts()
    return Shard.of(place, record)


def put(local: Path, place: UPath) -> None:
    fsspec.filesystem("s3").put_file(str(local), place.path)


def local(manifest: Manifest) -> Shard:
    return Shard.of(manifest.directory, manifest.shards[0])


def same(one: Shard, other: Shard, reading: Reading = QUICK) -> bool:
    """Whether every row group reads alike from both."""
    groups = range(3)
    pairs = [(read_group(one, g, SIZE, TABLE), read_group(other, g, SIZE, TABLE, reading)) for g in groups]
    return all(a.id == b.id and all(a.columns[n].tobytes() == b.columns[n].tobytes() for n in a.columns) for a, b in pairs)


def test_the_manifest_knows_the_digest_and_the_length_of_the_footer(manifest: Manifest) -> None:
    shard = local(manifest)
    data = Path(str(shard.place)).read_bytes()
    assert shard.footer == int.from_bytes(data[-8:-4], "little") + 8
    assert len(shard.content) == 32
    metadata = pq.read_metadata(shard.place).metadata
    assert metadata is not None
    assert metadata[b"mmearth_ray.content"].decode() == shard.content


def test_the_digest_is_of_the_rows_and_not_of_their_compression(tmp_path: Path) -> None:
    blocks = [make_block(range(8), SIZE, 8)]
    records = [write_shard(tmp_path / f"{c}.parquet", blocks, SIZE, c) for c in ("zstd", "lz4", "none")]
    assert len({record.content for record in records}) == 1
    assert len({record.sha256 for record in records}) == 3
    other = write_shard(tmp_path / "other.parquet", [make_block(range(1, 9), SIZE, 8)], SIZE)
    assert other.content != records[0].content


def test_a_store_gives_the_same_arrays_for_the_bytes_of_the_used_columns(manifest: Manifest, s3: S3) -> None:
    shard = remote(manifest, s3)
    assert same(local(manifest), shard)
    s3.reset_counts()
    modalities = (get("sentinel2").select(["B4", "B3", "B2"]),)
    group = read_group(shard, 1, SIZE, modalities, QUICK)
    assert group.faults == 0
    metadata = pq.read_metadata(local(manifest).place).row_group(1)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    used = sum(c.total_compressed_size for c in chunks if c.path_in_schema in used_columns(modalities))
    everything = sum(c.total_compressed_size for c in chunks)
    assert used <= s3.counts()["bytes"] <= 1.05 * used + footer.GAP
    assert used < 0.2 * everything


def test_connections_are_used_again(manifest: Manifest, s3: S3) -> None:
    shard = remote(manifest, s3)
    for _ in range(5):
        assert same(local(manifest), shard)
    counts = s3.counts()
    assert counts["GET"] >= 15
    assert counts["connections"] <= 4


@pytest.mark.parametrize("fault", ["slow_down", "internal_error", "reset", "truncated"])
def test_faults_that_pass_are_asked_again_and_counted(fault: str, manifest: Manifest, s3: S3) -> None:
    shard = remote(manifest, s3)
    s3.fail(**{fault: 1.0}, only="^GET", at_most=3)
    group = read_group(shard, 0, SIZE, tasks(), QUICK)
    assert s3.counts()[fault] == 3
    assert group.faults == 3 or (fault == "reset" and group.faults >= 1)  # aiohttp asks again on connections it has used
    assert read_group(shard, 0, SIZE, tasks(), QUICK).faults == 0
    assert same(local(manifest), shard)


def test_a_missing_shard_and_one_that_may_not_be_read_are_named(manifest: Manifest, s3: S3) -> None:
    shard = remote(manifest, s3)
    missing = replace(shard, place=UPath(f"{shard.place}.gone"))
    with pytest.raises(DataError, match=f"^the shard {missing.place} is missing; restore it, or build the data set again$"):
        fetch(missing, [0], ["id"], QUICK)
    s3.fail(denied=1.0)
    with pytest.raises(DataError, match=rf"^{shard.place}: access denied \(.*\); check the credentials and what they allow$"):
        fetch(shard, [0], ["id"], QUICK)


def replaced(tmp_path: Path) -> Path:
    """A shard of as many other tiles, as long as the one of tiles 0 to 23 if it is not compressed."""
    blocks = [make_block(range(first, first + 8), SIZE, 60) for first in (30, 38, 46)]
    write_shard(tmp_path / "other.parquet", blocks, SIZE)
    return tmp_path / "other.parquet"


def test_a_shard_replaced_in_a_store_under_a_running_job_is_noticed(manifest: Manifest, s3: S3, tmp_path: Path) -> None:
    shard = remote(manifest, s3)
    read_group(shard, 0, SIZE, tasks(), QUICK)
    assert isinstance(shard.place, UPath)
    put(replaced(tmp_path), shard.place)
    with pytest.raises(DataError, match=rf"^the shard {shard.place} is not the one that the manifest describes \(its digest"):
        read_group(shard, 1, SIZE, tasks(), QUICK)
    put(Path(str(local(manifest).place)), shard.place)
    assert same(local(manifest), shard)


def test_a_local_shard_replaced_under_a_running_job_stays_what_it_was_and_is_noticed_when_opened(tmp_path: Path) -> None:
    made = make_data_set(tmp_path / "tiny", tiles=24, size=SIZE)
    shard = local(made)
    before = read_group(shard, 1, SIZE, tasks())
    replaced(tmp_path).replace(Path(str(shard.place)))
    after = read_group(shard, 1, SIZE, tasks())
    assert after.id == before.id
    forget()
    with pytest.raises(DataError, match=r"is not the one that the manifest describes \(its digest differs\)"):
        read_group(shard, 1, SIZE, tasks())


def test_a_file_without_a_length_of_footer_or_digest_reads_alike(manifest: Manifest, s3: S3) -> None:
    """As manifests of earlier versions describe them; the footer is longer than what is read for it at first."""
    bare = replace(local(manifest), content="", footer=0)
    assert same(local(manifest), bare)
    assert same(local(manifest), replace(remote(manifest, s3), content="", footer=0))
    assert same(local(manifest), replace(bare, footer=100))


def test_what_the_cache_holds_is_not_asked_for_again(manifest: Manifest, s3: S3, tmp_path: Path) -> None:
    shard = remote(manifest, s3)
    reading = replace(QUICK, cache=Cache(tmp_path, 10_000_000))
    assert same(local(manifest), shard, reading)
    s3.reset_counts()
    forget()
    assert same(local(manifest), shard, reading)
    assert s3.counts()["GET"] == s3.counts()["HEAD"] == 0
    for path, damage in zip(sorted(tmp_path.iterdir()), [lambda d: d[:-1], lambda d: b"?" + d[1:]] * 2, strict=True):
        path.write_bytes(damage(path.read_bytes()))
    forget()
    assert same(local(manifest), shard, reading)
    assert s3.counts()["GET"] > 0


def test_a_cache_too_small_for_anything_costs_nothing_but_requests(manifest: Manifest, s3: S3, tmp_path: Path) -> None:
    shard = remote(manifest, s3)
    assert same(local(manifest), shard, replace(QUICK, cache=Cache(tmp_path, 100)))
    assert list(tmp_path.iterdir()) == []


def open_files(folder: Path) -> list[str]:
    """Names of the files in a folder that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of the listing itself
            path = link.readlink()
            found += [path.name] if path.parent == folder else []
    return sorted(found)


def test_only_so_many_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "OPEN_FILES", 3)
    made = make_data_set(tmp_path / "many", tiles=24, size=8, row_group=3, shard_rows=3)
    shards = [Shard.of(made.directory, record) for record in made.shards]
    assert len(shards) == 8
    for _ in range(2):
        for number, shard in enumerate(shards):
            assert read_group(shard, 0, 8, tasks()).id == [str(i) for i in range(3 * number, 3 * number + 3)]
            assert len(open_files(tmp_path / "many")) == min(3, len(shard_module._files))
    assert open_files(tmp_path / "many") == [record.file for record in made.shards[-3:]]


def test_more_shards_than_a_process_may_open_are_read_and_each_footer_is_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_data_set(tmp_path / "many", tiles=64, size=8, row_group=1, shard_rows=1)
    shards = [Shard.of(made.directory, record) for record in made.shards]
    parsed = []
    monkeypatch.setattr(shard_module, "parsed", lambda tail: parsed.append(1) or footer.parsed(tail))
    monkeypatch.setattr(shard_module, "OPEN_FILES", 16)
    orders = [np.random.default_rng(epoch).permutation(64).tolist() for epoch in range(3)]
    held = {int(link.name) for link in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(4096) if number not in held]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[32], hard))
    try:
        found = [[read_group(shards[number], 0, 8, tasks()).id for number in order] for order in orders]
        assert len(open_files(tmp_path / "many")) == 16
        with pytest.raises(OSError, match="Too many open files"):
            list(map(shard_module.OpenFile, [Path(str(shard.place)) for shard in shards]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [[[str(number)] for number in order] for order in orders]
    assert len(parsed) == 64


def test_failed_requests_for_the_stamp_are_counted_too(manifest: Manifest, s3: S3) -> None:
    shard = remote(manifest, s3)
    s3.fail(slow_down=1.0, only="^HEAD", at_most=2)
    assert read_group(shard, 0, SIZE, tasks(), QUICK).faults == 2


def test_a_local_shard_overwritten_in_place_is_noticed(tmp_path: Path) -> None:
    made = make_data_set(tmp_path / "tiny", tiles=24, size=SIZE)
    shard = local(made)
    read_group(shard, 1, SIZE, tasks())
    Path(str(shard.place)).write_bytes(replaced(tmp_path).read_bytes())
    with pytest.raises(DataError, match=r"is not the one that the manifest describes \(its digest differs\)"):
        read_group(shard, 1, SIZE, tasks())


def test_many_threads_fill_one_cache(manifest: Manifest, s3: S3, tmp_path: Path) -> None:
    shard = remote(manifest, s3)
    reading = replace(QUICK, cache=Cache(tmp_path, 10_000_000))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fetch(shard, [0], ["id", "product"], reading), range(24)))
    assert len(found) == 24
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".bytes"]


def test_of_many_shards_in_a_store_each_footer_is_read_once_and_a_row_group_costs_two_requests(s3: S3, tmp_path: Path) -> None:
    made = make_data_set(tmp_path / "many", tiles=100, size=16, row_group=1, shard_rows=1)
    place = locate(f"{s3.make_bucket()}/many", "data.shards")
    assert isinstance(place, UPath)
    columns, used, footers = used_columns(TABLE), 0, 0
    for record in made.shards:
        path = Path(str(made.directory)) / record.file
        put(path, place / record.file)
        group, footers = pq.read_metadata(path).row_group(0), footers + record.footer
        chunks = [group.column(i) for i in range(group.num_columns)]
        used += sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in columns)
    shards = [Shard.of(place, record) for record in made.shards]
    s3.reset_counts()
    for epoch in (1, 2):
        order = np.random.default_rng(epoch).permutation(100).tolist()
        with ThreadPoolExecutor(4) as pool:
            fetched = list(pool.map(lambda number: fetch(shards[number], [0], columns, QUICK), order))
        assert [read_strings(*f.chunk(0, "id"), 1) for f in fetched] == [[str(number)] for number in order]
        counts = s3.counts()
        assert footers + epoch * used <= counts["bytes"] <= footers + epoch * 1.05 * used
        assert counts["GET"] == 100 + epoch * 100
        assert counts["HEAD"] == epoch * 100
