"""The engines by the names that `train.engine` gives them."""

from collections.abc import Callable
from functools import partial

import torch

from mmearth_ray.config import micro_batch_of
from mmearth_ray.keys import Config
from mmearth_ray.objective import Objective
from mmearth_ray.train.engine import DDPEngine, Engine, recompute_blocks
from mmearth_ray.train.zero import ZeroEngine


def build_engine(module: Objective, config: Config, device: torch.device, workers: int) -> Engine:
    """The engine that a run's settings name, around the module with the weights it has."""
    train = config.train
    if train.activation_checkpointing:
        recompute_blocks(module, reentrant=train.engine == "zero3")
    return ENGINES[train.engine](module, config, device, workers)


def _ddp(module: Objective, config: Config, device: torch.device, workers: int) -> Engine:
    train = config.train
    return DDPEngine(module, config.optimizer, device, train.precision, train.compile, train.clip, skips(config))


def _zero(stage: int, module: Objective, config: Config, device: torch.device, workers: int) -> Engine:
    train = config.train
    micro_batches = train.global_batch // workers // micro_batch_of(config, workers)
    return ZeroEngine(
        module, config.optimizer, device, train.precision,
        stage=stage, micro_batches=micro_batches, clip=train.clip, offload=train.offload,
        skips=skips(config),
    )  # fmt: skip


def skips(config: Config) -> bool:
    """Whether a step that is not finite is left out rather than the end."""
    return config.train.nonfinite == "skip"


ENGINES: dict[str, Callable[[Objective, Config, torch.device, int], Engine]] = {
    "ddp": _ddp,
    "zero1": partial(_zero, 1),
    "zero2": partial(_zero, 2),
    "zero3": partial(_zero, 3),
}
