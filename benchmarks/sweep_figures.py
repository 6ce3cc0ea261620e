"""Figures of a sweep: rate, memory, speed and ratio over the size of the encoder, a line for every series of points."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.sweep_point import Measurement
from benchmarks.sweep_store import Record
from mmearth_ray.report.colours import class_colours
from mmearth_ray.report.page import INK, SOFT

WIDTH, HEIGHT = 6.0, 3.8  # inches
COLOURS = ("#2f7fd0", "#cc2a1e", "#2d7d3a", "#d0a63c", "#7a5fb5", "#3fa7a0")
MARKERS = "osD^vP"
STATE_BYTES = 16
"""Of a parameter while AdamW trains it: weight, gradient and two moments in float32."""

Series = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class Plot:
    """One figure: its file, title and axis, what is drawn of a point, and a line to compare with, in the same unit."""

    file: str
    title: str
    unit: str
    value: Callable[[Measurement], float | None]
    line: Callable[[Measurement], float] | None = None
    line_label: str = ""
    log: bool = True


PLOTS = (
    Plot("rate.png", "Training speed", "tiles/s", lambda m: m.tiles_per_second),
    Plot("memory.png", "Peak memory of training", "GB", lambda m: m.memory_bytes / 1e9,
         lambda m: m.parameters * STATE_BYTES / 1e9, "weights, gradients, AdamW's moments"),
    Plot("work.png", "Work done per second", "GFLOP/s", lambda m: m.gflop_per_second, log=False),
    Plot("ratio.png", "Times as fast as the plain computation", "plain time / our time", lambda m: m.plain_ratio,
         lambda m: 1.0, "as fast as plain", log=False),
)  # fmt: skip


def series(records: Sequence[Record]) -> Series:
    """Records with numbers by what tells them apart beside their size, in as few words as that takes."""
    measured = [record for record in records if record.result]
    sizes = {(record.point.size, *_traits(record).values()) for record in measured}
    batches_vary = len(sizes) < len(measured)
    traits = [_traits(r) | ({"batch": f"batch {r.point.batch}"} if batches_vary else {}) for r in measured]
    varying = [name for name in (traits[0] if traits else {}) if len({trait[name] for trait in traits}) > 1]
    found: dict[str, list[Record]] = {}
    for record, trait in zip(measured, traits, strict=True):
        found.setdefault(", ".join(trait[name] for name in varying), []).append(record)
    return found


def _traits(record: Record) -> dict[str, str]:
    point = record.point
    return {
        "shape": f"{point.image}/{point.patch}", "backend": point.backend, "precision": point.precision,
        "device": point.device, "machine": record.machine,
    }  # fmt: skip


def draw(records: Sequence[Record]) -> dict[str, tuple[str, Figure]]:
    """{file: (title, figure)} of every plot that there are numbers for."""
    lines = series(records)
    wanted = [plot for plot in PLOTS if any(plot.value(r.result) is not None for r in records if r.result)]
    return {plot.file: (plot.title, _draw(plot, lines)) for plot in wanted}


def _draw(plot: Plot, lines: Series) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    spare = class_colours([f"series {i}" for i in range(len(lines))])
    for place, (label, records) in enumerate(lines.items()):
        results = [record.result for record in records if record.result]
        style: dict[str, Any] = {
            "color": COLOURS[place] if place < len(COLOURS) else spare[place],
            "marker": MARKERS[place % len(MARKERS)],
        }
        _draw_line(axes, results, plot.value, label=label or "measured", markersize=4.5, linewidth=1.4, **style)
    for place, records in enumerate(lines.values()):
        if plot.line:
            label = plot.line_label if place == 0 else None
            results = [record.result for record in records if record.result]
            _draw_line(axes, results, plot.line, label=label, color=SOFT, linewidth=0.9, linestyle="--")
    _name_sizes(axes, [record for records in lines.values() for record in records])
    _dress(axes, plot)
    if len(lines) > 1 or plot.line:
        figure.legend(loc="outside lower left", ncols=3, fontsize=7.5, labelcolor=SOFT, frameon=False)
    return figure


def _draw_line(axes: Axes, results: Sequence[Measurement], value: Callable[[Measurement], float | None], **style: Any) -> None:
    shown = sorted((m.encoder_parameters, y) for m in results if (y := value(m)) is not None)
    if shown:
        axes.plot(*zip(*shown, strict=True), **style)


def _name_sizes(axes: Axes, records: Sequence[Record]) -> None:
    """The sizes' names at the top, above their numbers of parameters."""
    places = {record.point.size: record.result.encoder_parameters for record in records if record.result}
    for size, parameters in places.items():
        axes.axvline(parameters, color="#eeeeee", linewidth=0.8, zorder=0)
        axes.annotate(
            size, (parameters, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=7.5, color=SOFT,
        )  # fmt: skip


def _dress(axes: Axes, plot: Plot) -> None:
    axes.set_title(plot.title, loc="left", fontsize=10, weight="bold", color=INK, pad=16)
    axes.set_xlabel("parameters of the encoder, millions", fontsize=8.5, color=SOFT)
    axes.set_ylabel(plot.unit, fontsize=8.5, color=SOFT)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.06)
    if plot.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8, colors=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
