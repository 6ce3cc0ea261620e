"""What a run is evaluated on: its held-out tiles, read once, with the labels of their shards, or a data set that it names."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import settings
from tiny_earth import make_block, make_data_set
from tiny_task import tiny_task

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.datasets.task import Goal, Task
from mmearth_ray.evaluate.during.halves import halves
from mmearth_ray.evaluate.during.held_out import held_out_task, identities, products_of, round_of
from mmearth_ray.experiment import Experiment, open_experiment
from mmearth_ray.modalities import get
from mmearth_ray.shards.schema import TileBlock

TILES, HELD_OUT = 72, 30


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of 44 px, which is no multiple of the patch, and the whole of them."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=TILES, size=44, held_out=HELD_OUT)
    return folder


def opened(shards: Path, folder: Path, *arguments: str) -> Experiment:
    return open_experiment(settings(shards, folder / "run", "eval.every=2", *arguments), shards)


def task_of(shards: Path, folder: Path, *arguments: str) -> Task:
    return held_out_task(opened(shards, folder, *arguments), folder / "evaluation")


def tiles_of(task: Task, size: int = 44) -> TileBlock:
    """The same tiles as they were made."""
    numbers = [int(name) for name in task.ids]
    blocks = [make_block(range(n, n + 1), size, TILES - HELD_OUT) for n in numbers]
    layers = {name: np.concatenate([b.layers[name] for b in blocks]) for name in blocks[0].layers}
    joined: dict[str, Any] = {key: [value for b in blocks for value in getattr(b, key)] for key in ("id", "product", "split")}
    joined |= {key: np.concatenate([getattr(b, key) for b in blocks]) for key in ("latitude", "longitude")}
    return TileBlock(**joined, date=[], crs=[], source=[], layers=layers, present={})


def test_held_out_tiles_come_with_their_pixels_labels_and_products(shards: Path, tmp_path: Path) -> None:
    experiment = opened(shards, tmp_path)
    task, entry = held_out_task(experiment, tmp_path), experiment.spec.input
    made = tiles_of(task)
    assert set(made.split) == {"val"}
    places = [get(entry.name).bands.index(band) for band in entry.bands]
    assert task.info.bands == identities(entry) == entry.bands
    assert np.array_equal(task.images(np.arange(len(task))), made.layers[entry.name][:, places, 2:42, 2:42])
    label = get("biome")
    names = [label.classes[code].name for code in made.layers["biome"].ravel().tolist()]
    assert [task.info.classes[k] for k in task.labels(np.arange(len(task)))] == names
    assert products_of(task).tolist() == made.product
    assert set(made.product) == {"l1c", "l2a"}
    assert task.info.product is None
    held_out = make_block(range(TILES - HELD_OUT, TILES), 44, TILES).layers["biome"]
    assert len(task) == np.count_nonzero(held_out >= 0) < HELD_OUT


def test_the_halves_are_whole_blocks_of_places(shards: Path, tmp_path: Path) -> None:
    task = task_of(shards, tmp_path)
    made = tiles_of(task)
    tested, side = halves(np.stack([made.latitude, made.longitude]), 0)
    assert [split == "test" for split in task.split] == tested.tolist()
    assert task.info.origin["block_degrees"] == side > 0
    assert abs(2 * tested.sum() - len(task)) <= 6


def test_they_are_read_once_and_then_no_more(tmp_path: Path) -> None:
    shards = tmp_path / "data"
    make_data_set(shards, tiles=24, size=40, held_out=12)
    experiment = opened(shards, tmp_path)
    task = held_out_task(experiment, tmp_path / "evaluation")
    shutil.rmtree(shards)
    again = held_out_task(experiment, tmp_path / "evaluation")
    assert again.info == task.info
    assert again.folder == task.folder


def test_one_that_was_damaged_is_drawn_again(shards: Path, tmp_path: Path) -> None:
    task = task_of(shards, tmp_path)
    (task.folder / "task.json").write_text("{")
    assert task_of(shards, tmp_path).info == task.info


def test_what_decides_them_is_not_the_runs_seed(shards: Path, tmp_path: Path) -> None:
    task = task_of(shards, tmp_path)
    assert task_of(shards, tmp_path, "seed=9", "model.targets=[aster]", "eval.threads=2").folder == task.folder
    others = ("eval.tiles=9", "eval.label=eco_region", "data.validate_where=split == 'train'", "model.patch_size=16")
    assert len({task_of(shards, tmp_path, other).folder for other in others} | {task.folder}) == 5


def test_no_more_tiles_than_asked_for(shards: Path, tmp_path: Path) -> None:
    few, all_ = task_of(shards, tmp_path, "eval.tiles=12"), task_of(shards, tmp_path)
    assert 8 <= len(few) <= 12
    assert set(few.ids) < set(all_.ids)


def test_a_map_of_classes_gives_the_class_of_most_pixels(shards: Path, tmp_path: Path) -> None:
    task = task_of(shards, tmp_path, "eval.label=esa_worldcover")
    label, maps = get("esa_worldcover"), tiles_of(task).layers["esa_worldcover"][:, 0, 2:42, 2:42]
    for k, codes in zip(task.labels(np.arange(len(task))), maps, strict=True):
        counts = [np.count_nonzero(codes == entry.code) for entry in label.classes]
        assert task.info.classes[k] == label.classes[int(np.argmax(counts))].name


def test_tiles_of_several_data_sets_keep_their_names(tmp_path: Path) -> None:
    for name, tiles, size in (("one", 20, 40), ("two", 40, 32)):
        make_data_set(tmp_path / name, tiles=tiles, size=size, held_out=tiles // 2, name=name)
    places = [tmp_path / "one", tmp_path / "two"]
    config = settings(places[0], tmp_path / "run", "eval.every=2", f"data.shards=[{places[0]},{places[1]}]")
    task = held_out_task(open_experiment(config, *places), tmp_path)
    owners = [name.partition("/")[0] for name in task.ids]
    assert owners.count("two") > owners.count("one") > 0
    assert (task.info.height, task.info.width) == (32, 32)
    first = next(i for i, owner in enumerate(owners) if owner == "one")
    number = int(task.ids[first].partition("/")[2])
    made = make_block(range(number, number + 1), 40, 99).layers["sentinel2"]
    assert np.array_equal(task.images([first])[0, 0], made[0, 0, 4:36, 4:36])


def test_without_held_out_tiles_or_classes_it_is_said(shards: Path, tmp_path: Path) -> None:
    def error(*arguments: str, place: Path = shards) -> str:
        with pytest.raises(UsageError) as caught:
            task_of(place, tmp_path, *arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    make_data_set(tmp_path / "none", tiles=8, size=40)
    assert "eval.every=2: no tile is held out (data.validate_where=" in error(place=tmp_path / "none")
    few = "data.validate_where=id in ['70', '71']"
    assert "2 held-out tiles have a class of month" not in error(few)
    assert "held-out tiles have a class of biome, at least 4 are needed; name another eval.label" in error(few)
    block = make_block(range(TILES), 44, TILES).layers["biome"].ravel()
    alike = np.flatnonzero(block == np.bincount(block[block >= 0]).argmax()).astype(str).tolist()
    assert len(alike) >= 4
    assert f"all {len(alike)} held-out tiles are of one class of biome" in error(f"data.validate_where=id in {alike}")
    assert not list((tmp_path / "evaluation").glob("*"))


def test_a_data_set_by_name_is_taken_as_it_is(shards: Path, tmp_path: Path) -> None:
    named = tiny_task(tmp_path / "task", images=200)
    task = task_of(shards, tmp_path, f"eval.task={named.folder}")
    assert task.folder == named.folder
    assert products_of(task).tolist() == ["l2a"] * 200
    rows = round_of(task, 40)
    assert (len(rows.train), len(rows.valid), len(rows.test)) == (16, 4, 20)
    assert set(task.split[rows.train]) == {"train"}
    assert set(task.split[rows.test]) == {"test"}
    assert np.bincount(task.labels(rows.train)).min() >= 5
    whole = round_of(task, 1000)
    assert len(whole.train) + len(whole.valid) + len(whole.test) == 200


def test_a_data_set_that_cannot_be_used_is_refused(shards: Path, tmp_path: Path) -> None:
    maps = tiny_task(tmp_path / "maps", Goal.SEGMENTATION)
    with pytest.raises(UsageError, match="has a class for every pixel"):
        task_of(shards, tmp_path, f"eval.task={maps.folder}")
    named = tiny_task(tmp_path / "task")
    with pytest.raises(UsageError, match=r"the encoder takes sentinel1\.asc_VV"):
        task_of(shards, tmp_path, f"eval.task={named.folder}", "model.input=sentinel1", "model.targets=[aster]")
