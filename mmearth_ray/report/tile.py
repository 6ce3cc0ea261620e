"""The figure of one tile: a panel for every modality, by its level and kind.

Shapes: C bands, H W pixels of a tile, h w pixels of a crop, 4 = red, green, blue, opacity in 0..1.
"""

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from mmearth_ray.modalities import Kind, Level, Modality
from mmearth_ray.report.colours import Array, class_colours, label_paint, labels_of, plain, scale_of
from mmearth_ray.report.page import BAR_FOOT, GAP, MARGIN, Card, Cell, Page, column_count, legend, number, save, table

TILE_SIDE = 2.35  # inches


def _tile_quantity(page: Page, modality: Modality, raw_CHW: Array, left: float, top: float) -> float:
    valid_CHW = modality.valid(raw_CHW)
    scale = scale_of(modality, raw_CHW, valid_CHW)
    page.map(left, top, TILE_SIDE, scale.paint(raw_CHW, valid_CHW), scale.title)
    if valid_CHW[scale.bands].any():
        page.colour_bar(left, top + TILE_SIDE, TILE_SIDE, scale)
    return top + TILE_SIDE + BAR_FOOT


def _tile_classes(page: Page, modality: Modality, raw_1HW: Array, left: float, top: float) -> float:
    labels_HW = labels_of(modality, raw_1HW[0])
    axes = page.map(left, top, TILE_SIDE, label_paint(modality, labels_HW), plain(modality.name))
    colours = class_colours([entry.name for entry in modality.classes])
    counts = np.bincount(labels_HW[labels_HW >= 0], minlength=len(colours))
    present = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    named = [(f"{modality.classes[i].name} {counts[i] / counts.sum():.0%}", colours[i]) for i in present]
    return top + TILE_SIDE + legend(axes, named, 2)


def _tile_flags(page: Page, modality: Modality, raw_1HW: Array, left: float, top: float) -> float:
    """Each pixel in the colour of the last flag that is set there, pale where none is; shares count every flag."""
    raw_HW, valid_HW = raw_1HW[0].astype(np.int64), modality.valid(raw_1HW[0])
    colours = class_colours([entry.name for entry in modality.classes])
    rgba_HW4 = np.where(valid_HW[..., None], to_rgba("#f4f0e6"), 0.0)
    named = []
    for entry, colour in zip(modality.classes, colours, strict=True):
        set_HW = valid_HW & (raw_HW & entry.code > 0)
        rgba_HW4[set_HW] = to_rgba(colour)
        named.append((f"{entry.name} {set_HW.sum() / max(1, valid_HW.sum()):.0%}", colour))
    axes = page.map(left, top, TILE_SIDE, rgba_HW4, plain(modality.name))
    return top + TILE_SIDE + legend(axes, named if valid_HW.any() else [], 2)


def _tile_absent(page: Page, modality: Modality, left: float, top: float) -> float:
    page.map(left, top, TILE_SIDE, np.zeros((0, 0, 4)), plain(modality.name))
    return top + TILE_SIDE + BAR_FOOT


def _quantity_rows(modality: Modality, raw_C: Array) -> list[tuple[str, str]]:
    units = modality.units or ("",) * len(modality.bands)
    words = [
        f"{number(value)} {'' if unit == '1' else unit}".strip() if valid else "absent"
        for value, valid, unit in zip(raw_C, modality.valid(raw_C), units, strict=True)
    ]
    return [(plain(band), word) for band, word in zip(modality.bands, words, strict=True)]


def _class_rows(modality: Modality, label: Array) -> list[tuple[str, str]]:
    known = 0 <= int(label) < len(modality.classes)
    return [(line, "") for line in textwrap.wrap(modality.classes[int(label)].name if known else "absent", 40)]


def _flag_rows(modality: Modality, raw: Array) -> list[tuple[str, str]]:
    valid = bool(modality.valid(raw))
    return [(e.name, ("set" if int(raw) & e.code else "not set") if valid else "absent") for e in modality.classes]


_TILE_MAPS = {Kind.CONTINUOUS: _tile_quantity, Kind.CATEGORICAL: _tile_classes, Kind.FLAGS: _tile_flags}
_TILE_ROWS = {Kind.CONTINUOUS: _quantity_rows, Kind.CATEGORICAL: _class_rows, Kind.FLAGS: _flag_rows}


def build_tile(tile: Mapping[str, Array], modalities: Sequence[Modality], title: str, facts: Mapping[str, str]) -> Figure:
    """The figure of `draw_tile`."""
    maps = [m for m in modalities if m.level is Level.PIXEL]
    columns = column_count(len(maps), 3, 5)
    facts_line = "  ·  ".join(f"{plain(key)}: {value}" for key, value in facts.items())
    page = Page(2 * MARGIN + columns * (TILE_SIDE + GAP) - GAP, title, facts_line)
    arrays = {m.name: np.asarray(tile[m.name]) for m in modalities if m.name in tile}
    cells: list[Cell] = [
        partial(_TILE_MAPS[m.kind], page, m, arrays[m.name]) if m.name in arrays else partial(_tile_absent, page, m)
        for m in maps
    ]
    free = page.grid(columns, TILE_SIDE, cells)
    cards: list[Card] = []
    for m in modalities:
        if m.level is Level.IMAGE:
            rows = _TILE_ROWS[m.kind](m, arrays[m.name]) if m.name in arrays else [("absent", "")]
            cards.append((plain(m.name), len(rows), table(rows, (1.0,))))
    page.cards(free, TILE_SIDE, cards)
    return page.close()


def draw_tile(
    path: str | Path, tile: Mapping[str, Array], modalities: Sequence[Modality], title: str, facts: Mapping[str, str]
) -> None:
    """Write a PNG that shows every modality of one tile.

    `tile[name]` holds raw stored values: maps (C, H, W), image-level quantities (C,), an image-level class as its label
    or -1; a modality without an entry is drawn as absent.  `facts` is a line of words below the title.
    """
    save(build_tile(tile, modalities, title, facts), path)
