"""The pipeline's settings for Ray Data: a batch travels as one block, and its scheduler rests while batches wait."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray.data import DataContext
from ray.data._internal.output_buffer import BlockOutputBuffer, OutputBlockSizeOption
from ray.data.block import BlockAccessor
from tiny_earth import make_data_set

from mmearth_ray.modalities import get, tasks
from mmearth_ray.stream.pipeline import Breathe, Share, _configure
from mmearth_ray.stream.prepare import SampleSpec, bytes_per_tile
from mmearth_ray.stream.source import open_source


@pytest.mark.parametrize("micro_batch", [1, 4, 12])
def test_every_batch_becomes_one_block_that_is_neither_cut_nor_joined(micro_batch: int, tmp_path: Path) -> None:
    spec = SampleSpec("tiny", 1, 32, 32, 8, 6, input=get("sentinel2").default_bands(), targets=tasks())
    source = open_source(make_data_set(tmp_path, tiles=24, size=32), "", spec)
    before = DataContext.get_current().copy()
    try:
        _configure(Share(cpus=1, object_store_bytes=1 << 30), 1 << 30, micro_batch * bytes_per_tile(spec))
        target = DataContext.get_current().target_max_block_size
    finally:
        DataContext._set_current(before)
    buffer = BlockOutputBuffer(OutputBlockSizeOption(target_max_block_size=target))
    for batch in source.batches((start, start + micro_batch) for start in range(0, 24, micro_batch)):
        buffer.add_batch(batch)
        assert buffer.has_next()
        block = BlockAccessor.for_block(buffer.next())
        assert block.num_rows() == micro_batch
        assert np.array_equal(block.to_numpy()["id"], batch["id"])
        assert not buffer.has_next()


@pytest.mark.parametrize(("waiting", "pause"), [(0, 0.02), (1, 0.06), (3, 0.14), (100, 0.25)])
def test_the_scheduler_rests_the_longer_the_more_batches_wait(
    waiting: int, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    executor = SimpleNamespace(_output_node=(None, SimpleNamespace(output_queue=[None] * waiting)))
    Breathe().on_execution_step(executor)
    assert slept == pytest.approx([pause])
