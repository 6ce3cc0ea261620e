import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from release_fixture import STEM, damage_chunk, edit_hdf5, edit_json, hot, replaced, write_release

from mmearth_ray.errors import DataError
from mmearth_ray.modalities import Role, get
from mmearth_ray.shards.convert import ConvertOptions, convert
from mmearth_ray.shards.release import open_release

TILES = 24


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "r", tiles=TILES)


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


def test_it_is_found_by_its_file(release: Path, copy: Path) -> None:
    found = open_release(release)
    assert (found.stem, found.tile_size, len(found.rows), found.absent) == (STEM, 16, TILES, ())
    shutil.copy(copy / f"{STEM}.h5", copy / "other.h5")
    with pytest.raises(DataError, match="holds several releases"):
        open_release(copy)
    with pytest.raises(DataError, match="is a file"):
        open_release(copy / "other.h5")


def test_the_hdf5_files_product_wins_with_a_note(copy: Path) -> None:
    edit_json("tile_info", lambda given: given["5"].update(S2_type="l2a"))(copy)
    found = open_release(copy)
    assert found.rows.product[5] == 0
    assert any("S2_type of 1 tiles (first '5') differs" in note for note in found.notes)


def truncate(directory: Path) -> None:
    path = directory / f"{STEM}.h5"
    os.truncate(path, path.stat().st_size // 2)


def no_statistics(given: Any) -> None:
    given["sentinel1"]["std"][4] = float("nan")


def text(part: str, value: str) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        (directory / f"{STEM}_{part}.json").write_text(value)

    return run


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (shutil.rmtree, "copy does not exist"),
    "no hdf5": (lambda d: (d / f"{STEM}.h5").unlink(), rf"has no {STEM}\.h5"),
    **{
        f"no {part}": (lambda d, p=part: (d / f"{STEM}_{p}.json").unlink(), rf"{STEM}_{part}\.json is missing")
        for part in ("band_stats", "splits", "tile_info")
    },
    "truncated": (truncate, r"\.h5 is truncated or no HDF5 file"),
    "not hdf5": (lambda d: (d / f"{STEM}.h5").write_text("<html>404</html>"), "truncated or no HDF5 file"),
    "damaged chunk": (damage_chunk, "row 11 of 'aster' cannot be read"),
    "json cut short": (text("splits", '{"train": [1, 2'), rf"{STEM}_splits\.json does not parse as JSON"),
    "json of another kind": (text("tile_info", "[]"), "must be an object of tile id"),
    "no entry": (edit_json("tile_info", lambda d: d.pop("9") and None), r"no entry for tile '9' \(row 9\)"),
    "id twice in tile_info": (text("tile_info", '{"1": {"lat": 0}, "1": {"lat": 0}}'), "'1' is given twice"),
    "id twice": (edit_hdf5(lambda f: f["metadata"].__setitem__(7, (b"2", b"l1c"))), "tile '2' is in rows 2 and 7"),
    "row counts": (replaced("aster", lambda a: a[:-1]), r"'aster' has shape \(23, 2, 16, 16\), expected \(24, 2, 16, 16\)"),
    "metadata rows": (replaced("metadata", lambda a: a[:-1]), "'metadata' has shape"),
    "another type": (replaced("aster", lambda a: a.astype("f4")), "'aster' is float32, expected int16"),
    "another size": (replaced("dynamic_world", lambda a: a[..., :8]), "'dynamic_world' has shape"),
    "no sentinel2": (edit_hdf5(lambda f: f.pop("sentinel2")), "has no dataset 'sentinel2'"),
    "product": (edit_hdf5(lambda f: f["metadata"].__setitem__(7, (b"7", b"l3"))), r"tile '7' \(row 7\): S2_type is 'l3'"),
    "product in tile_info only": (
        lambda d: (
            replaced("metadata", lambda a: a["tile_id"])(d), edit_json("tile_info", lambda i: i["7"].update(S2_type="L3"))(d)
        ), r"tile '7' \(row 7\): S2_type is 'l3', expected l"
    ),
    "two hot": (hot("biome", 8, [1, 1]), r"'biome' of tile '8' \(row 8\) is not one-hot"),
    "not one": (hot("eco_region", 8, [0, 2]), r"'eco_region' of tile '8' \(row 8\) is not one-hot"),
    "other label": (hot("biome", 8, [0, 0, 1]), "biome of tile '8' .* is 2 in .* but 12 in tile_info"),
    "date": (edit_json("tile_info", lambda d: d["4"].update(S2_DATE="soon")), "S2_DATE of tile '4' is 'soon'"),
    "latitude": (edit_json("tile_info", lambda d: d["4"].update(lat=123)), "lat of tile '4' is 123"),
    "two splits": (text("splits", '{"train": [1, 2], "val": [2]}'), "row 2 is in both 'train' and 'val'"),
    "twice in a split": (text("splits", '{"train": [1, 1]}'), "row 1 is listed twice in 'train'"),
    "row out of range": (text("splits", '{"train": [24]}'), "lists row 24, but the rows are 0 to 23"),
    "no row number": (text("splits", '{"train": ["1"]}'), "must list row numbers only"),
    "lengths": (edit_json("band_stats", lambda d: d["aster"].update(mean=[1.0])), "'mean' of 'aster' must be a list of 2"),
    "no statistics": (edit_json("band_stats", no_statistics), r"sentinel1\.desc_VV has .* valid values .*statistics=manifest"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_release_is_refused_in_one_line_and_nothing_is_left(copy: Path, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(copy)
    with pytest.raises(DataError, match=message) as caught:
        convert(copy, tmp_path / "o", ConvertOptions(workers=1))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_a_release_with_poor_statistics_goes_on_without_them(copy: Path, tmp_path: Path) -> None:
    edit_json("band_stats", no_statistics)(copy)
    assert convert(copy, tmp_path / "o", ConvertOptions(workers=1, statistics="manifest")).rows == TILES


def test_statistics_are_required_of_tasks_only(copy: Path, tmp_path: Path) -> None:
    assert get("sentinel2_cloudprod").role is Role.QUALITY
    edit_json("band_stats", lambda given: given.pop("sentinel2_cloudprod_l2a") and None)(copy)
    assert convert(copy, tmp_path / "o", ConvertOptions(workers=1)).rows == TILES
