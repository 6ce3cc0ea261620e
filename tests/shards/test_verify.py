import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from release_fixture import write_release

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import TABLE, get
from mmearth_ray.shards.convert import ConvertOptions, convert
from mmearth_ray.shards.manifest import MANIFEST, Manifest, load_manifest
from mmearth_ray.shards.metadata import write_metadata
from mmearth_ray.shards.read import open_shard, read_block
from mmearth_ray.shards.schema import TileBlock
from mmearth_ray.shards.verify import Findings, VerifyOptions, _Tally, sample, verify
from mmearth_ray.shards.write import write_shard

SIZE = 8
PART = "part-00001.parquet"


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    release = write_release(folder / "r", tiles=24, size=SIZE)
    convert(release, folder / "o", ConvertOptions(workers=1, shard_rows=8))
    return folder / "o"


@pytest.fixture
def copy(data_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "copy"))


def rewrite(directory: Path, change: Callable[[TileBlock], TileBlock], *, honest: bool = True) -> None:
    """Write shard 1 anew with other values.  `honest`: with a record of what is in it; else only the file's facts change."""
    manifest = load_manifest(directory)
    with open_shard(directory / PART) as file:
        block = change(read_block(file, 0, SIZE))
    record = write_shard(directory / PART, [block], SIZE)
    if not honest:
        record = replace(manifest.shards[1], bytes=record.bytes, sha256=record.sha256)
    save(replace(manifest, metadata=write_metadata(directory, manifest.shards)), record)


def save(manifest: Manifest, record: object) -> None:
    replace(manifest, shards=(manifest.shards[0], record, *manifest.shards[2:])).save()  # type: ignore[arg-type]


def with_layer(name: str, place: tuple[int, ...], value: int) -> Callable[[TileBlock], TileBlock]:
    def change(block: TileBlock) -> TileBlock:
        block.layers[name] = block.layers[name].copy()
        block.layers[name][place] = value
        return replace(block, present={**block.present, name: np.ones(len(block), bool)})

    return change


def test_a_sound_data_set_is_ok(data_set: Path) -> None:
    found = verify(data_set, VerifyOptions(sample=1.0))
    assert (found.problems, found.warnings) == ([], [])
    assert found.summary() == "ok: 24 tiles in 3 shards"


def test_a_flipped_byte_is_found(copy: Path) -> None:
    path = copy / PART
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = verify(copy, VerifyOptions())
    assert found.problems == [f"{PART}: its bytes were altered (another SHA-256 than in the manifest)"]
    assert found.summary() == "1 problem in 24 tiles in 3 shards"


def test_a_flipped_byte_under_a_matching_hash_is_one_line_too(copy: Path) -> None:
    path = copy / PART
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    manifest = load_manifest(copy)
    save(manifest, replace(manifest.shards[1], sha256=hashlib.sha256(data).hexdigest()))
    problems = verify(copy, VerifyOptions()).problems
    assert problems
    assert all(line.startswith(PART) and "\n" not in line for line in problems)


@pytest.mark.parametrize("cut", [0, 100])
def test_a_missing_or_shortened_shard_is_found(copy: Path, cut: int) -> None:
    path = copy / PART
    data = path.read_bytes()
    path.unlink()
    if cut:
        path.write_bytes(data[:-cut])
    problems = verify(copy, VerifyOptions()).problems
    assert problems == [
        f"{PART}: has {len(data) - cut:,} bytes, the manifest says {len(data):,}" if cut else f"{PART}: is missing"
    ]


def test_stray_files_are_found(copy: Path) -> None:
    (copy / "part-00009.parquet").write_text("")
    (copy / ".part-00002.parquet.1.tmp").write_text("")
    assert sorted(verify(copy, VerifyOptions(values=False)).problems) == [
        ".part-00002.parquet.1.tmp: not in the manifest; remove it", "part-00009.parquet: not in the manifest; remove it",
    ]  # fmt: skip


def test_another_schema_is_found(copy: Path) -> None:
    rows = pq.read_table(copy / PART).drop_columns(["aster.slope"])
    pq.write_table(rows, copy / PART)
    manifest = load_manifest(copy)
    data = (copy / PART).read_bytes()
    save(manifest, replace(manifest.shards[1], bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    assert verify(copy, VerifyOptions()).problems == [f"{PART}: column aster.slope is missing"]


def test_row_groups_are_compared(copy: Path) -> None:
    manifest = load_manifest(copy)
    save(manifest, replace(manifest.shards[1], row_groups=[4, 4]))
    assert verify(copy, VerifyOptions()).problems == [f"{PART}: has row groups of [8] rows, the manifest says [4, 4]"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (with_layer("aster", (0, 1, 2, 2), 91), "aster.slope has 1 values outside 0 to 90 degrees (they span"),
        (with_layer("era5", (3, 0), 1000), "era5.prev_month_avg_temp has 1 values outside 150 to 350 K"),
        (with_layer("biome", (2,), 14), "biome has 1 labels 14, which is no class"),
        (with_layer("dynamic_world", (0,), 0), "tiles without a valid value (first '"),
    ],
)
def test_values_that_cannot_be_are_found(copy: Path, change: Callable[[TileBlock], TileBlock], problem: str) -> None:
    rewrite(copy, change)
    assert any(problem in line for line in verify(copy, VerifyOptions()).problems), problem


@pytest.mark.parametrize(("unit", "shown"), [("1", "0 to 1.001 "), ("dB", "0 to 1.001 dB "), ("m1", "0 to 1.001 m1 ")])
def test_bounds_are_told_whole_whatever_their_unit(unit: str, shown: str) -> None:
    m = replace(get("sentinel1").select(["asc_VV"]), bounds=((0.0, 1.001),), units=(unit,))
    tally = _Tally()
    tally._add_ranges(np.full((1, 1, 2, 2), 2, np.float32), m)
    assert list(tally.problems((m,))) == [f"sentinel1.asc_VV has 4 values outside {shown}(they span 2 to 2)"]


def test_codes_without_a_class_are_a_warning(copy: Path) -> None:
    rewrite(copy, with_layer("esa_worldcover", (0, 0, 0, slice(0, 3)), 55))  # type: ignore[arg-type]
    found = verify(copy, VerifyOptions())
    assert found.problems == []
    assert found.warnings == [f"{PART}: esa_worldcover.map has 3 values 55, which is no class; they are read as missing"]


def test_layers_that_are_not_present_may_hold_anything(copy: Path) -> None:
    def change(block: TileBlock) -> TileBlock:
        wild = with_layer("aster", (slice(None),), 9999)(block)  # type: ignore[arg-type]
        return replace(wild, present={**wild.present, "aster": np.zeros(len(block), bool)})

    rewrite(copy, change)
    assert verify(copy, VerifyOptions()).problems == []


def test_records_must_agree_with_the_values(copy: Path) -> None:
    rewrite(copy, lambda block: with_layer("sentinel2", (0, 0, 4, 4), 0)(block), honest=False)
    problems = verify(copy, VerifyOptions(sample=1.0)).problems
    assert any("valid values" in line and "for sentinel2.B1," in line for line in problems)
    assert any(line.startswith(f"{PART}: sentinel2.B1 (") and "statistics" in line for line in problems)


def test_moments_are_compared_on_the_sample(copy: Path) -> None:
    manifest = load_manifest(copy)
    moments = json.loads(json.dumps(manifest.shards[1].moments))
    moments["all"]["lat.sin"][1] += 1e-6
    save(manifest, replace(manifest.shards[1], moments=moments))
    expected = f"{PART}: lat.sin (all): the statistics of its values are not those in the manifest"
    assert verify(copy, VerifyOptions(sample=1.0)).problems == [expected]
    assert verify(copy, VerifyOptions(sample=0.0)).problems == [], "only shard 0 was sampled"


def test_an_id_may_be_used_once(copy: Path) -> None:
    with open_shard(copy / "part-00000.parquet") as file:
        other = read_block(file, 0, SIZE).id[0]
    rewrite(copy, lambda block: replace(block, id=[other, *block.id[1:]]))
    assert verify(copy, VerifyOptions()).problems == [f"{PART}: tile id '{other}' is also in part-00000.parquet"]


def test_without_a_manifest_there_is_nothing_to_verify(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    with pytest.raises(DataError, match="no data set"):
        verify(copy, VerifyOptions())


def test_the_sample_is_spread_evenly() -> None:
    assert sample(0, 0.5) == set()
    assert sample(1, 0.0) == {0}
    assert sample(10, 0.2) == {0, 9}
    assert sample(4, 1.0) == {0, 1, 2, 3}
    assert Findings(1, 1).summary() == "ok: 1 tile in 1 shard"
    assert len(TABLE) == 15
