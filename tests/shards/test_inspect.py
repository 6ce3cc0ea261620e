from pathlib import Path

import numpy as np
import pytest
from release_fixture import is_shifted, region, write_release

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import TABLE
from mmearth_ray.shards.convert import ConvertOptions, convert
from mmearth_ray.shards.inspect import InspectOptions, describe, draw, find_tile, tile_facts, tile_layers
from mmearth_ray.shards.manifest import Manifest, load_manifest

SHIFTED = next(row for row in range(24) if is_shifted(row))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("inspect")
    convert(write_release(folder / "r", tiles=24), folder / "o", ConvertOptions(workers=1, shard_rows=10))
    return load_manifest(folder / "o")


def test_the_table_has_every_modality_and_band(manifest: Manifest) -> None:
    text = describe(manifest)
    lines = text.splitlines()
    assert "tiles      24 in 3 shards" in lines
    assert "products   l1c 12, l2a 12" in lines
    assert any(line.startswith("origin") and "release data_fixture_v001" in line for line in lines)
    for m in TABLE:
        assert sum(line.startswith(f"{m.name} ") for line in lines) == 1
    mean = manifest.statistics["sentinel2"]["l1c"]["B10"]["mean"]
    (b10,) = [line for line in lines if line.startswith("  B10 (l1c)")]
    assert b10.split()[2:5] == ["99.2", "%", f"{mean:.6g}"]
    (absent,) = [line for line in lines if line.startswith("  B10 (l2a)")]
    assert absent.split()[2:6] == ["0.0", "%", "-", "-"]


def test_a_tile_is_found_by_its_id_and_untrusted_layers_are_empty(manifest: Manifest) -> None:
    block = find_tile(manifest, str(SHIFTED))
    assert block.id == [str(SHIFTED)]
    layers = tile_layers(block, TABLE, manifest.tile_size)
    assert layers["biome"] == region(SHIFTED)[0]
    assert layers["sentinel2"].shape == (13, 16, 16)
    assert layers["era5"].shape == (12,)
    assert (layers["aster"] == -32768).all()
    assert np.isneginf(layers["sentinel1"]).all()
    assert tile_facts(block)["product"] == "l2a"
    assert len(find_tile(manifest, None)) == 1
    with pytest.raises(DataError, match="has no tile '999'"):
        find_tile(manifest, "999")


def test_a_tile_is_drawn(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "tile.png"
    assert draw(manifest.directory, InspectOptions(figure=str(path), tile="5")) == "5"
    assert path.read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "file").write_text("")
    for wrong, why in (("no/tile.png", "No such file or directory"), ("file/tile.png", "Not a directory")):
        with pytest.raises(DataError, match=f"^cannot write {tmp_path / wrong}: {why}$"):
            draw(manifest.directory, InspectOptions(figure=str(tmp_path / wrong)))
