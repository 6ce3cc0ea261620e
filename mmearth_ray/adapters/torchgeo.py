"""An exported encoder as TorchGeo has its own: a weights entry (transforms, bands, meta) and a builder that takes it.

TorchGeo finds models by name in a table that has no way in for others, so `torchgeo.models.get_model` cannot build this one:
call the builder, and give it to a TorchGeo trainer by overriding its `configure_models`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mmearth_ray.adapters.bands import Transforms, default_product, keep_bands, require, select_inputs
from mmearth_ray.checkpoints.folder import open_exported
from mmearth_ray.checkpoints.load import load_encoder
from mmearth_ray.errors import UsageError
from mmearth_ray.model.features import MapEncoder
from mmearth_ray.model.normalise import Inputs

_api = require("torchvision.models._api", "torchgeo")  # where TorchGeo takes Weights and WeightsEnum from

PUBLICATION = "https://arxiv.org/abs/2405.02771"  # MP-MAE and MMEarth


class EncoderWeights(_api.WeightsEnum):
    """A weights entry whose `url` is a path: nothing is downloaded.  `encoder_weights` makes it, also when it is unpickled."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return partial(encoder_weights, self.url, product=self.meta["product"], bands=self.meta["bands"]), ()

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Parameters as `mmearth_ray_encoder` has them.  What TorchGeo passes on (`progress`) has no meaning here."""
        return mmearth_ray_encoder(self).state_dict()


def encoder_weights(path: str | Path, *, product: str | None = None, bands: Sequence[str] | None = None) -> EncoderWeights:
    """The weights entry of an exported encoder.

    `transforms` normalises raw values with the statistics of `product`, of surface reflectance unless named; it does not
    resize, as the encoder takes any image of whole patches.  `bands` picks and orders some of the encoder's own bands
    (`keep_bands`).  `meta["bands"]` says which bands go in, in which order.
    """
    description = open_exported(Path(path)).description
    inputs = Inputs(tuple(description.bands), tuple(description.missing), description.statistics)
    if bands is not None:
        inputs = select_inputs(inputs, bands)
    product = product or default_product(inputs)
    size = description.size or "custom"
    meta = {
        "dataset": description.data_set,
        "in_chans": len(inputs.bands),
        "model": f"convnextv2_{size}",
        "publication": PUBLICATION,
        "repo": "mmearth-ray",
        "ssl_method": "mpmae",
        "bands": list(inputs.bands),
        "product": product,
        "patch_size": description.patch_size,
    }
    name = "_".join(part.upper() for part in (description.input, size, product) if part)
    entry = _api.Weights(url=str(path), transforms=Transforms(inputs, product), meta=meta)
    return next(iter(EncoderWeights("MMEarthRay_Weights", {name: entry})))


def mmearth_ray_encoder(weights: EncoderWeights, *, in_chans: int | None = None, **options: Any) -> MapEncoder:
    """The encoder with its weights.  `in_chans`, if given, must agree with them.

    `options` are those of `load_encoder`, which mean what they mean in timm: num_classes, features_only, out_indices.
    """
    if not isinstance(weights, EncoderWeights):
        raise UsageError(f"weights must come from mmearth_ray.adapters.torchgeo.encoder_weights(path); got {weights!r}")
    bands = weights.meta["bands"]
    if in_chans not in (None, len(bands)):
        raise UsageError(f"in_chans={in_chans}: these weights take {len(bands)} bands: {', '.join(bands)}")
    return keep_bands(load_encoder(weights.url, **options), bands)
