"""What a run takes: counted from the built model, and from the sizes of its checkpoints and batches."""

from pathlib import Path

import pytest
from tiny_earth import make_data_set

from mmearth_ray.config import load, targets_of
from mmearth_ray.doctor.needs import count_weights, memory_of, most_checkpoints, object_store
from mmearth_ray.experiment import open_experiment
from mmearth_ray.keys import Config
from mmearth_ray.model.mpmae import MPMAE, build_mpmae
from mmearth_ray.plan.fit import of
from mmearth_ray.plan.passes import follow
from mmearth_ray.stream import pipeline

SMALL = ["model.image_size=32", "model.decoder_width=64", "model.targets=[sentinel2,biome]", "train.global_batch=16"]


def built(config: Config) -> MPMAE:
    return build_mpmae(size="atto", in_channels=12, image_size=32, patch_size=8, targets=targets_of(config), decoder_width=64)


def test_weights_are_those_of_the_model_and_of_its_losses() -> None:
    config = load(SMALL)
    assert count_weights(config) == sum(parameter.numel() for parameter in built(config).parameters()) + 2
    assert count_weights(load([*SMALL, "model.image_sizes=[32,64]"])) > count_weights(config)


@pytest.mark.parametrize(
    ("engine", "each"),
    [  # weights, gradients, what the optimizer holds (with DeepSpeed's copy of the weights), and the bucket that travels
        ("ddp", 1 + 1 + 2),
        ("zero1", 1 + 1 + 3 / 4 + 1),
        ("zero2", 1 + 1 / 4 + 3 / 4 + 1),
        ("zero3", 1 / 4 + 1 / 4 + 3 / 4 + 2 + 1),  # and all weights of a small model, while they are used
    ],
)
def test_a_worker_holds_its_part_and_its_activations_as_the_plan_says(engine: str, each: float) -> None:
    config = load([*SMALL, "train.workers=4", f"train.engine={engine}"])
    found, model, weights = memory_of(config, 4, on_gpu=True), built(config), count_weights(config)
    assert found == of(engine, follow(config), 4, 4, 4).memory
    whole = sum(p.numel() for p in model.parameters() if p.numel() < 100_000) if engine == "zero3" else 0  # on every worker
    assert 0.6 * 4 * each * weights < found.total - found.activations <= 4 * (each * weights + whole) + 8  # a bucket is even
    assert found.activations > 4 * 32 * 32 * 12 * 4  # the micro-batch in float32, and far more
    assert found.activations > memory_of(load([*SMALL, "train.workers=4", "train.micro_batch=1"]), 4, on_gpu=True).activations


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["checkpoint.keep=3"], 4),  # and the one that is being written
        (["checkpoint.keep=2", "checkpoint.keep_every=50"], 2 + 4 + 1),
        (["checkpoint.keep=0", "checkpoint.every=10"], 21),
    ],
)
def test_checkpoints_are_counted_at_their_most(arguments: list[str], count: int) -> None:
    assert most_checkpoints(load([*SMALL, *arguments]), 200) == count


@pytest.mark.parametrize("window", [1, 4])
def test_the_object_store_holds_what_the_streams_of_all_workers_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    data = make_data_set(tmp_path / "data", tiles=48).directory
    words = ["train.workers=2", "data.read_ahead=3", "data.tiles_per_task=10", f"data.shuffle_window={window}"]
    config = load([*SMALL, *words, "model.image_size=16", f"data.shards={data}"])
    source = open_experiment(config, data).source
    assert (source.tiles_held > 10) == (window > 1)
    tile = pipeline.bytes_per_tile(source.spec)
    assert tile == 16 * 16 * 12 * 2  # twelve bands of uint16
    needed = object_store(config, source, 2)
    assert needed == 2 * 2 * (3 * 8 + 2 * max(10, source.tiles_held)) * tile / 0.5

    class Asked(Exception):
        pass

    def configure(share: pipeline.Share, wanted_bytes: int, batch_bytes: int) -> None:
        raise Asked(wanted_bytes)

    monkeypatch.setattr(pipeline, "_configure", configure)
    ranges = pipeline.MicroBatches(1, 1, global_batch=16, workers=2, rank=0, micro_batch=8)
    share = pipeline.Share(1, int(0.5 * needed / 2))
    with pytest.raises(Asked) as asked:
        next(pipeline.stream(source, ranges, tiles_per_task=10, read_ahead=3, share=share))
    assert asked.value.args == (share.object_store_bytes,)  # such a store is just enough
