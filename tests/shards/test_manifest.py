import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from release_fixture import write_release
from tiny_earth import make_data_set

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import TABLE
from mmearth_ray.shards.convert import ConvertOptions, convert
from mmearth_ray.shards.manifest import MANIFEST, digest_of, load_manifest, training_counts


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    convert(write_release(folder / "r", tiles=8, size=8), folder / "o", ConvertOptions(workers=1, shard_rows=3))
    return folder / "o"


@pytest.fixture
def copy(data_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "copy"))


def test_it_reads_back_as_it_was_written(data_set: Path) -> None:
    manifest = load_manifest(data_set)
    body = json.loads((data_set / MANIFEST).read_text())
    assert manifest.to_json() == body
    assert manifest.digest == body["digest"]
    assert manifest.rows == 8
    assert [shard.rows for shard in manifest.shards] == [3, 3, 2]
    assert manifest.valid["all"]["lat.sin"] == 8


def test_training_counts_are_those_of_the_statistics(data_set: Path) -> None:
    manifest = load_manifest(data_set)
    counts = training_counts([manifest])
    assert counts["all"]["lat.sin"] == 8
    for m in TABLE:
        for variant, bands in manifest.statistics.get(m.name, {}).items():
            assert [counts[variant][column] for column in m.columns] == [bands[band]["count"] for band in m.bands]
    assert training_counts([replace(manifest, shards=())]) == replace(manifest, shards=()).valid == {}


def test_every_byte_of_it_is_under_its_digest(copy: Path) -> None:
    path = copy / MANIFEST
    path.write_text(path.read_text().replace('"name": "data_fixture_v001"', '"name": "data_fixture_v002"', 1))
    with pytest.raises(DataError, match="altered"):
        load_manifest(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99, this program reads 1"),
        ({"table_hash": "0" * 64}, "another table of modalities"),
    ],
)
def test_another_version_or_table_is_refused(copy: Path, change: dict, message: str) -> None:
    body = {**json.loads((copy / MANIFEST).read_text()), **change}
    (copy / MANIFEST).write_text(json.dumps({**body, "digest": digest_of(body)}))
    with pytest.raises(DataError, match=message):
        load_manifest(copy)


def test_another_table_in_the_program_is_refused(data_set: Path) -> None:
    table = (*TABLE[:-1], replace(TABLE[-1], units=("1",)))
    with pytest.raises(DataError, match="another table"):
        load_manifest(data_set, table)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_one_is_refused(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=MANIFEST):
        load_manifest(copy)


def test_what_is_no_data_set_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set at"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match=f"has no {MANIFEST}"):
        load_manifest(tmp_path)
    (tmp_path / ".building").mkdir()
    with pytest.raises(DataError, match="is unfinished"):
        load_manifest(tmp_path)


def test_a_manifest_of_an_earlier_version_keeps_its_digest(tmp_path: Path) -> None:
    """Its shards have neither a digest of their rows nor the length of their footer."""
    made = make_data_set(tmp_path)
    body = made.to_json()
    for shard in body["shards"]:
        del shard["content"], shard["footer"]
    body["digest"] = digest_of(body)
    (tmp_path / MANIFEST).write_text(json.dumps(body))
    found = load_manifest(tmp_path)
    assert found.digest == body["digest"] != made.digest
    assert found.to_json() == body
