"""Scores as figures: panels of lines with intervals over the number of labels, parameters or seconds, one legend for all.

A line keeps its colour and marker in all panels.  Lines beside each other at one x are moved apart by a little, so that
every interval can be seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from mmearth_ray.report.colours import class_colours
from mmearth_ray.report.page import INK

WIDTH, HEIGHT, COLUMNS = 11.6, 4.2, 2  # inches of the whole figure, inches of a row of panels, panels in a row
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart with any kind of colour vision: Okabe and Ito (2008), Color Universal Design, without black and yellow."""
MUTED = ("#222222", "#8a8a8a", "#8b5a2b", "#5b6b8c", "#7a7a2e")
MARKERS, BASE_MARKERS = "osD^vP", "x+*1234"
APART = 0.022
"""Share of an axis's width that neighbouring lines are moved apart by; all lines of a panel stay within `SPREAD`."""
SPREAD = 0.07
LEGEND_COLUMNS, LEGEND_LINE = 3, 0.24  # inches of a line of the legend


@dataclass(frozen=True)
class Mark:
    """A score at a place of the x axis, with its interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Marks of one method.  A baseline is muted and dashed; one that has no place on the x axis is drawn `level` across it."""

    label: str
    marks: Sequence[Mark]
    baseline: bool = False
    level: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes: title, axis labels, lines, and x ticks by place (without any: powers of ten and their parts)."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    ticks: Mapping[float, str] | None = None


def draw(panels: Sequence[Panel], columns: int = COLUMNS) -> Figure:
    """The panels with their legend below."""
    styles = styles_of([line for panel in panels for line in panel.lines])
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    legend = LEGEND_LINE * -(-len(styles) // LEGEND_COLUMNS) + 0.1
    height = rows * HEIGHT + legend
    figure = Figure(figsize=(WIDTH * columns / COLUMNS, height), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1),
                    facecolor="white")  # fmt: skip
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, place + 1), panel, styles)
    handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=LEGEND_COLUMNS, fontsize=9.5, labelcolor=INK, frameon=False,
                  handlelength=3)  # fmt: skip
    return figure


def styles_of(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """{label: how its line looks}: colours and solid lines for methods, muted ones and dashes for baselines."""
    found: dict[str, dict[str, Any]] = {}
    methods = list(dict.fromkeys(line.label for line in lines if not line.baseline))
    spare = class_colours([f"line {place}" for place in range(len(methods))])
    for place, label in enumerate(methods):
        colour = COLOURS[place] if place < len(COLOURS) else spare[place]
        found[label] = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "linestyle": "-", "linewidth": 1.8,
                        "markersize": 5.5}  # fmt: skip
    for place, label in enumerate(dict.fromkeys(line.label for line in lines if line.baseline)):
        found[label] = {"color": MUTED[place % len(MUTED)], "marker": BASE_MARKERS[place % len(BASE_MARKERS)],
                        "linestyle": ("--", ":", "-.")[place % 3], "linewidth": 1.3, "markersize": 6}  # fmt: skip
    return found


def _draw_panel(axes: Axes, panel: Panel, styles: Mapping[str, dict[str, Any]]) -> None:
    placed = [line for line in panel.lines if not line.level]
    places = [mark.x for line in placed for mark in line.marks]
    least, most = (min(places), max(places)) if places else (1.0, 10.0)
    ratio = most / least if most > least else 10.0
    step = min(APART, SPREAD / max(1, len(placed) - 1))
    for place, line in enumerate(placed):
        shift = ratio ** (step * (place - (len(placed) - 1) / 2))
        _draw_line(axes, line, shift, styles[line.label])
    for line in panel.lines:
        if line.level:
            _draw_level(axes, line, styles[line.label])
    axes.set_xscale("log")
    wide = panel.ticks is not None or most > 10 * least  # without ticks of its own an axis shows a decade at least
    margin = max(ratio**0.08, 1.0 if wide else (10 * least / most) ** 0.5)
    axes.set_xlim(least / margin, most * margin)
    _dress(axes, panel)


def _draw_line(axes: Axes, line: Line, shift: float, style: Mapping[str, Any]) -> None:
    marks = sorted(line.marks, key=lambda mark: mark.x)
    shown = {**style, "linestyle": style["linestyle"] if line.joined else "none"}
    axes.plot([mark.x * shift for mark in marks], [mark.y for mark in marks], zorder=2 if line.baseline else 3, **shown)
    for mark in marks:
        if mark.low is not None and mark.high is not None:
            spread = [[max(0.0, mark.y - mark.low)], [max(0.0, mark.high - mark.y)]]
            axes.errorbar(mark.x * shift, mark.y, yerr=spread, fmt="none", ecolor=style["color"], elinewidth=1.1, capsize=3,
                          zorder=2 if line.baseline else 3)  # fmt: skip


def _draw_level(axes: Axes, line: Line, style: Mapping[str, Any]) -> None:
    """A line across the axes, with its interval as a band."""
    for mark in line.marks:
        axes.axhline(mark.y, color=style["color"], linestyle=style["linestyle"], linewidth=style["linewidth"], zorder=1)
        if mark.low is not None and mark.high is not None:
            axes.axhspan(mark.low, mark.high, color=style["color"], alpha=0.1, linewidth=0, zorder=0)


def _dress(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=12, weight="bold", color=INK, parse_math=False)
    axes.set_xlabel(panel.x_label, fontsize=10, color=INK, parse_math=False)
    axes.set_ylabel(panel.y_label, fontsize=10, color=INK, parse_math=False)
    if panel.ticks is None:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(FixedLocator(list(panel.ticks)))
        axes.set_xticklabels(list(panel.ticks.values()))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
