"""What an encoder is fed: its bands, which raw values are no data, and the statistics that normalise the rest.

Shapes: C bands, H x W pixels; any dimensions may stand before C.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmearth_ray.errors import DataError, UsageError

Statistics = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Per product "mean" and "std" of every band, in raw units; None where a band has none."""


class Normalise(nn.Module):
    """Raw values (..., C, H, W) of any type -> float32 of zero mean and unit variance, as in pretraining.

    Values in `missing` and values that are not finite become 0, the mean.  So does a band without statistics; a band that
    is constant (std 0) is centred only.
    """

    mean_C11: Tensor
    std_C11: Tensor
    known_C11: Tensor

    def __init__(
        self, mean: Sequence[float | None], std: Sequence[float | None], missing: Sequence[float] = (), name: str = ""
    ) -> None:
        super().__init__()
        self.missing = tuple(missing)
        self.name = name
        mean_C11, std_C11 = (_column(values) for values in (mean, std))
        known_C11 = mean_C11.isfinite() & std_C11.isfinite()
        self.register_buffer("mean_C11", mean_C11.where(known_C11, 0))
        self.register_buffer("std_C11", std_C11.where(known_C11 & (std_C11 > 0), 1))
        self.register_buffer("known_C11", known_C11)

    def forward(self, raw: Tensor) -> Tensor:
        """Raises ValueError if there are not C bands."""
        if raw.ndim < 3 or raw.shape[-3] != len(self.mean_C11):
            raise ValueError(f"raw values must be (..., {len(self.mean_C11)}, height, width); got {tuple(raw.shape)}")
        raw = raw.float()  # exact for the native types of all sensors; uint16 tensors know few other operations
        valid = raw.isfinite() & self.known_C11
        for value in self.missing:
            valid = valid & (raw != value)
        return torch.where(valid, (raw - self.mean_C11) / self.std_C11, 0)

    def extra_repr(self) -> str:
        return f"{self.name or 'bands'}: {len(self.mean_C11)}, missing={list(self.missing)}"


@dataclass(frozen=True)
class Inputs:
    """Names of the bands in their order, raw values that mean "no data", and statistics where they are known."""

    bands: tuple[str, ...]
    missing: tuple[float, ...] = ()
    statistics: Statistics | None = None

    def normalise(self, product: str | None = None) -> Normalise:
        """The normalisation of one product of the sensor, which must be named where products differ.

        Raises DataError if no statistics are known, UsageError for a product there is not.
        """
        if not self.statistics:
            raise DataError(
                "the encoder comes without statistics of its bands; use Normalise(mean, std, missing) with your own"
            )
        if product is None and len({repr(dict(values)) for values in self.statistics.values()}) == 1:
            product = next(iter(self.statistics))
        moments = self.statistics.get(product or "")
        if moments is None:
            asked = "statistics differ by product" if product is None else f"there are no statistics of '{product}'"
            raise UsageError(f"{asked}; name one of {', '.join(self.statistics)}")
        return Normalise(moments["mean"], moments["std"], self.missing, name=product or "")


def _column(values: Sequence[float | None]) -> Tensor:
    """float32 (C, 1, 1), NaN for None."""
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float32)[:, None, None]
