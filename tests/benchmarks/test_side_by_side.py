"""Processes side by side: the environment they start in, and the precision of their steps."""

import os
from pathlib import Path

import pytest
import torch
from tiny_earth import make_data_set

from benchmarks.side_by_side import _processes, _step
from mmearth_ray import config as configuration
from mmearth_ray.model.encoder import Encoder
from mmearth_ray.train.allocator import KEEP_FREED_MEMORY


def test_processes_start_with_the_allocator_of_train_workers_and_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, *absent = KEEP_FREED_MEMORY
    monkeypatch.setenv(kept, "7")
    for name in absent:
        monkeypatch.delenv(name, raising=False)
    with _processes(1) as (pool, _):
        assert {name: pool.submit(os.getenv, name).result() for name in KEEP_FREED_MEMORY} == KEEP_FREED_MEMORY
    assert os.environ[kept] == "7"
    assert not set(absent) & os.environ.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_runs_in_the_precision_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    make_data_set(tmp_path, tiles=16, size=32)
    config = configuration.load([
        f"data.shards={tmp_path}", "model.image_size=32", "model.patch_size=8", "model.decoder_width=8", "train.global_batch=2",
        "train.micro_batch=2", "train.workers=1", f"train.precision={precision}",
    ])  # fmt: skip
    seen, forward = [], Encoder.forward

    def watched(*arguments: object, **named: object) -> object:
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*arguments, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Encoder, "forward", watched)
    _step(config, 0, None)()
    assert seen == [precision == "bf16"]
