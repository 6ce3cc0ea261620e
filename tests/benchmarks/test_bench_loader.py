"""The comparison of loaders: every way gives the same tiles, and the arithmetic of its rates, ratios and bytes."""

import json
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from tiny_earth import make_data_set

from benchmarks import loader_hdf5, loader_peers, loader_tiles
from benchmarks.bench_loader import Options, Shape, contenders, jobs_of, main, skipped
from benchmarks.loader_clock import Job
from benchmarks.loader_job import WAYS, read, together
from benchmarks.loader_parts import parts
from benchmarks.loader_shared import from_process
from benchmarks.loader_source import open_shards, ranges, stored_bytes, subsets
from benchmarks.loader_tiles import PEERS, ROOT, Tiles, chunk_bytes
from benchmarks.loader_watch import watch
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
    assert numbers == ([5, 5, 5, 5] if way in ("raw", "checked") else [4, 4, 4, 4])  # row groups there


def test_the_micro_batches_are_those_of_training() -> None:
    assert list(islice(ranges(4, workers=2, rank=1), 3)) == [(4, 8), (12, 16), (20, 24)]


# ---- measuring ----


def test_consumers_of_several_cores_are_measured_together(manifest: Manifest, tmp_path: Path) -> None:
    found = together(job("reader", manifest.directory, cores=2, meeting=str(tmp_path)))
    assert found.end > found.begin
    assert found.tiles_per_second > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_way_is_measured_in_a_process_of_its_own(manifest: Manifest) -> None:
    found = watch(job("reader", manifest.directory, seconds=0.3))
    assert found.tiles_per_second > 0
    assert 0 < found.cpu_per_tile < 1
    assert found.peak > 10_000_000


def test_a_way_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reader on 1 cores was not measured: error: .* is no data set"):
        watch(job("reader", tmp_path))


# ---- bytes and parts ----


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
        *((way, c) for way in ("raw", "checked", "reader") for c in ("zstd", "lz4", "none")),
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
