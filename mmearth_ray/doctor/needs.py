"""What a run takes of memory, disk and object store."""

from torch._subclasses.fake_tensor import FakeTensorMode

from mmearth_ray.config import micro_batch_of
from mmearth_ray.keys import Config
from mmearth_ray.plan.memory import Memory, peak
from mmearth_ray.plan.passes import build, follow
from mmearth_ray.stream.pipeline import wanted_bytes
from mmearth_ray.stream.source import Source
from mmearth_ray.train.room import STORE_SHARE


def count_weights(config: Config) -> int:
    """Elements of all that is trained."""
    with FakeTensorMode():
        return sum(parameter.numel() for parameter in build(config).parameters())


def memory_of(config: Config, workers: int, *, on_gpu: bool) -> Memory:
    """What each of so many workers holds at most, as `mmearth_ray.plan` counts it; seconds of work for large models."""
    micro = micro_batch_of(config, workers)
    passes = follow(config, on_gpu=on_gpu)
    return peak(config.train.engine, passes, micro, workers, config.train.global_batch // workers // micro)


def most_checkpoints(config: Config, steps: int) -> int:
    """How many a run of so many steps has at a time: those kept, and the one being written."""
    kept = config.checkpoint
    forever = steps // kept.keep_every if kept.keep_every else 0
    return (kept.keep + forever if kept.keep else steps // kept.every) + 1


def object_store(config: Config, source: Source, workers: int) -> int:
    """Bytes of the object stores together that let all workers have the batches ahead that they ask for."""
    each = wanted_bytes(
        source, micro_batch_of(config, workers), tiles_per_task=config.data.tiles_per_task, read_ahead=config.data.read_ahead
    )
    return int(workers * each / STORE_SHARE)
