"""What every adapter needs: an encoder on some of its bands, the statistics that normalise them, and a package it may lack.

Shapes: C bands, H x W pixels.
"""

import importlib
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor, nn

from mmearth_ray.errors import UsageError
from mmearth_ray.modalities import PRODUCTS
from mmearth_ray.model.features import MapEncoder
from mmearth_ray.model.normalise import Inputs


def require(module: str, extra: str) -> Any:
    """Import a module of a package that mmearth-ray does without.  Raises UsageError if that package is not installed."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or package).partition(".")[0] != package:
            raise  # it is installed, and lacks something itself
        raise UsageError(f"{package} is not installed; run: pip install 'mmearth-ray[{extra}]'") from error


def select_inputs(inputs: Inputs, bands: Sequence[str | Enum]) -> Inputs:
    """The inputs with only these bands, in this order.  Raises UsageError for a band that is not among them.

    Names mean what they say: nothing is guessed from wavelengths, positions or spellings.
    """
    own = inputs.bands
    wanted = tuple(str(band.value if isinstance(band, Enum) else band) for band in bands)
    unknown = [band for band in wanted if band not in own]
    if unknown:
        raise UsageError(f"this encoder has no band {', '.join(unknown)}; it has {', '.join(own)}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise UsageError(f"bands must be one or more distinct names of {', '.join(own)}; got {', '.join(wanted) or 'none'}")
    places = [own.index(band) for band in wanted]
    statistics = inputs.statistics and {
        product: {part: [values[place] for place in places] for part, values in moments.items()}
        for product, moments in inputs.statistics.items()
    }
    return Inputs(wanted, inputs.missing, statistics)


def keep_bands(encoder: MapEncoder, bands: Sequence[str | Enum] | None) -> MapEncoder:
    """Make an encoder take only these of its bands, in this order: its first kernel keeps their channels.  In place.

    That is exact: it computes what the whole encoder computes where the other bands are 0, their mean once normalised.
    """
    assert encoder.inputs is not None, "an exported encoder knows its bands"
    if bands is not None:
        inputs = select_inputs(encoder.inputs, bands)
        first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
        assert (first.in_channels, first.groups) == (encoder.in_chans, 1), f"the first convolution is not the input's: {first}"
        places = [encoder.inputs.bands.index(band) for band in inputs.bands]
        first.weight = nn.Parameter(first.weight.detach()[:, places].contiguous())
        first.in_channels = encoder.in_chans = len(places)
        encoder.inputs = inputs
    return encoder


def default_product(inputs: Inputs) -> str | None:
    """The last of `PRODUCTS` (surface reflectance) that any band has statistics of; None where no product has any."""
    known = inputs.statistics or {}
    return next((p for p in reversed(PRODUCTS) if p in known and any(v is not None for v in known[p]["std"])), None)


class Transforms(nn.Module):
    """Raw values to the encoder's input, missing ones to 0: of an image (..., C, H, W), or of a sample or batch with one.

    A sample or batch is a dictionary with the image under "image"; what else it holds stays.
    """

    def __init__(self, inputs: Inputs, product: str | None) -> None:
        super().__init__()
        self.normalise = None if product is None else inputs.normalise(product)

    def forward(self, image: Any) -> Any:
        if isinstance(image, Mapping):
            return {**image, "image": self.normalised(image["image"])}
        return self.normalised(image)

    def normalised(self, raw: Tensor) -> Tensor:
        if self.normalise is None:
            raise UsageError("the encoder comes without statistics of its bands; normalise with those of your data")
        return self.normalise(raw)
