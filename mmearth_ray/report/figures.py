"""Figures of tiles and of reconstructions, for any modality: what a panel looks like follows from its level and kind.

A map keeps its missing pixels transparent above a hatched ground, so "no data" never looks like a value.  Figures are
built on the Agg canvas without pyplot, hence without global state, and a PNG appears under its name only when complete.
Shapes: C bands, H W pixels of a tile, h w pixels of a crop, 4 = red, green, blue, opacity in 0..1.
"""

import colorsys
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mmearth_ray.modalities import Kind, Level, Modality

DPI = 110
MARGIN, GAP, HEAD, LINE, BAR_FOOT = 0.3, 0.3, 0.27, 0.16, 0.32  # inches
TILE_SIDE, CROP_SIDE, PAIR_GAP = 2.35, 1.5, 0.06  # inches
MAX_SAMPLES, LEGEND_MAX, TOP_CLASSES = 4, 16, 3
INK, SOFT, HIDDEN, RIGHT, WRONG = "#222222", "#707070", "#8c8c8c", "#9fd3a6", "#c9d3e0"

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
Card: TypeAlias = tuple[str, float, Callable[[Axes], None]]  # title, height in lines, what draws it
Cell: TypeAlias = Callable[[float, float], float]  # draws at (left, top), returns its bottom; inches


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


# ---- colours: arrays -> (H, W, 4) ----


@dataclass(frozen=True)
class _Scale:
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


def _scale(modality: Modality, values_CHW: Array, valid_CHW: Array) -> _Scale:
    """The scale of a map: 2nd to 98th percentile of its valid pixels, one stretch for all bands of a colour image."""
    names = (modality.display or modality.bands)[: 3 if len(modality.display) == 3 else 1]
    bands = [modality.bands.index(name) for name in names]
    seen = values_CHW[bands][valid_CHW[bands]].astype(np.float64)
    low, high = np.percentile(seen, (2, 98)) if seen.size else (0.0, 1.0)
    unit = modality.units[bands[0]] if modality.units else ""
    colours = next((colours for word, colours in _BAND_COLOURS if word in f"{names[0]} {unit}"), "viridis")
    title = f"{_plain(modality.name)} · {_plain(' '.join(names))}" if len(modality.bands) > 1 else _plain(modality.name)
    return _Scale(
        bands, float(low), float(high if high > low else low + 1), colours, "" if unit == "1" else unit, title
    )


def _label_paint(modality: Modality, labels_HW: Array) -> Array:
    """(H, W, 4) class colours, transparent where the label is -1."""
    palette = [to_rgba(colour) for colour in class_colours([entry.name for entry in modality.classes])]
    return np.array([*palette, (0.0, 0.0, 0.0, 0.0)])[labels_HW]


def _labels(modality: Modality, raw_HW: Array) -> Array:
    """Raw class codes -> labels, -1 for no data."""
    codes = raw_HW.astype(np.int64)
    known = modality.valid(raw_HW) & (codes >= 0) & (codes < 256)
    return np.where(known, modality.label_table()[np.where(known, codes, 0)], -1)


# ---- the page ----


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float) -> str:
    size = abs(value)
    if 0 < size < 0.001:
        return f"{value:.1e}"
    return f"{value:.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def _columns(panels: int, least: int, most: int) -> int:
    """Columns of an even grid: as few rows as `most` allows, filled alike."""
    return max(least, math.ceil(panels / max(1, math.ceil(panels / most))))


class _Page:
    """A figure that grows downwards: axes are placed in inches from its top left corner, `close` fixes its height."""

    def __init__(self, width: float, title: str, subtitle: str = "") -> None:
        self.figure = Figure(figsize=(width, width), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.width, self.boxes, self.top = width, [], 0.2
        for text, size, weight, colour in ((title, 14, "bold", INK), (subtitle, 8.5, "normal", SOFT)):
            lines = textwrap.wrap(text, int((width - 2 * MARGIN) * 105 / size))
            if lines:
                axes = self.axes(MARGIN, self.top, width - 2 * MARGIN, len(lines) * size / 55)
                axes.set_axis_off()
                style: dict[str, Any] = {"va": "top", "fontsize": size, "weight": weight, "color": colour}
                axes.text(0, 1, "\n".join(lines), parse_math=False, **style)
                self.top += len(lines) * size / 55 + 0.04
        self.top += 0.04

    def axes(self, left: float, top: float, width: float, height: float, title: str = "") -> Axes:
        axes = self.figure.add_axes((0, 0, 1, 1))
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, loc="left", fontsize=8.5, weight="bold", color=INK, pad=3)
        self.boxes.append((axes, (left, top, width, height)))
        return axes

    def map(self, left: float, top: float, side: float, rgba_HW4: Array, title: str = "") -> Axes:
        """A square panel with a map above a hatched ground, or the word "absent" where nothing is valid."""
        axes = self.axes(left, top, side, side, title)
        axes.patch.set(facecolor="#eeeeee", edgecolor="#c8c8c8", hatch="////")
        for spine in axes.spines.values():
            spine.set(color="#b0b0b0", linewidth=0.6)
        if rgba_HW4.size and rgba_HW4[..., 3].any():
            axes.imshow(rgba_HW4, interpolation="nearest", aspect="auto")
        else:
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 3}
            axes.text(0.5, 0.5, "absent", transform=axes.transAxes, ha="center", va="center", color=SOFT, bbox=ground)
        return axes

    def colour_bar(self, left: float, top: float, width: float, scale: _Scale) -> None:
        """A thin bar with its limits and unit below; nothing for a colour image."""
        if len(scale.bands) == 3:
            return
        axes = self.axes(left, top + 0.06, width, 0.07)
        axes.imshow(np.linspace(0, 1, 256)[None], cmap=scale.colours, aspect="auto")
        axes.set_frame_on(False)
        words = ((0, "left", _number(scale.low)), (0.5, "center", scale.unit), (1, "right", _number(scale.high)))
        for x, side, word in words:
            axes.text(x, -0.5, word, transform=axes.transAxes, ha=side, va="top", fontsize=7, color=SOFT)

    def grid(self, columns: int, width: float, cells: Sequence[Cell]) -> list[float]:
        """Draw cells row by row; returns where each column is free: below the last row, or beside it."""
        free = [self.top] * columns
        for start in range(0, len(cells), columns):
            row = cells[start : start + columns]
            above = self.top
            self.top = max(draw(MARGIN + place * (width + GAP), above + HEAD) for place, draw in enumerate(row))
            free = [self.top if place < len(row) else above for place in range(columns)]
        return free

    def cards(self, starts: Sequence[float], width: float, cards: Sequence[Card]) -> None:
        """Place cards one by one into the column that is shortest so far; `starts` are the tops of the columns."""
        tops = list(starts)
        for title, lines, draw in cards:
            place = tops.index(min(tops))
            axes = self.axes(MARGIN + place * (width + GAP), tops[place] + HEAD, width, lines * LINE, title)
            axes.set(xlim=(0, 1), ylim=(lines, 0))
            axes.set_axis_off()
            axes.axhline(0, color="#d5d5d5", linewidth=0.8, clip_on=False)
            draw(axes)
            tops[place] += HEAD + lines * LINE + 0.12
        self.top = max(self.top, *tops)

    def close(self) -> Figure:
        height = self.top + MARGIN / 2
        self.figure.set_size_inches(self.width, height)
        for axes, (left, top, wide, high) in self.boxes:
            axes.set_position((left / self.width, 1 - (top + high) / height, wide / self.width, high / height))
        return self.figure


def _save(figure: Figure, path: str | Path) -> None:
    """Write the PNG beside its place, then move it there: it is complete or it does not exist."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _table(rows: Sequence[Sequence[str]], ends: Sequence[float]) -> Callable[[Axes], None]:
    """Draws rows of text: the first word from the left edge, the others ending at these shares of the width."""

    def draw(axes: Axes) -> None:
        for line, row in enumerate(rows):
            for column, word in enumerate(row):
                x, side, colour = (0, "left", SOFT) if column == 0 else (ends[column - 1], "right", INK)
                axes.text(x, line + 0.55, word, ha=side, va="center", fontsize=7.5, color=colour, parse_math=False)

    return draw


def _legend(axes: Axes, entries: Sequence[tuple[str, str]], columns: int) -> float:
    """Draw (label, colour) swatches below the axes; returns their height in inches."""
    shown = list(entries[:LEGEND_MAX])
    if len(entries) > LEGEND_MAX:
        shown.append((f"+{len(entries) - LEGEND_MAX} more", "none"))
    columns = 1 if columns == 2 and max((len(label) for label, _ in shown), default=0) > 20 else columns
    style: dict[str, Any] = {"fontsize": 7, "labelcolor": SOFT, "handlelength": 1, "handleheight": 1, "borderpad": 0}
    handles = [Patch(facecolor=colour, edgecolor="none", label=label) for label, colour in shown]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.03), "borderaxespad": 0, "frameon": False}
    axes.legend(
        handles=handles, ncols=columns, labelspacing=0.35, columnspacing=1.2, handletextpad=0.5, **place, **style
    )
    return 0.145 * math.ceil(len(shown) / columns) + 0.1


# ---- one tile ----


def _tile_quantity(page: _Page, modality: Modality, raw_CHW: Array, left: float, top: float) -> float:
    valid_CHW = modality.valid(raw_CHW)
    scale = _scale(modality, raw_CHW, valid_CHW)
    page.map(left, top, TILE_SIDE, scale.paint(raw_CHW, valid_CHW), scale.title)
    if valid_CHW[scale.bands].any():
        page.colour_bar(left, top + TILE_SIDE, TILE_SIDE, scale)
    return top + TILE_SIDE + BAR_FOOT


def _tile_classes(page: _Page, modality: Modality, raw_1HW: Array, left: float, top: float) -> float:
    labels_HW = _labels(modality, raw_1HW[0])
    axes = page.map(left, top, TILE_SIDE, _label_paint(modality, labels_HW), _plain(modality.name))
    colours = class_colours([entry.name for entry in modality.classes])
    counts = np.bincount(labels_HW[labels_HW >= 0], minlength=len(colours))
    present = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    named = [(f"{modality.classes[i].name} {counts[i] / counts.sum():.0%}", colours[i]) for i in present]
    return top + TILE_SIDE + _legend(axes, named, 2)


def _tile_flags(page: _Page, modality: Modality, raw_1HW: Array, left: float, top: float) -> float:
    """Each pixel in the colour of the last flag that is set there, pale where none is; shares count every flag."""
    raw_HW, valid_HW = raw_1HW[0].astype(np.int64), modality.valid(raw_1HW[0])
    colours = class_colours([entry.name for entry in modality.classes])
    rgba_HW4 = np.where(valid_HW[..., None], to_rgba("#f4f0e6"), 0.0)
    named = []
    for entry, colour in zip(modality.classes, colours, strict=True):
        set_HW = valid_HW & (raw_HW & entry.code > 0)
        rgba_HW4[set_HW] = to_rgba(colour)
        named.append((f"{entry.name} {set_HW.sum() / max(1, valid_HW.sum()):.0%}", colour))
    axes = page.map(left, top, TILE_SIDE, rgba_HW4, _plain(modality.name))
    return top + TILE_SIDE + _legend(axes, named if valid_HW.any() else [], 2)


def _tile_absent(page: _Page, modality: Modality, left: float, top: float) -> float:
    page.map(left, top, TILE_SIDE, np.zeros((0, 0, 4)), _plain(modality.name))
    return top + TILE_SIDE + BAR_FOOT


def _quantity_rows(modality: Modality, raw_C: Array) -> list[tuple[str, str]]:
    units = modality.units or ("",) * len(modality.bands)
    words = [
        f"{_number(value)} {'' if unit == '1' else unit}".strip() if valid else "absent"
        for value, valid, unit in zip(raw_C, modality.valid(raw_C), units, strict=True)
    ]
    return [(_plain(band), word) for band, word in zip(modality.bands, words, strict=True)]


def _class_rows(modality: Modality, label: Array) -> list[tuple[str, str]]:
    known = 0 <= int(label) < len(modality.classes)
    return [(line, "") for line in textwrap.wrap(modality.classes[int(label)].name if known else "absent", 40)]


def _flag_rows(modality: Modality, raw: Array) -> list[tuple[str, str]]:
    valid = bool(modality.valid(raw))
    return [(e.name, ("set" if int(raw) & e.code else "not set") if valid else "absent") for e in modality.classes]


_TILE_MAPS = {Kind.CONTINUOUS: _tile_quantity, Kind.CATEGORICAL: _tile_classes, Kind.FLAGS: _tile_flags}
_TILE_ROWS = {Kind.CONTINUOUS: _quantity_rows, Kind.CATEGORICAL: _class_rows, Kind.FLAGS: _flag_rows}


def build_tile(
    tile: Mapping[str, Array], modalities: Sequence[Modality], title: str, facts: Mapping[str, str]
) -> Figure:
    """The figure of `draw_tile`."""
    maps = [m for m in modalities if m.level is Level.PIXEL]
    columns = _columns(len(maps), 3, 5)
    facts_line = "  ·  ".join(f"{_plain(key)}: {value}" for key, value in facts.items())
    page = _Page(2 * MARGIN + columns * (TILE_SIDE + GAP) - GAP, title, facts_line)
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
            cards.append((_plain(m.name), len(rows), _table(rows, (1.0,))))
    page.cards(free, TILE_SIDE, cards)
    return page.close()


def draw_tile(
    path: str | Path, tile: Mapping[str, Array], modalities: Sequence[Modality], title: str, facts: Mapping[str, str]
) -> None:
    """Write a PNG that shows every modality of one tile.

    `tile[name]` holds raw stored values: maps (C, H, W), image-level quantities (C,), an image-level class as its label
    or -1; a modality without an entry is drawn as absent.  `facts` is a line of words below the title.
    """
    _save(build_tile(tile, modalities, title, facts), path)


# ---- reconstructions ----


@dataclass(frozen=True)
class _Pair:
    """Two maps side by side: titles, colours, a caption below the right one, and the scale if there is one to show."""

    title: str
    truth_HW4: Array
    prediction_HW4: Array
    caption: str = ""
    scale: _Scale | None = None
    right_title: str = "predicted"


def _parts(modality: Modality, sample: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Truth, prediction and where the truth is known, all of the prediction's shape; no truth at all is allowed."""
    prediction = np.asarray(sample["prediction"][modality.name])
    categorical = modality.kind is Kind.CATEGORICAL
    truth = np.broadcast_to(sample["truth"].get(modality.name, -1 if categorical else np.nan), prediction.shape)
    known = truth >= 0 if categorical else np.isfinite(truth)
    given = sample["valid"].get(modality.name, True)
    return truth, prediction, (known & given).reshape(known.shape)


def _quantity_pair(modality: Modality, sample: Mapping[str, Any], hidden_HW: Array) -> _Pair:
    truth_CHW, prediction_CHW, valid_CHW = _parts(modality, sample)
    finite_CHW = np.isfinite(prediction_CHW)
    seen = (truth_CHW, valid_CHW) if valid_CHW.any() else (prediction_CHW, finite_CHW)
    scale = _scale(modality, *seen)
    scored = (valid_CHW & finite_CHW & hidden_HW)[scale.bands]
    error = (prediction_CHW.astype(np.float64) - np.where(valid_CHW, truth_CHW, 0))[scale.bands][scored]
    caption = f"RMSE {_number(float(np.sqrt(np.mean(error**2))))} {scale.unit}".strip() if error.size else "no truth"
    return _Pair(
        scale.title, scale.paint(truth_CHW, valid_CHW), scale.paint(prediction_CHW, finite_CHW), caption, scale
    )


def _class_pair(modality: Modality, sample: Mapping[str, Any], hidden_HW: Array) -> _Pair:
    truth_HW, prediction_HW, valid_HW = _parts(modality, sample)
    hits = (prediction_HW == truth_HW)[valid_HW & hidden_HW]
    truth_HW4 = _label_paint(modality, np.where(valid_HW, truth_HW, -1))
    caption = f"accuracy {hits.mean():.0%}" if hits.size else "no truth"
    return _Pair(_plain(modality.name), truth_HW4, _label_paint(modality, prediction_HW), caption)


def _quantity_card(modality: Modality, sample: Mapping[str, Any]) -> Card:
    truth_C, prediction_C, valid_C = _parts(modality, sample)
    units = modality.units or ("",) * len(modality.bands)
    rows = [("", "truth", "predicted", "")]
    for band, true, guess, valid, unit in zip(modality.bands, truth_C, prediction_C, valid_C, units, strict=True):
        shown = _number(float(true)) if valid else "absent"
        rows.append((_plain(band), shown, _number(float(guess)), "" if unit == "1" else unit))
    return _plain(modality.name), len(rows), _table(rows, (0.66, 0.9, 1.0))


def _class_card(modality: Modality, sample: Mapping[str, Any]) -> Card:
    truth = int(sample["truth"].get(modality.name, -1))
    chances = np.asarray(sample["prediction"][modality.name])
    known = truth >= 0 and bool(np.all(sample["valid"].get(modality.name, True)))
    best = [int(label) for label in np.argsort(-chances, kind="stable")[:TOP_CLASSES]]
    true_name = modality.classes[truth].name if known else "absent"

    def draw(axes: Axes) -> None:
        _table([(f"true: {textwrap.shorten(true_name, 52, placeholder='…')}",)], ())(axes)
        for line, label in enumerate(best, 1):
            colour = RIGHT if known and label == truth else WRONG
            width = 0.88 * max(0.005, float(chances[label]))  # the percentage has the rest of the line
            axes.add_patch(Rectangle((0, line + 0.12), width, 0.86, color=colour, linewidth=0))
            name = textwrap.shorten(modality.classes[label].name, 44, placeholder="…")
            axes.text(0.015, line + 0.55, name, va="center", fontsize=7.5, color=INK, parse_math=False)
            axes.text(1, line + 0.55, f"{chances[label]:.0%}", ha="right", va="center", fontsize=7.5, color=INK)

    return _plain(modality.name), 1 + len(best), draw


_PAIRS = {Kind.CONTINUOUS: _quantity_pair, Kind.CATEGORICAL: _class_pair}
_CARDS = {Kind.CONTINUOUS: _quantity_card, Kind.CATEGORICAL: _class_card}


def _input_pair(row: Modality, sample: Mapping[str, Any], targets: Sequence[Modality], hidden_HW: Array) -> _Pair:
    """The input image beside what the encoder sees of it: hidden patches are grey."""
    target = next((m for m in targets if m.name == row.name), None)
    if target is not None and (row.name in sample["truth"] or "input" not in sample):
        row, (image_CHW, _, valid_CHW) = target, _parts(target, sample)
    elif "input" in sample:
        image_CHW = np.asarray(sample["input"])
        valid_CHW = np.isfinite(image_CHW) & sample["valid"].get(row.name, True)
    else:
        raise ValueError(
            f"sample {sample['id']}: {row.name} is no target, so the sample needs an 'input' array (C, h, w)"
        )
    if image_CHW.shape[1:] != hidden_HW.shape:
        raise ValueError(
            f"sample {sample['id']}: visible patches cover {hidden_HW.shape} of an image {image_CHW.shape[1:]}"
        )
    scale = _scale(row, image_CHW, valid_CHW)
    whole_HW4 = scale.paint(image_CHW, valid_CHW)
    seen_HW4 = np.where(hidden_HW[..., None], to_rgba(HIDDEN), whole_HW4)
    return _Pair(f"input: {scale.title}", whole_HW4, seen_HW4, right_title=f"visible {1 - hidden_HW.mean():.0%}")


def _draw_pair(page: _Page, pair: _Pair, left: float, top: float) -> float:
    page.map(left, top, CROP_SIDE, pair.truth_HW4, pair.title)
    axes = page.map(left + CROP_SIDE + PAIR_GAP, top, CROP_SIDE, pair.prediction_HW4)
    words: dict[str, Any] = {"ha": "right", "fontsize": 7.5, "color": SOFT, "transform": axes.transAxes}
    axes.text(1, 1.02, pair.right_title, va="bottom", **words)
    axes.text(1, -0.03, pair.caption, va="top", **words)
    if pair.scale and max(pair.truth_HW4[..., 3].max(), pair.prediction_HW4[..., 3].max()) > 0:
        page.colour_bar(left, top + CROP_SIDE, CROP_SIDE, pair.scale)
    return top + CROP_SIDE + BAR_FOOT


def _draw_sample_head(page: _Page, sample_id: str) -> None:
    axes = page.axes(MARGIN, page.top + 0.05, page.width - 2 * MARGIN, 0.24)
    axes.patch.set_facecolor("#eef1f5")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.text(0.006, 0.46, sample_id, va="center", fontsize=9, weight="bold", color=INK, parse_math=False)
    page.top += 0.33


def _draw_class_key(page: _Page, samples: Sequence[Mapping[str, Any]], modality: Modality) -> None:
    """A line of swatches: the classes of a map that occur in any sample's truth or prediction."""
    parts = [np.unique(part) for sample in samples for part in _parts(modality, sample)[:2]]
    seen = [int(label) for label in np.unique(np.concatenate(parts)) if label >= 0]
    names = [entry.name for entry in modality.classes]
    colours = class_colours(names)
    lines = math.ceil(len(seen) / (page.width // 1.45))  # swatches are about as wide as their longest name
    per_line = math.ceil(len(seen) / max(1, lines))
    axes = page.axes(MARGIN, page.top + HEAD - 0.04, page.width - 2 * MARGIN, 0.02, _plain(modality.name))
    axes.set_axis_off()
    page.top += HEAD + _legend(axes, [(names[i], colours[i]) for i in seen], per_line)


def build_reconstruction(
    samples: Sequence[Mapping[str, Any]], targets: Sequence[Modality], input: Modality, patch_size: int, title: str
) -> Figure:
    """The figure of `draw_reconstruction`."""
    if not 1 <= len(samples) <= MAX_SAMPLES:
        raise ValueError(f"a figure holds 1 to {MAX_SAMPLES} samples; got {len(samples)}")
    untrained = [m.name for m in targets if not m.trainable]
    if untrained:
        raise ValueError(f"flags are stored, never predicted; remove {', '.join(untrained)} from the targets")
    maps = [m for m in targets if m.level is Level.PIXEL]
    columns = _columns(len(maps) + 1, 2, 4)
    pair_width = 2 * CROP_SIDE + PAIR_GAP
    width = 2 * MARGIN + columns * (pair_width + GAP) - GAP
    page = _Page(width, title, "scores count hidden patches where truth is known")
    for sample in samples:
        _draw_sample_head(page, str(sample["id"]))
        hidden_HW = np.kron(~np.asarray(sample["visible"], bool), np.ones((patch_size, patch_size), bool))
        pairs = [_input_pair(input, sample, targets, hidden_HW)]
        pairs += [_PAIRS[m.kind](m, sample, hidden_HW) for m in maps]
        free = page.grid(columns, pair_width, [partial(_draw_pair, page, pair) for pair in pairs])
        page.cards(free, pair_width, [_CARDS[m.kind](m, sample) for m in targets if m.level is Level.IMAGE])
        page.top += 0.1
    for m in maps:
        if m.kind is Kind.CATEGORICAL:
            _draw_class_key(page, samples, m)
    return page.close()


def draw_reconstruction(
    path: str | Path,
    samples: Sequence[Mapping[str, Any]],
    targets: Sequence[Modality],
    input: Modality,
    patch_size: int,
    title: str,
) -> None:
    """Write a PNG that shows, for one to four samples, the input, what was visible of it, and truth beside prediction.

    A sample holds "id", "visible" bool (gh, gw) with gh * patch_size = h, and "truth", "prediction" and "valid" by name:
    maps (C, h, w) in the bands' units, class maps (h, w) as labels with -1 for missing, image-level quantities (C,);
    an image-level class is an int label in truth and probabilities (classes,) in prediction.  "input" (C, h, w) is needed
    where the input is no target.  A name that `truth` lacks is drawn as absent; one that `valid` lacks is valid.
    """
    _save(build_reconstruction(samples, targets, input, patch_size, title), path)
