"""Which engine and which micro-batch fit into a GPU, and how long a run takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmearth_ray.config import input_of, targets_of, turns_of, visible_patches
from mmearth_ray.keys import Config
from mmearth_ray.model import flops
from mmearth_ray.plan.memory import Memory, peak
from mmearth_ray.plan.passes import Passes


@dataclass(frozen=True)
class Fit:
    """An engine with a micro-batch, of which a worker takes `micro_batches` a step, and what it holds at most."""

    engine: str
    micro_batch: int
    micro_batches: int
    memory: Memory


def largest(engine: str, passes: Sequence[Passes], share: int, workers: int, room: float) -> Fit | None:
    """With the largest micro-batch that divides a worker's share of the global batch and needs at most `room` bytes, if any."""
    tried = (of(engine, passes, tiles, share, workers) for tiles in range(share, 0, -1) if share % tiles == 0)
    return next((fit for fit in tried if fit.memory.total <= room), None)


def of(engine: str, passes: Sequence[Passes], tiles: int, share: int, workers: int) -> Fit:
    """With a micro-batch of so many tiles, whether it fits or not."""
    return Fit(engine, tiles, share // tiles, peak(engine, passes, tiles, workers, share // tiles))


def steps_of(epochs: float, tiles: int, global_batch: int) -> int:
    """Optimizer steps, as a run with `train.epochs` counts them."""
    return math.ceil(epochs * tiles / global_batch)


def flops_per_tile(config: Config) -> float:
    """Of a training step, on average over image sizes that take turns."""
    model = config.model
    sizes = turns_of(model) or [(model.image_size, model.patch_size)]
    counts = [flops.count(_shape(config, image, patch)).step for image, patch in sizes]
    return sum(counts) / len(counts)


def _shape(config: Config, image_size: int, patch_size: int) -> flops.Shape:
    model = config.model
    return flops.shape(
        size=model.size, in_channels=len(input_of(config).bands), image_size=image_size, patch_size=patch_size,
        visible=visible_patches((image_size // patch_size) ** 2, model.mask_ratio), targets=targets_of(config),
        stem="original" if model.stem == "original" else "modified", decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
    )  # fmt: skip
