import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import release_fixture as fixture
from release_fixture import (
    STEM,
    damage_chunk,
    edit_hdf5,
    edit_json,
    hot,
    read_part,
    replaced,
    write_part,
    write_release,
)

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import TABLE, Kind, Level
from mmearth_ray.shards.build import BUILDING
from mmearth_ray.shards.convert import DISPLACED, ConvertOptions, convert, shuffled
from mmearth_ray.shards.manifest import MANIFEST, Manifest
from mmearth_ray.shards.read import open_shard, read_block
from mmearth_ray.shards.schema import TileBlock, has_value
from mmearth_ray.shards.verify import VerifyOptions, verify

TILES = 24
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "make_release.py"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "r", tiles=TILES)


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


def options(**changed: Any) -> ConvertOptions:
    return ConvertOptions(**{"workers": 1, "shard_rows": 7, **changed})


def blocks(manifest: Manifest) -> list[TileBlock]:
    result = []
    for record in manifest.shards:
        with open_shard(manifest.directory / record.file) as file:
            result += [read_block(file, group, manifest.tile_size) for group in range(file.num_row_groups)]
    return result


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file()}


def assert_same_values(directory: Path, stem: str, manifest: Manifest) -> None:
    """Every value of every tile is the release's, bit for bit; labels are the places of the ones."""
    with h5py.File(directory / f"{stem}.h5") as file:
        row_of = {record[0].decode(): row for row, record in enumerate(file["metadata"][:])}  # type: ignore[index]
        layers: dict[str, np.ndarray] = {m.name: file[m.name][:] for m in TABLE}  # type: ignore[index]
    seen = []
    for block in blocks(manifest):
        rows = [row_of[tile] for tile in block.id]
        seen += rows
        for m in TABLE:
            raw = layers[m.name][rows]
            if m.level is Level.IMAGE and m.kind is Kind.CATEGORICAL:
                raw = np.where(raw.any(axis=1), raw.argmax(axis=1), -1).astype("int16")
            assert block.layers[m.name].tobytes() == raw.tobytes(), m.name
    assert sorted(seen) == list(range(len(row_of)))


def test_every_value_survives_and_presence_is_explicit(release: Path, tmp_path: Path) -> None:
    manifest = convert(release, tmp_path / "o", options())
    assert_same_values(release, STEM, manifest)
    assert [shard.rows for shard in manifest.shards] == [7, 7, 7, 3]
    assert manifest.name == STEM
    for block in blocks(manifest):
        for place, row in enumerate(map(int, block.id)):
            assert block.product[place] == ("l2a" if fixture.is_l2a(row) else "l1c")
            assert (block.latitude[place], block.longitude[place]) == fixture.place(row)
            assert block.date[place] == fixture.day(row)
            assert (block.split[place], block.source[place]) == ("train", STEM)
            assert str(block.crs[place]).startswith("EPSG:32")
            shifted = fixture.is_shifted(row)
            for m in TABLE:
                usable = bool(has_value(block.layers[m.name][place : place + 1], m)[0])
                expected = usable and not (shifted and m.name in DISPLACED)
                assert block.present[m.name][place] == expected, (m.name, row)
            assert block.present["era5"][place] == fixture.has_era5(row)
            assert block.present["sentinel2"][place]
    assert verify(tmp_path / "o", VerifyOptions(sample=1.0)).problems == []


def test_damage_that_only_a_layer_shows_keeps_the_finished_shards(copy: Path, tmp_path: Path) -> None:
    last = int(shuffled(TILES, 0)[-1])
    hot("biome", last, [1, 1])(copy)
    with pytest.raises(DataError, match=rf"'biome' of tile '{last}' .* is not one-hot"):
        convert(copy, tmp_path / "o", options())
    assert len(list((tmp_path / "o").glob("part-*.parquet"))) == 3


def test_published_statistics_come_along_unless_refused(release: Path, tmp_path: Path) -> None:
    given = read_part(release, "band_stats")
    published = convert(release, tmp_path / "o", options()).release_statistics
    assert published is not None
    l2a, l1c = published["sentinel2"]["l2a"], published["sentinel2"]["l1c"]
    assert l2a["B10"] == {"mean": None, "std": None, "min": None, "max": None}
    assert l1c["B8A"]["mean"] == given["sentinel2_l1c"]["mean"][7]
    assert published["sentinel1"]["all"]["desc_VH"]["std"] == given["sentinel1"]["std"][5]
    assert published["era5"]["all"]["year_max_temp"]["max"] == given["era5"]["max"][10]
    assert "sentinel2_cloudmask" not in published
    assert convert(release, tmp_path / "p", options(statistics="manifest")).release_statistics is None
    with pytest.raises(DataError, match="the other value of `statistics`"):
        convert(release, tmp_path / "p", options())


def test_the_order_is_a_seeded_permutation(release: Path, tmp_path: Path) -> None:
    assert sorted(shuffled(1000, 5).tolist()) == list(range(1000))
    # a fixed order: with another one, the same seed would no longer give the same data set
    assert shuffled(8, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    first = [tile for block in blocks(convert(release, tmp_path / "a", options(seed=3))) for tile in block.id]
    assert first == [str(row) for row in shuffled(TILES, 3)]


def test_hold_out_moves_whole_blocks_of_places(release: Path, tmp_path: Path) -> None:
    info = read_part(release, "tile_info")
    for row, entry in enumerate(info.values()):
        entry["lat"], entry["lon"] = (None, None) if row == 0 else (10 + 0.1 * (row % 4), 20 + row // 4)
    directory = Path(shutil.copytree(release, tmp_path / "r"))
    write_part(directory, "tile_info", info)
    split_of = {}
    for block in blocks(convert(directory, tmp_path / "o", options(holdout=0.5, seed=1))):
        split_of |= dict(zip(block.id, block.split, strict=True))
    by_block = [{split_of[str(row)] for row in range(first, first + 4) if row} for first in range(0, TILES, 4)]
    assert all(len(splits) == 1 for splits in by_block)
    assert set.union(*by_block) == {"train", "val"}
    assert split_of["0"] == "train", "a tile without a place stays"

    write_part(directory, "splits", {"train": list(range(1, 20)), "val": [20], "test": [21]})
    manifest = convert(directory, tmp_path / "p", options(holdout=0.5))
    splits = [shard.splits for shard in manifest.shards]
    assert {name: sum(s.get(name, 0) for s in splits) for name in ("train", "val", "test", "none")} == {
        "train": 19, "val": 1, "test": 1, "none": 3,
    }  # fmt: skip


def test_kinds_of_missing_are_accepted(copy: Path, tmp_path: Path) -> None:
    hot("biome", 3, [0])(copy)
    hot("eco_region", 4, [0])(copy)
    edit_hdf5(lambda file: file.pop("sentinel2_scl"))(copy)
    edit_hdf5(lambda file: file.pop("esa_worldcover"))(copy)
    edit_hdf5(lambda file: file.create_dataset("something_else", data=[1]))(copy)
    replaced("metadata", lambda records: records[["tile_id"]].astype([("tile_id", "S100")]))(copy)
    info = {"S2_DATE": "", "S2_type": "l1c", "CRS": None, "source": "elsewhere", "unheard": {"of": 1}}
    edit_json("tile_info", lambda given: given["5"].update(info, BANDS=None, biome=None))(copy)
    found = {}
    manifest = convert(copy, tmp_path / "o", options())
    for block in blocks(manifest):
        for place, tile in enumerate(block.id):
            found[int(tile)] = {
                "biome": int(block.layers["biome"][place]), "eco_region": int(block.layers["eco_region"][place]),
                "date": block.date[place], "crs": block.crs[place], "source": block.source[place],
                "product": block.product[place],
            }  # fmt: skip
        assert not block.present["sentinel2_scl"].any()
        assert not block.present["esa_worldcover"].any()
        assert (block.layers["sentinel2_scl"] == 255).all()
    assert found[3]["biome"] == -1
    assert found[4]["eco_region"] == -1
    assert found[5] == {"biome": fixture.region(5)[0], "eco_region": fixture.region(5)[1], "date": None, "crs": None,
                        "source": "elsewhere", "product": "l1c"}  # fmt: skip
    assert found[6]["product"] == "l2a"
    assert manifest.statistics["sentinel2_cloudprod"]["l1c"]["MSK_CLDPRB"]["mean"] is None
    assert verify(tmp_path / "o", VerifyOptions()).problems == []


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mmearth_ray.shards", *map(str, arguments)]


def test_a_killed_conversion_continues_where_it_stopped(tmp_path: Path) -> None:
    directory, out = write_release(tmp_path / "r", tiles=80), tmp_path / "o"
    run = command("convert", directory, out, "workers=1", "shard_rows=2")
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 60
        while len(list(out.glob(f"{BUILDING}/0*.json"))) < 3 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / MANIFEST).exists(), "the kill came too late to test anything"
    finished = [path.stem for path in out.glob(f"{BUILDING}/0*.json")]
    before = {stem: (out / f"part-{stem}.parquet").stat().st_mtime_ns for stem in finished}
    manifest = convert(directory, out, options(shard_rows=2))
    assert len(before) >= 3
    assert {stem: (out / f"part-{stem}.parquet").stat().st_mtime_ns for stem in finished} == before
    convert(directory, tmp_path / "whole", options(shard_rows=2))
    assert hashes(out) == hashes(tmp_path / "whole")
    assert manifest.rows == 80
    assert sorted(p.name for p in out.iterdir()) == sorted(hashes(out))


def test_a_full_disk_leaves_finished_shards_and_no_temporary_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: it fails a write in the same place, in the same way."""
    directory = write_release(tmp_path / "r", tiles=12)
    whole = convert(directory, tmp_path / "whole", options(shard_rows=2))
    sizes = [shard.bytes for shard in whole.shards]
    late = next(i for i in range(1, len(sizes)) if sizes[i] > max(sizes[:i]))
    limit = max(sizes[:late]) + 1

    out = tmp_path / "o"
    limited = (  # Python ignores SIGXFSZ, so that a write beyond the limit fails with an error
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from mmearth_ray.errors import run_command; from mmearth_ray.shards.__main__ import main;"
        "sys.exit(run_command(main, sys.argv[1:]))"
    )
    run = [sys.executable, "-c", limited, *command("convert", directory, out, "workers=1", "shard_rows=2")[3:]]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"error: cannot write {out}/part-0000{late}.parquet: " in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in out.iterdir()) == [BUILDING, *(f"part-0000{i}.parquet" for i in range(late))]
    convert(directory, out, options(shard_rows=2))
    assert hashes(out) == hashes(tmp_path / "whole")


def test_tasks_on_several_workers_give_the_same_bytes_and_the_same_errors(copy: Path, tmp_path: Path) -> None:
    one = convert(copy, tmp_path / "one", options(workers=1))
    two = convert(copy, tmp_path / "two", options(workers=2))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert one.digest == two.digest
    damage_chunk(copy)
    with pytest.raises(DataError, match="row 11 of 'aster' cannot be read") as caught:
        convert(copy, tmp_path / "three", options(workers=2))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("three/*.tmp"))


@pytest.mark.skipif(not REAL.exists(), reason="the real satellite tiles are not beside this checkout")
def test_real_tiles_survive(tmp_path: Path) -> None:
    subprocess.run([sys.executable, REAL, tmp_path, "--size", "64"], check=True, capture_output=True)
    stem = "data_real_v001_64"
    manifest = convert(tmp_path / stem, tmp_path / "o", options(shard_rows=256, holdout=0.2))
    assert_same_values(tmp_path / stem, stem, manifest)
    found = verify(tmp_path / "o", VerifyOptions())
    assert (found.problems, found.warnings, found.tiles) == ([], [], 967)
    splits = {name: sum(shard.splits.get(name, 0) for shard in manifest.shards) for name in ("train", "val")}
    assert splits["train"] + splits["val"] == 967
    assert splits["val"] > 0
    sources = {source for block in blocks(manifest) for source in block.source}
    assert "eurosat_ms_64" in sources
    info = json.loads((tmp_path / stem / f"{stem}_tile_info.json").read_text())
    assert len({entry["source"] for entry in info.values()}) == len(sources)
