"""Label tasks from shards: labels and images are the tiles', and the test split is apart in space."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_earth import make_block, make_data_set

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.convert_tiles import TilesOptions, convert
from mmearth_ray.evaluate.datasets.task import Goal, Task, load_task
from mmearth_ray.modalities import get
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.schema import TileBlock
from mmearth_ray.shards.synthesise import SynthesiseOptions, synthesise
from mmearth_ray.shards.write import write_shard

TILES, SIZE, HELD_OUT = 150, 16, 120
BANDS = get("sentinel2").default_bands()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tile i lies at (i / 2, -i / 4) degrees; the first 30 are of the training split; products take turns."""
    return Path(str(make_data_set(tmp_path_factory.mktemp("tiles") / "s", TILES, SIZE, held_out=HELD_OUT).directory))


@pytest.fixture(scope="module")
def truth() -> TileBlock:
    return make_block(range(TILES), SIZE, TILES - HELD_OUT)


def drawn(shards: Path, out: Path, **changed: Any) -> Task:
    convert(shards, out, TilesOptions(**{"least": 1, **changed}))
    return load_task(out)


def tiles_of(task: Task) -> np.ndarray:
    return np.array([int(name) for name in task.ids])


@pytest.mark.parametrize(("product", "size"), [("l1c", None), ("l2a", 10)])
def test_images_and_labels_are_those_of_the_tiles(
    product: str, size: int | None, shards: Path, truth: TileBlock, tmp_path: Path
) -> None:
    task = drawn(shards, tmp_path / "t", product=product, size=size)
    tiles, side = tiles_of(task), size or SIZE
    assert (task.info.bands, task.info.product, task.info.height, task.info.width) == (BANDS.bands, product, side, side)
    start = (SIZE - side) // 2
    kept = [truth.layers["sentinel2"][:, get("sentinel2").bands.index(band)] for band in BANDS.bands]
    expected = np.stack(kept, axis=1)[tiles, :, start : start + side, start : start + side]
    np.testing.assert_array_equal(task.images(range(len(task))), expected)
    names = [entry.name for entry in get("biome").classes]
    assert [task.info.classes[k] for k in task.labels(range(len(task)))] == [names[k] for k in truth.layers["biome"][tiles]]
    assert {truth.product[i] for i in tiles} == {product}
    assert (tiles >= TILES - HELD_OUT).all(), "pretraining saw one of these"
    assert f"Left out: 60 tiles of another product than {product}." in task.info.notes


def test_no_tile_that_is_left_is_missing_but_for_what_the_notes_tell(shards: Path, truth: TileBlock, tmp_path: Path) -> None:
    task = drawn(shards, tmp_path / "t", gap=0)
    wanted = {i for i in range(TILES - HELD_OUT, TILES, 2) if truth.layers["biome"][i] >= 0}
    left = wanted - set(tiles_of(task).tolist())
    assert set(tiles_of(task).tolist()) <= wanted
    assert not {int(truth.layers["biome"][i]) for i in left} & {
        k for k, entry in enumerate(get("biome").classes) if entry.name in task.info.classes
    }


def kilometres(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.radians(a)[:, None], np.radians(b)[None]
    angle = np.sin(a[..., 0]) * np.sin(b[..., 0]) + np.cos(a[..., 0]) * np.cos(b[..., 0]) * np.cos(a[..., 1] - b[..., 1])
    return 6371 * np.arccos(angle.clip(-1, 1))


@pytest.mark.parametrize(("block", "gap"), [(1.0, 0.0), (1.0, 130.0), (5.0, 260.0)])
def test_the_test_split_is_apart_in_space(block: float, gap: float, shards: Path, truth: TileBlock, tmp_path: Path) -> None:
    task = drawn(shards, tmp_path / "t", label="aster", band="slope", product="l1c", block=block, gap=gap, seed=1)
    place = np.stack([truth.latitude, truth.longitude], axis=1)[tiles_of(task)]
    is_test = task.split == "test"
    blocks = [{tuple(b) for b in np.floor(place[rows] / block).tolist()} for rows in (is_test, ~is_test)]
    assert not blocks[0] & blocks[1]
    assert kilometres(place[~is_test], place[is_test]).min() >= gap
    dropped = [note for note in task.info.notes if "nearer than" in note]
    assert bool(dropped) == (gap > 0)
    if dropped:
        assert dropped[0] == f"Left out: {60 - len(task)} tiles of train or valid nearer than {gap:g} km to one of test."


def test_a_split_is_the_same_whatever_other_tiles_are_taken(shards: Path, tmp_path: Path) -> None:
    whole = drawn(shards, tmp_path / "a", label="aster", band="slope", gap=0)
    part = drawn(shards, tmp_path / "b", label="aster", band="slope", gap=0, tiles=30)
    splits = dict(zip(whole.ids, whole.split, strict=True))
    assert len(part) == 30
    assert all(splits[name] == split for name, split in zip(part.ids, part.split, strict=True))
    assert drawn(shards, tmp_path / "c", label="aster", band="slope", gap=0, tiles=30).info.digest == part.info.digest
    assert set(drawn(shards, tmp_path / "d", label="aster", band="slope", gap=0, tiles=30, seed=2).ids) != set(part.ids)


def test_masks_and_quantities(shards: Path, truth: TileBlock, tmp_path: Path) -> None:
    task = drawn(shards, tmp_path / "m", label="dynamic_world", mask=True)
    labels = get("dynamic_world").label_table()[truth.layers["dynamic_world"][tiles_of(task), 0]]
    assert task.info.goal is Goal.SEGMENTATION
    names = [entry.name for entry in get("dynamic_world").classes]
    new = np.array([*(task.info.classes.index(n) if n in task.info.classes else -1 for n in names), -1])
    np.testing.assert_array_equal(task.labels(range(len(task))), new[labels])
    task = drawn(shards, tmp_path / "h", label="canopy_height_eth", band="height")
    heights = truth.layers["canopy_height_eth"][tiles_of(task), 0].reshape(len(task), -1)
    np.testing.assert_allclose(task.labels(range(len(task))), heights.mean(1))


def test_classes_too_rare_to_learn_are_left_out_with_their_tiles(shards: Path, truth: TileBlock, tmp_path: Path) -> None:
    everything = drawn(shards, tmp_path / "a", gap=0, least=1)
    task = drawn(shards, tmp_path / "b", gap=0, least=3)
    count = np.bincount(task.labels(task.rows("train")), minlength=len(task.info.classes))
    assert count.min() >= 3
    assert 2 <= len(task.info.classes) < len(everything.info.classes)
    assert any(note.startswith("Left out: classes of fewer than 3 training tiles: ") for note in task.info.notes)
    with pytest.raises(DataError, match="fewer than 2 classes of biome have 50 training tiles"):
        drawn(shards, tmp_path / "c", least=50)


def test_tiles_without_a_place_without_images_or_of_too_few_known_pixels_are_left_out(tmp_path: Path) -> None:
    block = make_block(range(0, 80, 2), SIZE, 0)
    block.latitude[3] = np.nan
    block.present["sentinel2"][4] = False
    block.layers["canopy_height_eth"][5, 0, 1:] = 127
    record = write_shard(tmp_path / "part.parquet", [block], SIZE)
    Manifest(tmp_path, "odd", SIZE, (record,), {"kind": "odd"}).save()
    task = drawn(tmp_path, tmp_path / "t", label="canopy_height_eth", band="height", gap=0)
    assert {block.id[i] for i in (3, 4, 5)} == set(block.id) - set(task.ids.tolist())
    assert "Left out: 2 tiles without images or a place." in task.info.notes
    assert "Left out: 1 tile whose canopy_height_eth is unknown." in task.info.notes


def test_all_takes_what_pretraining_saw_and_says_so(shards: Path, tmp_path: Path) -> None:
    task = drawn(shards, tmp_path / "t", split="all", product="l1c")
    assert tiles_of(task).min() < TILES - HELD_OUT
    assert any("Pretraining on these shards sees some" in note for note in task.info.notes)
    inside = drawn(shards, tmp_path / "u", where="latitude < 40 and source == 'even'")
    assert tiles_of(inside).max() < 80


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"split": "test"}, r"split=test: none of the tiles is in it \(train 30, val 120\); hold some out .* or take split=all"),
     ({"where": "latitude > 80"}, "no tile of .* satisfies it"), ({"where": "latitude >"}, "where: cannot read"),
     ({"where": "split == 'train'"}, "split=val: none of the tiles is in it"),
     ({"size": 17}, "size=17 is larger than the 16 px"),
     ({"where": "source == 'even'", "product": "l2a"}, "product=l2a: none of the tiles is of it"),
     ({"label": "moon"}, "label=moon"), ({"valid": 0.5, "test": 0.5}, "leave nothing to train on")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        drawn(shards, tmp_path / "t", **changed)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_too_few_places_or_no_label_at_all_are_told(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too few blocks of 90 degrees .* use a smaller block="):
        drawn(shards, tmp_path / "t", block=90)
    with pytest.raises(DataError, match="of 60 tiles none has a known canopy_height_eth"):
        drawn(shards, tmp_path / "t", label="canopy_height_eth", band="std")
    with pytest.raises(DataError, match="there is no data set at"):
        drawn(tmp_path / "none", tmp_path / "t")
    with pytest.raises(UsageError, match="is no labelled data set"):
        drawn(shards, shards)


def test_tiles_of_the_procedural_earth(tmp_path: Path) -> None:
    synthesise(tmp_path / "earth", SynthesiseOptions(tiles=96, size=16, holdout=0.5))
    task = drawn(tmp_path / "earth", tmp_path / "t", label="dynamic_world", block=0.25, split="all")
    assert task.info.origin["kind"] == "tiles"
    assert min(task.info.counts.values()) > 0
