"""Colours of maps: class palettes by what a class is called, and scales of quantities.

Shapes: C bands, H W pixels of a tile, h w pixels of a crop, 4 = red, green, blue, opacity in 0..1.
"""

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba

from mmearth_ray.modalities import Modality

# First match at the start of a word wins; hues follow the palettes that land-cover maps commonly use.
_CLASS_COLOURS = (
    ("shadow", "#5b5b66"), ("low probability", "#d5dbe3"), ("medium probability", "#b3bdca"), ("cirrus", "#a8d8e8"),
    ("cloud", "#8794a6"), ("saturated", "#c0007a"), ("dark", "#2e2e33"), ("snow", "#e3f1ff"), ("ice", "#c4e0f5"),
    ("water", "#2f7fd0"), ("mangrove", "#00a878"), ("flood", "#7a87c6"), ("wetland", "#3fa7a0"), ("tree", "#2d7d3a"),
    ("forest", "#1e6a35"), ("shrub", "#d0a63c"), ("grass", "#9ccb5a"), ("vegetation", "#4f9f45"), ("crop", "#ea8fd0"),
    ("built", "#cc2a1e"), ("urban", "#cc2a1e"), ("bare", "#b9a68c"), ("sand", "#e0cf9a"), ("moss", "#dcd77c"),
)  # fmt: skip
_BAND_COLOURS = (("elevation", "gist_earth"), ("height", "YlGn"), ("dB", "gray"), ("%", "PuBu"))  # in "band unit"

Array: TypeAlias = np.ndarray


def class_colours(names: Sequence[str]) -> list[str]:
    """One hex colour per class name: by keyword (water is blue), else a hue of a golden-angle walk over the places.

    Colours are distinct for a hundred classes and more; the same names always give the same colours.
    """
    chosen: list[str] = []
    for place, name in enumerate(names):
        hue = colorsys.hsv_to_rgb((0.05 + 0.618034 * place) % 1, 0.5, 0.8 - 0.2 * (place % 2))
        spare = "#{:02x}{:02x}{:02x}".format(*(round(255 * part) for part in hue))
        found = [colour for word, colour in _CLASS_COLOURS if re.search(rf"\b{word}", name.lower())]
        chosen.append(next((colour for colour in [*found[:1], spare] if colour not in chosen), spare))
    return chosen


@dataclass(frozen=True)
class Scale:
    """How a quantity becomes colour: places of one or three bands, limits in the bands' unit, colour map, names."""

    bands: list[int]
    low: float
    high: float
    colours: str
    unit: str
    title: str

    def paint(self, values_CHW: Array, valid_CHW: Array) -> Array:
        """(H, W, 4) colours, transparent where a shown band is missing."""
        good_HW = valid_CHW[self.bands].all(axis=0)
        share = np.where(good_HW, values_CHW[self.bands].astype(np.float64), self.low)
        share = np.clip((share - self.low) / (self.high - self.low), 0, 1)
        if len(self.bands) == 3:
            return np.dstack([*share, good_HW])
        rgba_HW4 = np.array(ScalarMappable(Normalize(0, 1), self.colours).to_rgba(share[0]))
        rgba_HW4[..., 3] = good_HW
        return rgba_HW4


def scale_of(modality: Modality, values_CHW: Array, valid_CHW: Array) -> Scale:
    """The scale of a map: 2nd to 98th percentile of its valid pixels, one stretch for all bands of a colour image."""
    names = (modality.display or modality.bands)[: 3 if len(modality.display) == 3 else 1]
    bands = [modality.bands.index(name) for name in names]
    seen = values_CHW[bands][valid_CHW[bands]].astype(np.float64)
    low, high = np.percentile(seen, (2, 98)) if seen.size else (0.0, 1.0)
    unit = modality.units[bands[0]] if modality.units else ""
    colours = next((colours for word, colours in _BAND_COLOURS if word in f"{names[0]} {unit}"), "viridis")
    title = f"{plain(modality.name)} · {plain(' '.join(names))}" if len(modality.bands) > 1 else plain(modality.name)
    return Scale(bands, float(low), float(high if high > low else low + 1), colours, "" if unit == "1" else unit, title)


def label_paint(modality: Modality, labels_HW: Array) -> Array:
    """(H, W, 4) class colours, transparent where the label is -1."""
    palette = [to_rgba(colour) for colour in class_colours([entry.name for entry in modality.classes])]
    return np.array([*palette, (0.0, 0.0, 0.0, 0.0)])[labels_HW]


def labels_of(modality: Modality, raw_HW: Array) -> Array:
    """Raw class codes -> labels, -1 for no data."""
    codes = raw_HW.astype(np.int64)
    known = modality.valid(raw_HW) & (codes >= 0) & (codes < 256)
    return np.where(known, modality.label_table()[np.where(known, codes, 0)], -1)


def plain(name: str) -> str:
    """A name as people read it."""
    return name.replace("_", " ")
