"""A source: the samples of a step are the same for any number of workers and from any starting point."""

from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from s3_server import S3
from tiny_earth import make_block, make_data_set

from mmearth_ray.errors import UsageError
from mmearth_ray.modalities import get
from mmearth_ray.patience import Patience
from mmearth_ray.shards.manifest import Manifest, load_manifest
from mmearth_ray.storage import locate
from mmearth_ray.stream import source as source_module
from mmearth_ray.stream.cache import Cache
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import Batch, SampleSpec
from mmearth_ray.stream.select import NothingSelected
from mmearth_ray.stream.shard import Reading
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


def mixed(*manifests: Manifest, weights: list[float] | None = None, window: int = 1) -> Source:
    return open_source(manifests, "split == 'train'", make_spec(), weights=weights, window=window)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A data set of the same name, whose ids are also those of the first one's tiles; its tiles are larger."""
    return make_data_set(tmp_path_factory.mktemp("other"), tiles=20, size=24, row_group=6)


def names(batches: list[Batch]) -> list[str]:
    return [tile for batch in batches for tile in batch["id"].tolist()]


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(("workers", "micro_batch"), [(2, 8), (4, 2), (16, 1)])
def test_mixed_sets_give_the_same_steps_for_any_workers_from_any_step(
    weights: list[float] | None, window: int, workers: int, micro_batch: int, manifest: Manifest, other: Manifest
) -> None:
    source = mixed(manifest, other, weights=weights, window=window)
    alone = steps(source, 1, 9, workers=1, micro_batch=GLOBAL_BATCH)
    again = mixed(manifest, other, weights=weights, window=window)
    for one, another in zip(alone[3:], steps(again, 4, 9, workers, micro_batch), strict=True):
        assert_same(one, another)


def test_without_weights_each_tile_of_all_sets_comes_once_in_an_epoch_of_them_together(
    manifest: Manifest, other: Manifest
) -> None:
    source = mixed(manifest, other)
    assert source.samples == 64
    first, second = (tiles.name for tiles in source.sets)
    assert first == f"tiny@{manifest.digest[:8]}"
    everything = {f"{first}/{i}" for i in range(44)} | {f"{second}/{i}" for i in range(20)}
    ids = names(list(source.batches((start, start + 16) for start in range(0, 192, 16))))
    for start in (0, 64, 128):
        assert set(ids[start : start + 64]) == everything


def test_with_weights_each_set_keeps_its_own_epochs_and_order(manifest: Manifest, other: Manifest) -> None:
    source = mixed(manifest, other, weights=[1, 3])
    ids = names(list(source.batches([(0, 400)])))
    for tiles, alone in zip(source.sets, (mixed(manifest), mixed(other)), strict=True):
        own = [tile.partition("/")[2] for tile in ids if tile.startswith(f"{tiles.name}/")]
        assert own == names(list(alone.batches([(0, len(own))])))
        assert len(own) == {manifest.digest: 100, other.digest: 300}[_digest(tiles.name, manifest, other)]


def _digest(name: str, *manifests: Manifest) -> str:
    return next(m.digest for m in manifests if m.digest.startswith(name.partition("@")[2]))


def test_tiles_of_the_same_id_have_crops_and_masks_of_their_own_in_each_set(manifest: Manifest, other: Manifest) -> None:
    """And a set in a mixture is cropped from its own tiles, whatever their size."""
    source = mixed(manifest, other)
    batch = next(source.batches([(0, 64)]))
    drawn: dict[str, list[bytes]] = {}
    for i, name in enumerate(batch["id"].tolist()):
        set_name, _, tile = name.partition("/")
        size, train = (16, 44) if _digest(set_name, manifest, other) == manifest.digest else (24, 20)
        layer = make_block(range(int(tile), int(tile) + 1), size, train).layers["sentinel2"][0, [1, 10]]
        windows = np.lib.stride_tricks.sliding_window_view(layer, (8, 8), axis=(1, 2))
        assert (windows == batch["sentinel2"][i][:, None, None]).all((0, 3, 4)).sum() == 1
        drawn.setdefault(tile, []).append(batch["visible"][i].tobytes())
    twice = [found for found in drawn.values() if len(found) == 2]
    assert len(twice) == 20
    assert any(one != another for one, another in twice)


def test_a_set_given_twice_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=f"data.shards names the data set {manifest.directory} twice"):
        mixed(manifest, manifest)


def test_a_set_without_a_chosen_tile_is_refused_unless_it_may_be_left_out(manifest: Manifest, other: Manifest) -> None:
    with pytest.raises(NothingSelected, match=f"no tile of {other.directory} satisfies"):
        open_source([manifest, other], "split == 'val'", make_spec())
    held_out = open_source([other, manifest], "split == 'val'", make_spec(), skip_empty=True)
    assert held_out.samples == 6
    with pytest.raises(NothingSelected):
        open_source([manifest, other], "split == 'test'", make_spec(), skip_empty=True)


def test_a_set_smaller_than_the_batch_repeats_within_it(tmp_path: Path) -> None:
    source = mixed(make_data_set(tmp_path, tiles=5, row_group=2))
    ids = names(list(source.batches([(0, 16), (16, 32)])))
    for start in range(0, 30, 5):
        assert sorted(ids[start : start + 5]) == list("01234")


def test_a_mixed_window_reads_no_row_group_twice_in_a_task_that_covers_it(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = mixed(manifest, window=7), []
    original = source_module.decode
    monkeypatch.setattr(source_module, "decode", lambda fetched, shard, group, *rest: read.append((shard.place.name, group))
                        or original(fetched, shard, group, *rest))  # fmt: skip
    assert source.tiles_held == 44
    ids = names(list(source.batches((start, start + 4) for start in range(0, 44, 4))))
    assert sorted(map(int, ids)) == list(range(44))
    assert len(read) == 7


def test_a_store_gives_the_local_stream_with_and_without_a_cache(manifest: Manifest, s3: S3, tmp_path: Path) -> None:
    place = locate(f"{s3.make_bucket()}/tiny", "data.shards")
    assert not isinstance(place, Path)
    for path in manifest.directory.iterdir():
        fsspec.filesystem("s3").put_file(str(path), f"{place.path}/{path.name}")
    away = load_manifest(place)
    s3.fail(slow_down=0.1, truncated=0.1, only="^GET", seed=5)
    plain = Reading(Patience(first_wait=0.01))
    for reading in (plain, replace(plain, cache=Cache(tmp_path, 60_000)), replace(plain, cache=Cache(tmp_path, 10**8))):
        source = open_source([away], "split == 'train'", make_spec(), window=2, reading=reading)
        found = list(source.batches((start, start + 16) for start in range(0, 96, 16)))
        alone = mixed(manifest, window=2).batches((start, start + 16) for start in range(0, 96, 16))
        faults = sum(int(batch.pop("faults").sum()) for batch in found)
        for one, another in zip(found, alone, strict=True):
            another.pop("faults")
            assert_same(one, another)
        assert faults > 0 or reading.cache


@pytest.mark.parametrize("batch", [4, 5, 11])
def test_a_store_is_asked_once_for_a_row_group_that_batches_cut(
    batch: int, manifest: Manifest, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = locate(f"{s3.make_bucket()}/tiny", "data.shards")
    assert not isinstance(place, Path)
    for path in manifest.directory.iterdir():
        fsspec.filesystem("s3").put_file(str(path), f"{place.path}/{path.name}")
    source, asked, original = open_source([load_manifest(place)], "split == 'train'", make_spec()), [], source_module.fetch
    monkeypatch.setattr(source_module, "fetch", lambda shard, groups, *rest: asked.append((shard.place.name, *groups))
                        or original(shard, groups, *rest))  # fmt: skip
    assert source.samples == 44
    ids = names(list(source.batches((start, min(start + batch, 44)) for start in range(0, 44, batch))))
    assert sorted(map(int, ids)) == list(range(44))
    assert len(asked) == len(set(asked)) == 7


def test_a_rare_sets_row_group_is_kept_while_a_common_one_reads_on(
    manifest: Manifest, other: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = mixed(manifest, other, weights=[9, 1]), []
    original = source_module.decode
    monkeypatch.setattr(source_module, "decode", lambda fetched, shard, group, *rest: read.append((shard.place, group))
                        or original(fetched, shard, group, *rest))  # fmt: skip
    list(source.batches((start, start + 4) for start in range(0, 120, 4)))
    rare = [key for key in read if other.directory in key[0].parents]
    assert 2 <= len(rare) <= 4  # its 12 samples are of two or three groups of 6, and of two epochs at most
    assert len(read) - len(rare) <= -(-108 // 44) * 7
