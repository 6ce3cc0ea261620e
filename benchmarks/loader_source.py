"""What the loaders of the comparison read: shards, as training with the default settings opens them."""

from collections.abc import Iterator

import numpy as np

from mmearth_ray import config as configuration
from mmearth_ray.config import input_of, normalised_targets, targets_of, visible_patches
from mmearth_ray.modalities import DEFAULT_INPUT, Kind, Level, Modality, get
from mmearth_ray.shards.manifest import Manifest, load_manifest
from mmearth_ray.shards.stats import normalisation
from mmearth_ray.storage import locate
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import SampleSpec
from mmearth_ray.stream.source import Source, open_source

ENDLESS = 1_000_000
"""Steps of a stream that is left in the middle."""


def open_shards(data: str, image: int, patch: int, *choices: str) -> Source:
    """All tiles of the data set there, as `spec_of` has them."""
    manifest = load_manifest(locate(data, "data"))
    return open_source([manifest], "", spec_of(manifest, image, patch, *choices))


def spec_of(manifest: Manifest, image: int, patch: int, *choices: str) -> SampleSpec:
    """What training makes of those tiles: crops of `image` px, masks in patches of `patch` px, further settings as given."""
    config = configuration.load([f"model.image_size={image}", f"model.patch_size={patch}", *choices])
    entry, targets = input_of(config), targets_of(config)
    means = {m.name: normalisation(manifest.statistics, m)[0] for m in (*targets, entry) if m.kind is Kind.CONTINUOUS}
    return SampleSpec(
        seed=config.seed, image_size=image, patch_size=patch,
        visible=visible_patches((image // patch) ** 2, config.model.mask_ratio), input=entry, targets=targets,
        normalise_targets=frozenset(normalised_targets(config)),
        known={name: np.isfinite(mean) for name, mean in means.items()},
    )  # fmt: skip


def endless(batch: int, workers: int = 1, rank: int = 0) -> MicroBatches:
    """The micro-batches of one of so many workers, from the first step on, as trained on."""
    return MicroBatches(1, ENDLESS, batch * workers, workers, rank, batch)


def ranges(batch: int, workers: int = 1, rank: int = 0) -> Iterator[tuple[int, int]]:
    """Their ranges of positions, one after the other."""
    numbers = endless(batch, workers, rank)
    return (numbers[index] for index in range(len(numbers)))


def subsets() -> dict[str, list[str]]:
    """Settings of experiments that read ever less, by what they read."""
    entry = get(DEFAULT_INPUT)
    alone, colours = f"model.targets=[{entry.name}]", ",".join(entry.display)
    bands = len(entry.default_bands().bands)
    return {
        f"{bands} bands, all targets": [],
        f"{bands} bands": [alone],
        "RGB": [alone, f"model.bands.{entry.name}=[{colours}]"],
    }


def stored_bytes(modalities: tuple[Modality, ...], size: int) -> int:
    """Bytes of the maps of a tile of `size` px, as they are stored."""
    maps = [m for m in modalities if m.level is Level.PIXEL]
    return size**2 * sum(len(m.bands) * np.dtype(m.dtype).itemsize for m in maps)
