"""The comparison of loaders: every way gives the same tiles, and the arithmetic of its rates, ratios and bytes."""

import json
import subprocess
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from tiny_earth import make_data_set

from benchmarks import loader_hdf5, loader_peers, loader_tiles
from benchmarks.bench_loader import Options, Shape, contenders, jobs_of, main, skipped
from benchmarks.loader_clock import Job, Stretch, Taken, box_of, stretch, take
from benchmarks.loader_job import WAYS, read, together
from benchmarks.loader_parts import parts
from benchmarks.loader_report import DISK, STORE, Contender, byte_rows, comparable, first_batches, rates, ratios
from benchmarks.loader_shared import from_process
from benchmarks.loader_source import open_shards, ranges, stored_bytes, subsets
from benchmarks.loader_tiles import PEERS, ROOT, Tiles, chunk_bytes
from benchmarks.loader_watch import Measured, measured, watch
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.modalities import TABLE, Kind, Level, tasks
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.stream.prepare import Batch, draw
from mmearth_ray.stream.source import Source

SIZE, IMAGE, PATCH, TILES = 24, 16, 8, 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("shards"), tiles=TILES, size=SIZE, row_group=5, shard_rows=15)


@pytest.fixture(scope="module")
def tiles(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    return Tiles(manifest, tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def source(manifest: Manifest) -> Source:
    return open_shards(str(manifest.directory), IMAGE, PATCH)


@pytest.fixture(scope="module")
def batch(source: Source) -> Batch:
    """Every tile once."""
    return next(source.batches([(0, TILES)]))


def job(way: str, data: object, cores: int = 1, **changes: Any) -> Job:
    return Job(**{"way": way, "data": str(data), "cores": cores, "image": IMAGE, "patch": PATCH, "batch": 4, "warm": 0.0,
                  "seconds": 0.05, **changes})  # fmt: skip


def boxes(source: Source, batch: Batch) -> list[tuple[int, int]]:
    """Where the reader cropped each tile."""
    top, left, _, _ = draw(source.spec, batch["id"].tolist(), 0, source.name, SIZE)
    return list(zip(top.tolist(), left.tolist(), strict=True))


# ---- the same tiles ----


def test_the_published_way_gives_the_values_of_the_reader_wherever_there_are_any(
    source: Source, batch: Batch, tiles: Tiles
) -> None:
    compared = 0
    with h5py.File(tiles.hdf5) as opened:
        file: Any = opened
        rows = {entry[0].decode(): row for row, entry in enumerate(file["metadata"][:])}
        for place, (tile, box) in enumerate(zip(batch["id"].tolist(), boxes(source, batch), strict=True)):
            found = loader_hdf5.published_tile(file, rows[tile], box, IMAGE)
            assert found["id"] == tile
            for m in tasks():
                ours, theirs = batch[m.name][place], found[m.name]
                if m.kind is Kind.CATEGORICAL:
                    assert np.array_equal(ours, theirs[0] if theirs.ndim == 3 else theirs), m.name
                else:
                    valid = np.asarray(m.valid(ours))
                    assert np.array_equal(np.isfinite(theirs), valid), m.name
                    assert np.array_equal(ours[valid].astype(np.float32), theirs[valid]), m.name
                    compared += int(valid.sum())
    assert compared > 12 * IMAGE**2 * TILES


def test_the_hdf5_file_is_laid_out_as_a_release(tiles: Tiles) -> None:
    with h5py.File(tiles.hdf5) as file:
        for m in TABLE:
            dataset: Any = file[m.name]
            assert dataset.chunks == (1, *dataset.shape[1:])
            assert dataset.compression == "gzip"
            assert dataset.dtype == np.dtype(m.dtype)


def test_hdf5_batches_hold_whole_tiles_in_an_order_of_each_rank(tiles: Tiles) -> None:
    first, other = (next(loader_hdf5.batches(str(tiles.hdf5), IMAGE, 6, rank)) for rank in (0, 1))
    assert first["id"] != other["id"]
    assert all(len(values) == 6 for values in first.values())
    assert set(first) == {"id", *(m.name for m in tasks())}


def test_what_is_exported_and_cropped_for_other_loaders_is_what_the_reader_gives(
    source: Source, batch: Batch, tiles: Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = dict(zip(batch["id"].tolist(), boxes(source, batch), strict=True))
    monkeypatch.setattr(loader_peers, "box_of", lambda tile, _: where[tile])
    folder = str(tiles.exported)
    about = loader_peers.described(folder)
    assert about["repeats"] * TILES >= loader_tiles.EPOCH
    found = {t["id"]: loader_peers.cropped(t, IMAGE, about) for t in (loader_peers.exported(folder, i) for i in range(TILES))}
    assert sorted(found) == sorted(where)
    for place, tile in enumerate(batch["id"].tolist()):
        for m in tasks():
            ours, theirs = batch[m.name][place], found[tile][m.name]
            if m.level is Level.PIXEL and m.kind is Kind.CATEGORICAL and not batch[m.present_column][place]:
                continue  # others do not know which layers are not to be trusted
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f"), m.name


@pytest.mark.drill
@pytest.mark.skipif(not PEERS.exists(), reason="make peers")
@pytest.mark.parametrize("kind", loader_peers.KINDS)
def test_other_loaders_give_every_exported_tile_back(kind: str, tiles: Tiles, tmp_path: Path) -> None:
    about = loader_peers.described(str(tiles.exported)) | {"repeats": 1}
    small = tmp_path / "arrays"
    small.mkdir()
    for path in tiles.exported.glob("*.npy"):
        (small / path.name).symlink_to(path)
    (small / "tiles.json").write_text(json.dumps(about))
    for command in (["write", kind, str(small), str(tmp_path / kind)],
                    ["samples", kind, str(tmp_path / kind), str(IMAGE), str(tmp_path / "found.npz")]):  # fmt: skip
        subprocess.run([str(PEERS), "-m", "benchmarks.loader_peers", *command], cwd=ROOT, check=True, capture_output=True)
    with np.load(tmp_path / "found.npz") as found:
        assert len(found.files) == TILES * len(tasks())
        for index in range(TILES):
            wanted = loader_peers.cropped(loader_peers.exported(str(small), index), IMAGE, about)
            for m in tasks():
                values = found[f"{wanted['id']}/{m.name}"]
                assert values.dtype == wanted[m.name].dtype
                assert values.reshape(wanted[m.name].shape).tobytes() == wanted[m.name].tobytes(), m.name


@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
def test_shards_of_every_compression_give_the_same_batches(compression: str, batch: Batch, tiles: Tiles) -> None:
    found = next(open_shards(str(tiles.shards(compression)), IMAGE, PATCH).batches([(0, TILES)]))
    assert {name: values.tobytes() for name, values in found.items()} == {n: v.tobytes() for n, v in batch.items()}


def test_what_comes_through_shared_memory_is_what_was_read(manifest: Manifest) -> None:
    work = job("processes", manifest.directory)
    ours = islice(read(work, 0), 9)  # more than the ring has slots
    passed = from_process(read, (work, 0), 1 << 20)
    for one, other in zip(ours, passed, strict=False):
        assert {name: values.tobytes() for name, values in one.items()} == {n: v.tobytes() for n, v in other.items()}
        del other
    passed.close()


def test_a_process_that_hands_over_may_end_and_may_not_write_beyond_a_slot() -> None:
    assert [array.tolist() for array in from_process(map, (np.ones, [1, 3]), 64)] == [[1], [1, 1, 1]]
    passed = from_process(map, (np.ones, [2, 9, 1]), 64)
    assert len(next(passed)) == 2
    with pytest.raises(
        DataError, match=r"the process that reads failed: ValueError: an item needs more than its slot of 64 bytes"
    ):
        next(passed)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_every_way_counts_the_tiles_that_it_gives(way: str, manifest: Manifest, tiles: Tiles) -> None:
    data = tiles.hdf5 if way == "hdf5" else manifest.directory
    numbers = list(islice(WAYS[way](job(way, data), 0), 4))
    assert numbers == ([5, 5, 5, 5] if way == "raw" else [4, 4, 4, 4])  # raw: row groups


def test_the_micro_batches_are_those_of_training() -> None:
    assert list(islice(ranges(4, workers=2, rank=1), 3)) == [(4, 8), (12, 16), (20, 24)]


# ---- the clock ----


def test_a_rate_counts_from_the_batch_that_is_held_when_the_last_consumer_is_warm() -> None:
    early = Taken(0.0, [(1.0, 10), (2.0, 10), (3.0, 10), (5.0, 10), (6.0, 10)])
    late = Taken(1.0, [(3.5, 4), (4.5, 4), (6.5, 4)])
    found = stretch([early, late], warm=0.5)
    assert (found.begin, found.end, found.first) == (4.0, 6.0, 2.5)
    assert found.tiles_per_second == pytest.approx(20 / (6 - 3) + 8 / (6.5 - 3.5))


def test_time_up_to_an_item_without_tiles_does_not_count() -> None:
    found = stretch([Taken(0.0, [(1.0, 8), (2.0, 8), (5.0, 0), (6.0, 8)])], warm=0.0)
    assert found.tiles_per_second == pytest.approx(16 / 2)


def slowly(numbers: Iterator[int]) -> Iterator[int]:
    for number in numbers:
        time.sleep(0.005)
        yield number


def test_a_consumer_goes_on_until_the_others_have_had_enough(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    alone = take(slowly(iter(range(1, 10_000))), job("raw", "", meeting=str(tmp_path)), rank=0, count=2)
    assert alone.came[-1][0] - alone.came[0][0] >= 0.05
    assert (tmp_path / "0").exists()
    assert len(alone.came) < 9_999
    (tmp_path / "1").unlink()
    waiting = take(slowly(iter([7] * 40)), job("raw", "", meeting=str(tmp_path)), rank=0, count=2)
    assert len(waiting.came) == 40, "it stopped without the other"


def test_a_job_survives_its_way_through_a_command_line() -> None:
    one = job("raw", "s3://bucket/a b", cores=2, warm=1.5)
    assert Job.from_json(one.to_json()) == one


def test_boxes_lie_inside_the_tile_and_vary() -> None:
    found = {box_of(str(i), 9) for i in range(200)}
    assert all(0 <= top < 9 and 0 <= left < 9 for top, left in found)
    assert len(found) > 60


def test_consumers_of_several_cores_are_measured_together(manifest: Manifest, tmp_path: Path) -> None:
    found = together(job("reader", manifest.directory, cores=2, meeting=str(tmp_path)))
    assert found.end > found.begin
    assert found.tiles_per_second > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


# ---- watching ----


def test_what_was_spent_is_that_of_the_time_that_counts() -> None:
    looks = [(0.0, 1.0), (10.0, 2.0), (20.0, 12.0), (30.0, 99.0)]
    found = measured(Stretch(begin=10.0, end=20.0, tiles_per_second=5.0, first=0.3), looks, peak=7)
    assert found == Measured(tiles_per_second=5.0, cpu_per_tile=0.2, peak=7, first=0.3, spilled=False)


def test_a_way_is_measured_in_a_process_of_its_own(manifest: Manifest) -> None:
    found = watch(job("reader", manifest.directory, seconds=0.3))
    assert found.tiles_per_second > 0
    assert 0 < found.cpu_per_tile < 1
    assert found.peak > 10_000_000


def test_a_way_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reader on 1 cores was not measured: error: .* is no data set"):
        watch(job("reader", tmp_path))


# ---- ratios, rates, bytes ----


def a(way: str, compression: str = "zstd", medium: str = DISK) -> Contender:
    return Contender(way, medium, compression)


def m(rate: float, first: float = 1.0, spilled: bool = False, peak: int = 10**9) -> Measured:
    return Measured(rate, 0.002, peak, first, spilled)


def test_ratios_are_medians_of_the_rounds_own() -> None:
    found = {(a("reader"), 1): [m(50), m(10), m(80)], (a("raw"), 1): [m(100), m(10), m(100)]}
    (row,) = ratios("112/16/128", found)
    assert row["compared"] == "our reader / raw pyarrow read"
    assert (row["times as fast"], row["wanted"], row["compression"], row["cores"]) == (0.8, 0.8, "zstd", 1)


def test_what_is_wanted_of_hdf5_depends_on_the_compression() -> None:
    found = {(a("reader", c), 1): [m(100)] for c in ("zstd", "lz4")} | {(a("hdf5", "gzip"), 1): [m(10)]}
    assert [(row["compression"], row["times as fast"], row["wanted"]) for row in ratios("x", found)] == [
        ("zstd", 10, 12.0), ("lz4", 10, 20.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "other", "cores", "expected"),
    [
        (a("reader"), a("raw"), 2, True),
        (a("reader"), a("raw", "lz4"), 2, False),
        (a("reader", medium=STORE), a("raw"), 1, False),
        (a("pipeline"), a("processes"), 1, True),
        (a("reader"), a("litdata", "none"), 1, True),
        (a("reader"), a("litdata", "none"), 2, False),
        (a("torch"), a("litdata", "none"), 2, True),
        (a("torch"), a("litdata", "none"), 1, False),
        (a("raw"), a("reader"), 1, False),
    ],
)
def test_like_is_compared_with_like(mine: Contender, other: Contender, cores: int, expected: bool) -> None:
    assert comparable(mine, other, cores) is expected


def test_rates_are_medians_and_megabytes_those_of_what_the_way_gives() -> None:
    found = {(a("raw"), 1): [m(10), m(30), m(20, peak=3 * 10**9)], (a("reader"), 2): [m(8)]}
    raw, reader = rates("x", found, {"raw": 2_000_000, "": 500_000})
    assert (raw["tiles/s"], raw["MB/s"], raw["CPU ms/tile"], raw["peak GB"]) == (20, 40, 2, 3)
    assert (reader["MB/s"], reader["cores"], reader["from"]) == (4, 2, DISK)


def test_the_first_batch_of_the_pipeline_is_told_and_whether_ray_wrote_to_disk() -> None:
    found = {(a("pipeline"), 1): [m(1, first=3), m(1, first=4, spilled=True)], (a("reader"), 1): [m(1), m(1)]}
    (row,) = first_batches("x", found)
    assert (row["seconds"], row["spilled"]) == (3.5, "yes")


def test_bytes_of_experiments_are_shares_of_the_one_before() -> None:
    rows = byte_rows("x", "zstd", 10, {"all": 80_000, "bands": 40_000, "RGB": 10_000})
    assert [(row["KB/tile"], row["share of the bytes"], row["of"]) for row in rows] == [
        (8, 1, "all"), (4, 0.5, "all"), (1, 0.25, "bands"),
    ]  # fmt: skip


def test_used_bytes_are_those_of_the_chunks_of_the_used_columns(tiles: Tiles) -> None:
    shards = tiles.shards("none")
    used = {}
    for name, choices in subsets().items():
        modalities = open_shards(str(shards), IMAGE, PATCH, *choices).spec.modalities
        used[name] = (chunk_bytes(shards, modalities), TILES * stored_bytes(modalities, SIZE))
    everything, bands, colours = used.values()
    assert bands[1] == TILES * 12 * 2 * SIZE**2
    assert colours[1] == TILES * 3 * 2 * SIZE**2
    for found, maps in (everything, bands, colours):
        assert maps < found < 1.25 * maps  # page headers and what is no map
    assert everything[0] < sum((shards / record).stat().st_size for record in ("part-00000.parquet", "part-00001.parquet"))


def test_the_parts_of_the_reader_are_all_timed(source: Source) -> None:
    found = parts(source, rounds=1)
    assert list(found) == ["raw", "raw, checked", "decode", "draw", "counts", "crops", "reader"]
    assert found["reader"] > 0


# ---- the command ----


def test_every_way_takes_its_turn_with_its_own_data(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bench_loader.PEERS", Path("/nowhere"))
    options, shape = Options(cores=[1, 2], compression="lz4"), Shape(IMAGE, PATCH, tiles, None)
    found = list(contenders(options, shape))
    assert [(c.way, c.compression) for c, _ in found] == [
        *((way, c) for way in ("raw", "reader") for c in ("zstd", "lz4", "none")),
        ("processes", "lz4"), ("pipeline", "lz4"), ("torch", "lz4"), ("hdf5", "gzip"),
    ]  # fmt: skip
    assert len(list(jobs_of(options, shape))) == 2 * len(found)
    notes = {row["way"]: row["note"] for row in skipped(options, shape)}
    assert notes["litdata"] == notes["mosaicml-streaming"] == "skipped: make peers"


def test_more_cores_than_there_are_and_tiles_of_another_size_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cores=\[1000\]: this machine gives \d+; name fewer"):
        main(["cores=[1000]"])
    with pytest.raises(UsageError, match=r"has tiles of 24 px, the shape asks for 64 px; use shapes=IMAGE/PATCH/24"):
        loader_tiles.base_of(str(manifest.directory), 64, 1, tmp_path)


@pytest.mark.drill
@pytest.mark.long
def test_everything_is_measured_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data_set(tmp_path, tiles=40, size=32, row_group=32, shard_rows=40)
    assert main([f"data={tmp_path}", "shapes=[32/8/32]", "batch=4", "seconds=0.5", "warm=0.2", "rounds=1", "save=false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("Ray Data pipeline / reader in plain processes" in line for line in lines)
    assert any("first batch of the pipeline" in line and "| no |" in line for line in lines)
