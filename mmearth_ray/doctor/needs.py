"""What a run takes of memory, disk and object store, from its configuration alone."""

from dataclasses import dataclass
from typing import cast

import torch

from mmearth_ray.config import input_of, micro_batch_of, most_workers, targets_of, turns_of, visible_patches
from mmearth_ray.keys import Config
from mmearth_ray.model.encoder import Stem
from mmearth_ray.model.mpmae import build_mpmae
from mmearth_ray.plan.memory import peak
from mmearth_ray.plan.passes import Bytes, Moment, Passes
from mmearth_ray.stream.prepare import SampleSpec, bytes_per_tile
from mmearth_ray.train.room import STORE_SHARE

FLOAT = 4
"""Bytes of a weight, of its gradient and of each of AdamW's two moments: all float32, also under autocast."""


@dataclass(frozen=True)
class Needs:
    """Bytes: the gradients of a step; what a worker holds beside activations, and what of that train.offload keeps in the
    memory of a GPU's host; the checkpoints kept; and what the batches that are ready or under way for all workers take of the
    object stores together."""

    weights: int
    gradients: int
    state: int
    offloaded: int
    checkpoints: int
    store: int


def needs_of(config: Config) -> Needs:
    """What the run takes with the most workers that it may have."""
    workers, parameters = most_workers(config), _parameters(config)
    weights = sum(parameters)
    micro = micro_batch_of(config, workers)
    held = peak(
        config.train.engine, [_without_activations(parameters)], micro, workers, config.train.global_batch // workers // micro
    )
    return Needs(
        weights=weights,
        gradients=weights * FLOAT,
        state=int(held.total),
        offloaded=int(held.optimizer) if config.train.offload else 0,
        checkpoints=_checkpoints(config) * weights * 3 * FLOAT,
        store=int(workers * _tiles_ahead(config, workers) * _tile(config) / STORE_SHARE),
    )


def count_weights(config: Config) -> int:
    """Elements of the model's parameters."""
    return sum(_parameters(config))


def _parameters(config: Config) -> tuple[int, ...]:
    """Elements of each parameter of the model, which is built without memory."""
    model = config.model
    others = dict.fromkeys(patch for _, patch in turns_of(model) if patch != model.patch_size)
    with torch.device("meta"):
        network = build_mpmae(
            size=model.size, in_channels=len(input_of(config).bands), image_size=model.image_size,
            patch_size=model.patch_size, targets=targets_of(config), stem=cast(Stem, model.stem),
            decoder_width=model.decoder_width, decoder_depth=model.decoder_depth, others=tuple(others),
        )  # fmt: skip
    return tuple(parameter.numel() for parameter in network.parameters())


def _without_activations(parameters: tuple[int, ...]) -> Passes:
    """The end of the backward pass, when all gradients are there and nothing else is."""
    return Passes(parameters, (Moment((Bytes(0, 0),), sum(parameters)),))


def _checkpoints(config: Config) -> int:
    """How many are there at most at a time: those kept, and the one being written; all of a run of known length."""
    keep, steps = config.checkpoint.keep, config.train.steps or 0
    forever = steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    return (keep + forever if keep else steps // config.checkpoint.every) + 1


def _tiles_ahead(config: Config, workers: int) -> int:
    """Tiles of a worker that are ready or under way, as `stream.pipeline.stream` counts them."""
    micro = micro_batch_of(config, workers)
    return config.data.read_ahead * micro + 2 * max(config.data.tiles_per_task, micro)


def _tile(config: Config) -> int:
    """Bytes of a prepared tile, of the largest of the image sizes."""
    model = config.model
    sizes = turns_of(model) or [(model.image_size, model.patch_size)]
    visible = visible_patches((model.image_size // model.patch_size) ** 2, model.mask_ratio)
    specs = [SampleSpec(0, size, patch, visible, input_of(config), targets_of(config)) for size, patch in sizes]
    return max(bytes_per_tile(spec) for spec in specs)
