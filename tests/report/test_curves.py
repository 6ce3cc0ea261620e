"""Curves: axes are named, every interval is drawn, a line looks alike in all panels, and nothing hides behind another."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from mmearth_ray.report.curves import COLOURS, MUTED, Line, Mark, Panel, draw, styles_of

MARKS = [Mark(10, 0.4, 0.3, 0.45), Mark(100, 0.6, 0.5, 0.7)]
TICKS: dict[float, str] = {10: "10\n10 %", 100: "100\n100 %"}


def panel(*lines: Line, ticks: dict[float, str] | None = TICKS) -> Panel:
    return Panel("knn", "labels", "accuracy", lines, ticks)


def bars(axes: Axes) -> list[tuple[float, float, float]]:
    """(x, low, high) of the intervals that are drawn."""
    found = [c for c in axes.collections if isinstance(c, LineCollection)]
    return [(s[0][0], s[0][1], s[1][1]) for c in found for s in c.get_segments()]


def points_of(line: Line2D) -> np.ndarray:
    """(points, 2)."""
    return np.asarray(line.get_xydata())


def test_axes_are_named_and_intervals_drawn() -> None:
    figure = draw([panel(Line("ours", MARKS), Line("random", [Mark(10, 0.2), Mark(100, 0.3, 0.25, 0.35)], baseline=True))])
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("labels", "accuracy", "knn")
    assert axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.get_xticklabels()] == list(TICKS.values())
    assert sorted((round(low, 6), round(high, 6)) for _, low, high in bars(axes)) == [(0.25, 0.35), (0.3, 0.45), (0.5, 0.7)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "random"]


def test_lines_at_one_place_stand_beside_each_other_and_near_it() -> None:
    lines = [Line(f"line {i}", MARKS) for i in range(9)]
    places = sorted(x for x, low, _ in bars(draw([panel(*lines)]).axes[0]) if low == 0.3)
    assert len(set(np.round(places, 6))) == 9
    assert min(places) > 10 / 1.2
    assert max(places) < 10 * 1.2


def test_a_line_looks_alike_in_all_panels_and_unlike_the_others() -> None:
    one, two, base = Line("one", MARKS), Line("two", MARKS), Line("base", MARKS, baseline=True)
    figure = draw([panel(one, two, base), panel(two)])
    drawn = [[to_hex(line.get_color()) for line in axes.lines if len(points_of(line)) == 2] for axes in figure.axes]
    assert drawn[0] == [to_hex(COLOURS[0]), to_hex(COLOURS[1]), to_hex(MUTED[0])]
    assert drawn[1] == [to_hex(COLOURS[1])]
    styles = styles_of([Line(str(i), MARKS) for i in range(12)])
    assert len({style["color"] for style in styles.values()}) == 12


def test_what_has_no_place_is_a_level_with_its_interval() -> None:
    level = Line("statistics", [Mark(1, 0.5, 0.4, 0.6)], baseline=True, level=True)
    axes = draw([panel(Line("ours", [Mark(3.4, 0.7, 0.6, 0.8)], joined=False), level, ticks=None)]).axes[0]
    heights = [points_of(line)[0, 1] for line in axes.lines if len(points_of(line)) == 2]
    assert heights == [0.5]
    assert axes.patches
    low, high = axes.get_xlim()
    assert high / low == pytest.approx(10)  # so that there are ticks


def test_odd_numbers_are_drawn_without_warning() -> None:
    outside = Mark(5, 0.5, 0.55, 0.6)  # a percentile bootstrap may leave the mean out
    lines = [Line("ours", [outside]), Line("ours", [Mark(1, 1.0, 1.0, 1.0)]), Line("empty", [])]
    figure = draw([panel(line, ticks=None) for line in lines])
    figure.canvas.draw()
    assert len(figure.axes) == 3
