"""Samples of one row group are prepared together, wherever in the batch they go; a large data set is small to send."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from tiny_earth import make_data_set

from mmearth_ray.modalities import get, tasks
from mmearth_ray.stream.plan import Slice
from mmearth_ray.stream.prepare import SampleSpec
from mmearth_ray.stream.shard import Shard
from mmearth_ray.stream.source import Part, Shards, Source, gather, open_source

SPEC = SampleSpec(3, 16, 8, 2, input=get("sentinel2").default_bands(), targets=tasks())


def part(tiles: int, group: int, epoch: int, *rows: int) -> Part:
    return Part(tiles, Slice(epoch, group, np.array(rows)))


def test_parts_of_one_group_and_epoch_are_gathered_and_know_their_places() -> None:
    parts = [part(0, 1, 0, 5, 6), part(1, 1, 0, 9), part(0, 1, 0, 7), part(0, 1, 1, 5), part(1, 1, 0, 8, 2)]
    gathered, places = gather(parts)
    assert [(p.tiles, p.slice.epoch, p.slice.rows.tolist()) for p in gathered] == [
        (0, 0, [5, 6, 7]),
        (1, 0, [9, 8, 2]),
        (0, 1, [5]),
    ]
    assert places is not None
    assert places.tolist() == [0, 1, 3, 2, 5, 6, 4]
    assert gather(parts[:2]) == (parts[:2], None)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    manifests = [make_data_set(tmp_path / name, tiles=n, size=24, row_group=4, name=name) for n, name in ((24, "a"), (28, "b"))]
    return open_source(manifests, "", SPEC, weights=[1, 1], window=3)


def test_a_mixed_batch_is_its_samples_one_by_one(source: Source) -> None:
    (batch,) = source.batches([(7, 31)])
    ones = list(source.batches([(position, position + 1) for position in range(7, 31)]))
    assert gather(source.parts(7, 31))[1] is not None
    assert {str(tile).split("/")[0] for tile in batch["id"]} == {tiles.name for tiles in source.sets}
    for name in batch.keys() - {"faults"}:
        joined = np.concatenate([one[name] for one in ones])
        assert batch[name].shape == joined.shape
        assert name == "id" or batch[name].tobytes() == joined.tobytes(), name  # NaNs and all
    assert batch["id"].tolist() == [str(tile) for one in ones for tile in one["id"]]


def test_thousands_of_shards_travel_as_arrays_and_arrive_as_they_were(source: Source) -> None:
    manifest_like = source.sets[0].shards
    assert isinstance(manifest_like[0], Shard)
    many = Shards(
        manifest_like.folder, np.array([f"shard-{n:05d}.parquet" for n in range(10_000)]), np.arange(10_000),
        np.array([f"{n:064d}" for n in range(10_000)]), np.full(10_000, 4000),
    )  # fmt: skip
    there = pickle.loads(pickle.dumps(many))
    assert len(there.files) == 10_000
    assert there[777] == Shard(manifest_like.folder / "shard-00777.parquet", 777, f"{777:064d}", 4000)
    assert there[777] is there[777]
    assert not pickle.loads(pickle.dumps(there)).made
