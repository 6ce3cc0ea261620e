"""The pipeline's settings for Ray Data: a batch travels as one block, and its scheduler rests while batches wait."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.data import DataContext
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.execution.streaming_executor_state import OpState
from ray.data._internal.output_buffer import BlockOutputBuffer, OutputBlockSizeOption
from ray.data.block import BlockAccessor
from tiny_earth import make_data_set

from mmearth_ray.modalities import get, tasks
from mmearth_ray.stream.pipeline import FIRST_WINDOW, Breathe, Share, _batches_per_task, _configure, windows
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import SampleSpec, bytes_per_tile
from mmearth_ray.stream.source import open_source


@pytest.mark.parametrize("micro_batch", [1, 4, 12])
def test_every_batch_becomes_one_block_that_is_neither_cut_nor_joined(micro_batch: int, tmp_path: Path) -> None:
    spec = SampleSpec(1, 32, 8, 6, input=get("sentinel2").default_bands(), targets=tasks())
    source = open_source([make_data_set(tmp_path, tiles=24, size=32)], "", spec)
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


@pytest.mark.parametrize(("tasks", "most"), [(0, 1024), (1, 1024), (FIRST_WINDOW, 1024), (5000, 1024), (97, 5), (3, 1)])
def test_windows_are_short_at_first_and_hold_every_task_once(tasks: int, most: int) -> None:
    found = list(windows(tasks, most))
    assert [number for window in found for number in window] == list(range(tasks))
    lengths = [len(window) for window in found]
    assert all(0 < length <= most for length in lengths)
    assert lengths[:1] == [min(FIRST_WINDOW, most, tasks)][: len(lengths)]
    assert all(after == min(2 * before, most) for before, after in pairwise(lengths[:-1]))


@pytest.mark.parametrize(("micro_batch", "tiles_per_task"), [(4, 64), (2, 6), (4, 4), (2, 64)])
def test_no_block_holds_crops_of_two_sizes(micro_batch: int, tiles_per_task: int, tmp_path: Path) -> None:
    """What Ray Data makes of each task's batches, and of the blocks of all tasks: the batches again."""
    small = SampleSpec(1, 32, 8, 6, input=get("sentinel2").default_bands(), targets=tasks())
    turns = (small, replace(small, image_size=64, patch_size=16))
    source = open_source([make_data_set(tmp_path, tiles=12, size=64)], "", small, turns=turns, turn=12)
    ranges = MicroBatches(1, 4, global_batch=12, workers=1, rank=0, micro_batch=micro_batch)
    per_task = _batches_per_task(source, ranges, tiles_per_task)
    assert per_task <= max(1, tiles_per_task // micro_batch)
    batches = list(source.batches(ranges[i] for i in range(len(ranges))))
    assert [batch["aster"].shape[-1] for batch in batches] == [size for size in (32, 64) * 2 for _ in range(12 // micro_batch)]
    before = DataContext.get_current().copy()
    try:
        _configure(Share(cpus=1, object_store_bytes=1 << 30), 1 << 30, micro_batch * max(map(bytes_per_tile, turns)))
        target = DataContext.get_current().target_max_block_size
    finally:
        DataContext._set_current(before)
    found = []
    for first in range(0, len(batches), per_task):
        buffer = BlockOutputBuffer(OutputBlockSizeOption(target_max_block_size=target))
        for batch in batches[first : first + per_task]:
            buffer.add_batch(batch)
            found += [BlockAccessor.for_block(block) for block in buffer.iter_ready_blocks()]
        buffer.finalize()
        found += [BlockAccessor.for_block(block) for block in buffer.iter_ready_blocks()]
    assert all(block.num_rows() % micro_batch == 0 for block in found)  # so none is put together again in the worker
    ids, shapes = [], []
    for block in found:
        arrays = block.to_numpy()
        ids += arrays["id"].tolist()
        assert arrays["sentinel2"].dtype == np.uint16
        shapes += [arrays["sentinel2"].shape[1:]] * block.num_rows()
    assert ids == [tile for batch in batches for tile in batch["id"].tolist()]
    assert shapes == [batch["sentinel2"].shape[1:] for batch in batches for _ in range(micro_batch)]


class Consumer:
    """A stand-in for time.sleep that takes so many batches in each slice, and for the executor that holds them."""

    def __init__(self, waiting: int, taken_per_slice: int) -> None:
        self.queue, self.taken, self.slices = [None] * waiting, taken_per_slice, list[float]()
        self.executor = SimpleNamespace(_output_node=(None, SimpleNamespace(output_queue=self.queue)))

    def sleep(self, seconds: float) -> None:
        self.slices.append(seconds)
        del self.queue[: self.taken]


@pytest.mark.parametrize(
    ("waiting", "taken_per_slice", "slices"), [(0, 0, 1), (1, 0, 3), (3, 0, 7), (100, 0, 12), (4, 1, 4), (4, 4, 1), (1, 1, 1)]
)
def test_the_scheduler_rests_the_longer_the_more_batches_wait_and_no_longer_than_any_does(
    waiting: int, taken_per_slice: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = Consumer(waiting, taken_per_slice)
    monkeypatch.setattr(time, "sleep", consumer.sleep)
    Breathe().on_execution_step(consumer.executor)
    assert consumer.slices == [0.02] * slices


@pytest.mark.parametrize("node", [{}, {"_output_node": None}, {"_output_node": (None, SimpleNamespace())}])
def test_with_a_ray_that_keeps_its_batches_elsewhere_the_scheduler_rests_shortly(
    node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    Breathe().on_execution_step(SimpleNamespace(**node))
    assert slept == [0.02]


def test_the_installed_ray_keeps_its_batches_where_the_scheduler_looks() -> None:
    executor = StreamingExecutor(DataContext.get_current())
    assert executor._output_node is None
    operator = InputDataBuffer(DataContext.get_current(), [])
    assert len(OpState(operator, []).output_queue) == 0
