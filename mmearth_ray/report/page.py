"""A page of panels: axes placed in inches, maps that keep missing pixels transparent above a hatched ground.

Figures are built on the Agg canvas without pyplot, hence without global state, and a PNG appears under its name only when
complete.  Shapes: C bands, H W pixels of a tile, h w pixels of a crop, 4 = red, green, blue, opacity in 0..1.
"""

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmearth_ray.report.colours import Array, Scale

DPI = 110
MARGIN, GAP, HEAD, LINE, BAR_FOOT = 0.3, 0.3, 0.27, 0.16, 0.32  # inches
LEGEND_MAX = 16
INK, SOFT = "#222222", "#707070"

Card: TypeAlias = tuple[str, float, Callable[[Axes], None]]  # title, height in lines, what draws it
Cell: TypeAlias = Callable[[float, float], float]  # draws at (left, top), returns its bottom; inches


def number(value: float) -> str:
    size = abs(value)
    if 0 < size < 0.001:
        return f"{value:.1e}"
    return f"{value:.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def column_count(panels: int, least: int, most: int) -> int:
    """Columns of an even grid: as few rows as `most` allows, filled alike."""
    return max(least, math.ceil(panels / max(1, math.ceil(panels / most))))


class Page:
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

    def colour_bar(self, left: float, top: float, width: float, scale: Scale) -> None:
        """A thin bar with its limits and unit below; nothing for a colour image."""
        if len(scale.bands) == 3:
            return
        axes = self.axes(left, top + 0.06, width, 0.07)
        axes.imshow(np.linspace(0, 1, 256)[None], cmap=scale.colours, aspect="auto")
        axes.set_frame_on(False)
        words = ((0, "left", number(scale.low)), (0.5, "center", scale.unit), (1, "right", number(scale.high)))
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


def save(figure: Figure, path: str | Path) -> None:
    """Write the PNG beside its place, then move it there: it is complete or it does not exist."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def table(rows: Sequence[Sequence[str]], ends: Sequence[float]) -> Callable[[Axes], None]:
    """Draws rows of text: the first word from the left edge, the others ending at these shares of the width."""

    def draw(axes: Axes) -> None:
        for line, row in enumerate(rows):
            for column, word in enumerate(row):
                x, side, colour = (0, "left", SOFT) if column == 0 else (ends[column - 1], "right", INK)
                axes.text(x, line + 0.55, word, ha=side, va="center", fontsize=7.5, color=colour, parse_math=False)

    return draw


def legend(axes: Axes, entries: Sequence[tuple[str, str]], columns: int) -> float:
    """Draw (label, colour) swatches below the axes; returns their height in inches."""
    shown = list(entries[:LEGEND_MAX])
    if len(entries) > LEGEND_MAX:
        shown.append((f"+{len(entries) - LEGEND_MAX} more", "none"))
    columns = 1 if columns == 2 and max((len(label) for label, _ in shown), default=0) > 20 else columns
    style: dict[str, Any] = {"fontsize": 7, "labelcolor": SOFT, "handlelength": 1, "handleheight": 1, "borderpad": 0}
    handles = [Patch(facecolor=colour, edgecolor="none", label=label) for label, colour in shown]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.03), "borderaxespad": 0, "frameon": False}
    axes.legend(handles=handles, ncols=columns, labelspacing=0.35, columnspacing=1.2, handletextpad=0.5, **place, **style)
    return 0.145 * math.ceil(len(shown) / columns) + 0.1
