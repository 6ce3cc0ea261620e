"""Which engine and which micro-batch fit into a GPU, and what a tile costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmearth_ray.config import divisors, sizes_of
from mmearth_ray.keys import Config
from mmearth_ray.plan.memory import Memory, peak
from mmearth_ray.plan.passes import Passes
from mmearth_ray.train.peak import step_flops


@dataclass(frozen=True)
class Fit:
    """An engine with a micro-batch, of which a worker takes `micro_batches` a step, and what it holds at most."""

    engine: str
    micro_batch: int
    micro_batches: int
    memory: Memory


def largest(
    engine: str, passes: Sequence[Passes], share: int, workers: int, room: float, *, offload: bool = False
) -> Fit | None:
    """With the largest micro-batch that divides a worker's share of the global batch and needs at most `room` bytes, if any."""
    tried = (of(engine, passes, tiles, share, workers) for tiles in reversed(divisors(share)))
    return next((fit for fit in tried if fit.memory.on_gpu(offload=offload) <= room), None)


def of(engine: str, passes: Sequence[Passes], tiles: int, share: int, workers: int) -> Fit:
    """With a micro-batch of so many tiles, whether it fits or not."""
    return Fit(engine, tiles, share // tiles, peak(engine, passes, tiles, workers, share // tiles))


def flops_per_tile(config: Config) -> float:
    """Of a training step, on average over image sizes that take turns."""
    counts = [step_flops(config, image, patch) for image, patch in sizes_of(config.model)]
    return sum(counts) / len(counts)
