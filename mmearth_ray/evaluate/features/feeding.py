"""From stored values of a data set to what an encoder takes: bands by identity, units, normalisation, whole cells.

Shapes: B images, Ct bands of the data set, Ce bands of the encoder, H x W pixels, H' x W' the next multiples of the patch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import TaskInfo
from mmearth_ray.evaluate.features.encoders import Subject
from mmearth_ray.model.normalise import Normalise

NORMALISATIONS = ("dataset", "pretraining")

Moments = tuple[tuple[float | None, ...], tuple[float | None, ...]]
"""Mean and std of bands, in pretraining's units; None where they are not known."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """How one encoder sees one data set.

    For each of the encoder's `bands`: its place among the data set's, or None where the data lack it (`absent`); the `mean`
    and `std` that are used, in pretraining's units; `unknown` names bands that the data have and that nothing is known of.
    Both kinds are 0, the mean, after normalisation, and so are stored values in `missing` and those that are not finite.
    Stored values times `scale` are in pretraining's units.  `unused`: bands of the data that the encoder does not take.
    """

    normalisation: str
    product: str | None
    bands: tuple[str, ...]
    places: tuple[int | None, ...]
    absent: tuple[str, ...]
    unknown: tuple[str, ...]
    unused: tuple[str, ...]
    mean: tuple[float | None, ...]
    std: tuple[float | None, ...]
    missing: tuple[float, ...]
    scale: float
    given: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def feed_of(subject: Subject, info: TaskInfo, normalisation: str) -> Feed:
    """How an encoder sees a data set.

    "dataset": mean and std of the data set's training images.  "pretraining": the encoder's own of the data set's product,
    and what was no data in pretraining is none here.  Statistics of bands have no pretraining and always take the data set's;
    their bands are all of the data set's, by name, so that their order there does not matter.

    Raises UsageError for another normalisation, one whose numbers are not known, or where no band is common to both.
    """
    if normalisation not in NORMALISATIONS:
        raise UsageError(f"normalisation={normalisation} must be one of {', '.join(NORMALISATIONS)}")
    if len(set(info.bands)) < len(info.bands):
        raise DataError(f"{info.name} names a band twice ({', '.join(info.bands)}); convert the data set again")
    plain = subject.kind == "statistics"
    bands = tuple(sorted(info.bands)) if plain else subject.bands
    found = {band: place for place, band in enumerate(info.bands)}
    places = tuple(found.get(band) for band in bands)
    if all(place is None for place in places):
        raise UsageError(f"encoder '{subject.name}' takes {', '.join(bands)}; {info.name} has {', '.join(info.bands)}: no band "
                         "is common to both, so name another encoder or data set")  # fmt: skip
    pretraining = normalisation == "pretraining" and not plain
    mean, std = _of_pretraining(subject, info) if pretraining else _of_dataset(info, places)
    usable = [place is not None and m is not None and s is not None for place, m, s in zip(places, mean, std, strict=True)]
    if not any(usable):
        whose, other = ("encoder", "dataset") if pretraining else ("data set", "pretraining")
        raise UsageError(f"no band that encoder '{subject.name}' and {info.name} share has a mean and std of the {whose}, so "
                         f"every input would be 0; use normalisation={other}")  # fmt: skip
    missing = (*info.missing, *(value / info.scale for value in subject.missing)) if pretraining else info.missing
    return Feed(
        normalisation="pretraining" if pretraining else "dataset", product=info.product, bands=bands, places=places,
        absent=tuple(band for band, place in zip(bands, places, strict=True) if place is None),
        unknown=tuple(b for b, place, ok in zip(bands, places, usable, strict=True) if place is not None and not ok),
        unused=tuple(band for band in info.bands if band not in bands),
        mean=tuple(m if ok else None for m, ok in zip(mean, usable, strict=True)),
        std=tuple(s if ok else None for s, ok in zip(std, usable, strict=True)),
        missing=tuple(dict.fromkeys(float(value) for value in missing)), scale=info.scale, given=len(info.bands),
    )  # fmt: skip


def _of_dataset(info: TaskInfo, places: Sequence[int | None]) -> Moments:
    pick = lambda values: tuple(_scaled(values[p] if p is not None else None, info.scale) for p in places)  # noqa: E731
    return pick(info.mean), pick(info.std)


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _of_pretraining(subject: Subject, info: TaskInfo) -> Moments:
    """Raises UsageError where the encoder has no statistics, or none of the data set's product."""
    if not subject.statistics:
        raise UsageError(f"encoder '{subject.name}' has no statistics of its pretraining's bands; use normalisation=dataset")
    if info.product is None:
        raise UsageError(f"{info.name} does not say which product of the sensor it is, so the encoder's statistics of "
                         f"{', '.join(subject.statistics)} do not apply; use normalisation=dataset")  # fmt: skip
    found = subject.statistics.get(info.product)
    if found is None:
        raise UsageError(f"encoder '{subject.name}' has statistics of {', '.join(subject.statistics)}, {info.name} is "
                         f"{info.product}; use normalisation=dataset")  # fmt: skip
    return tuple(found["mean"]), tuple(found["std"])


class Preparation(nn.Module):
    """Stored values (B, Ct, H, W) of any type -> float32 (B, Ce, H', W'), the sides whole numbers of cells.

    What is appended on the right and at the bottom mirrors the image without repeating its edge, or repeats the edge where the
    image is too small to be mirrored.
    """

    places_C: Tensor

    def __init__(self, feed: Feed, patch: int) -> None:
        super().__init__()
        self.feed, self.patch = feed, patch
        self.register_buffer("places_C", torch.tensor([place or 0 for place in feed.places]))  # of what is absent: any
        mean, std = ([v if v is None else v / feed.scale for v in values] for values in (feed.mean, feed.std))
        self.normalise = Normalise(mean, std, feed.missing, name=feed.normalisation)

    def forward(self, raw_BCHW: Tensor) -> Tensor:
        """Raises ValueError unless there are the data set's bands."""
        if raw_BCHW.ndim != 4 or raw_BCHW.shape[1] != self.feed.given:
            raise ValueError(f"images must be (B, {self.feed.given}, H, W); got {tuple(raw_BCHW.shape)}")
        return whole_cells(self.normalise(raw_BCHW.float()[:, self.places_C]), self.patch)


def whole_cells(image_BCHW: Tensor, patch: int) -> Tensor:
    """The image with sides made up to the next multiples of the patch, on the right and at the bottom."""
    height, width = image_BCHW.shape[2:]
    for side, margins in ((width, (0, -width % patch, 0, 0)), (height, (0, 0, 0, -height % patch))):
        if more := max(margins):
            image_BCHW = functional.pad(image_BCHW, margins, mode="reflect" if more < side else "replicate")
    return image_BCHW
