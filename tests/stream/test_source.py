"""A source: the samples of a step are the same for any number of workers and from any starting point."""

from pathlib import Path

import numpy as np
import pytest
from tiny_earth import make_block, make_data_set

from mmearth_ray.errors import UsageError
from mmearth_ray.modalities import get
from mmearth_ray.shards.manifest import Manifest, load_manifest
from mmearth_ray.stream import source as source_module
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import Batch, SampleSpec
from mmearth_ray.stream.select import NothingSelected
from mmearth_ray.stream.source import Source, open_source

GLOBAL_BATCH = 16  # of 44 training tiles, so that batches cross row groups and epochs


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("shards"), tiles=50, held_out=6, row_group=7, shard_rows=25)


def make_spec(image_size: int = 8) -> SampleSpec:
    targets = (get("sentinel1"), get("era5"), get("biome"), get("esa_worldcover"))
    entry = get("sentinel2").select(["B2", "B10"])
    return SampleSpec(1, image_size=image_size, patch_size=4, visible=1, input=entry, targets=targets)


def training(manifest: Manifest) -> Source:
    return open_source([manifest], "split == 'train'", make_spec())


def steps(source: Source, first: int, last: int, workers: int, micro_batch: int) -> list[Batch]:
    """The global batch of each step, put together from what each worker streams."""
    by_rank = []
    for rank in range(workers):
        ranges = MicroBatches(first, last, GLOBAL_BATCH, workers, rank, micro_batch)
        batches = list(source.batches(ranges[i] for i in range(len(ranges))))
        assert [len(b["id"]) for b in batches] == [micro_batch] * len(ranges)
        by_rank.append([batches[i : i + ranges.per_step] for i in range(0, len(batches), ranges.per_step)])
    return [joined([batch for mine in by_rank for batch in mine[step]]) for step in range(last - first + 1)]


def joined(batches: list[Batch]) -> Batch:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name in one:
        if name == "id":
            assert one[name].tolist() == other[name].tolist()
        else:
            assert one[name].dtype == other[name].dtype
            assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 4), (2, 8), (2, 2), (4, 4), (4, 1), (16, 1)])
def test_the_global_batch_of_a_step_is_the_same_bit_for_bit_for_any_workers_and_micro_batch(
    workers: int, micro_batch: int, manifest: Manifest
) -> None:
    source = training(manifest)
    alone = steps(source, 1, 7, workers=1, micro_batch=GLOBAL_BATCH)
    for one, other in zip(alone, steps(source, 1, 7, workers, micro_batch), strict=True):
        assert_same(one, other)


def test_every_epoch_streams_every_training_tile_once_in_another_order(manifest: Manifest) -> None:
    source = training(manifest)
    assert source.samples == 44
    ids = [i for batch in source.batches([(0, 132)]) for i in batch["id"].tolist()]
    epochs = [ids[start : start + 44] for start in (0, 44, 88)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(44)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_reading_may_start_at_any_step_even_in_the_middle_of_an_epoch(manifest: Manifest) -> None:
    whole = steps(training(manifest), 1, 8, workers=1, micro_batch=8)
    for first in (2, 4, 7):
        later = steps(open_source([manifest], "split == 'train'", make_spec()), first, 8, workers=1, micro_batch=8)
        for one, other in zip(whole[first - 1 :], later, strict=True):
            assert_same(one, other)


def test_a_manifest_read_back_gives_the_same_stream(manifest: Manifest) -> None:
    found = load_manifest(manifest.directory)
    one, other = (next(training(m).batches([(30, 60)])) for m in (manifest, found))
    assert_same(one, other)


def test_arrays_are_those_of_the_tile_of_that_id(manifest: Manifest) -> None:
    batch = next(training(manifest).batches([(0, 44)]))
    for i, name in enumerate(batch["id"].tolist()):
        block = make_block(range(int(name), int(name) + 1), 16, 44)
        assert np.array_equal(batch["era5"][i], block.layers["era5"][0], equal_nan=True)
        assert batch["biome"][i] == block.layers["biome"][0]
        layer = block.layers["sentinel2"][0, [1, 10]]
        windows = np.lib.stride_tricks.sliding_window_view(layer, (8, 8), axis=(1, 2))
        assert (windows == batch["sentinel2"][i][:, None, None]).all((0, 3, 4)).sum() == 1


def test_only_tiles_that_satisfy_the_expression_are_streamed(manifest: Manifest) -> None:
    source = open_source([manifest], "split == 'val' or id in ['3', '11']", make_spec())
    assert source.samples == 8
    batch = next(source.batches([(0, 8)]))
    assert sorted(batch["id"].tolist(), key=int) == ["3", "11", "44", "45", "46", "47", "48", "49"]
    with pytest.raises(NothingSelected, match=r"no tile of .* satisfies \"split == 'test'\"; `shards inspect` tells"):
        open_source([manifest], "split == 'test'", make_spec())
    with pytest.raises(UsageError, match=r"^data\.validate_where: 'spilt' is no column"):
        open_source([manifest], "spilt == 'test'", make_spec(), key="data.validate_where")


def test_adjacent_ranges_read_each_row_group_once_an_epoch(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = training(manifest), []
    original = source_module.decode
    monkeypatch.setattr(source_module, "decode", lambda fetched, shard, group, *rest: read.append((shard.place.name, group))
                        or original(fetched, shard, group, *rest))  # fmt: skip
    list(source.batches((start, start + 4) for start in range(0, 44, 4)))
    assert len(read) == len(set(read)) == len(source.sets[0].selection.sizes) == 7


def test_a_crop_larger_than_the_tiles_is_refused_with_the_largest_that_fits(manifest: Manifest) -> None:
    message = f"model.image_size=24 is larger than the 16 px tiles of {manifest.directory}; use at most 16"
    with pytest.raises(UsageError, match=message):
        open_source([manifest], "", make_spec(image_size=24))


def test_a_crop_as_large_as_the_tile_is_the_tile(tmp_path: Path) -> None:
    source = open_source([make_data_set(tmp_path, tiles=4)], "", make_spec(image_size=16))
    batch = next(source.batches([(0, 4)]))
    for i, name in enumerate(batch["id"].tolist()):
        layer = make_block(range(int(name), int(name) + 1), 16, 4).layers["sentinel2"][0, [1, 10]]
        assert np.array_equal(batch["sentinel2"][i], layer)
