"""The report of a sweep, made from its records alone: a table, figures, JSON, and one HTML file that holds them all.

Every file is complete or absent.  The HTML needs nothing beside itself, no network either.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.sweep_figures import draw
from benchmarks.sweep_point import Measurement
from benchmarks.sweep_store import Record
from mmearth_ray.errors import DataError
from mmearth_ray.files import atomic_text, complete_or_absent
from mmearth_ray.report.html import bullets, document, facts, heading, image, paragraph, png, row, table
from mmearth_ray.report.page import number

FACTS = ("device", "processor", "driver", "cuda", "instructions", "cores", "threads", "python", "torch", "numpy", "ray",
         "triton", "MinkowskiEngine", "commit", "date", "command")  # fmt: skip
"""What is told about the circumstances of records, in this order."""

NOTES = (
    "A step is forward, backward and fused AdamW on random tiles that lie ready in memory, 60 % of patches hidden, nothing "
    "missing; times are medians over the steps that count. The stream of data is no part of it.",
    "Memory is the peak of the process over what it held just before its first step, with model and batch made: gradients and "
    "AdamW's two moments, 12 bytes per parameter, are part of it, weights are not. On a GPU it is the most that PyTorch had "
    "allocated, weights and batch included.",
    "GFLOP per tile counts the convolutions and matrices of forward and backward on visible cells, two operations per "
    "multiplication with its addition (mmearth_ray/model/flops.py). GFLOP/s is that, times tiles/s of the whole step.",
    "Plain/ours is the time that the published computation takes in plain PyTorch, float32 (benchmarks/plain.py), over ours, "
    "forward and backward, measured in turn in one process: the median of the steps' own ratios. Above 1, ours is faster.",
    "Where the batch is by size it shrinks as models grow, so that large ones fit into small machines. AdamW does as much work "
    "at any batch: at one of 1 or 2 its share of a step is far larger than in training.",
)


POINT: dict[str, Callable[[Record], str]] = {
    "size": lambda r: r.point.size,
    "image/patch": lambda r: f"{r.point.image}/{r.point.patch}",
    "batch": lambda r: str(r.point.batch),
    "backend": lambda r: r.point.backend,
    "precision": lambda r: r.point.precision,
}
"""The table's columns that tell what was measured."""

MACHINE: dict[str, Callable[[Record], str]] = {"machine": lambda r: r.machine}
"""One more of them, where there are several machines."""

NUMBERS: dict[str, Callable[[Measurement], str]] = {
    "encoder, M": lambda m: number(m.encoder_parameters / 1e6),
    "model, M": lambda m: number(m.parameters / 1e6),
    "tiles/s": lambda m: number(m.tiles_per_second),
    "forward ms": lambda m: number(m.forward_ms),
    "backward ms": lambda m: number(m.backward_ms),
    "AdamW ms": lambda m: number(m.optimizer_ms),
    "memory GB": lambda m: number(m.memory_bytes / 1e9),
    "GFLOP/tile": lambda m: number(m.gflop_per_tile),
    "GFLOP/s": lambda m: number(m.gflop_per_second),
    "plain/ours": lambda m: "" if m.plain_ratio is None else number(m.plain_ratio),
}
"""Its columns of results; a point that failed has its reason in their place."""


def write_report(directory: Path, records: Sequence[Record]) -> Path:
    """Write table.md, results.json, the figures and report.html; returns the last one's path."""
    if not records:
        raise DataError(f"{directory} holds no points of a sweep; measure some, or name their directory")
    circumstances = gather(records)
    figures = {file: (title, png(figure)) for file, (title, figure) in draw(records).items()}
    for file, (_, content) in figures.items():
        with complete_or_absent(directory / file) as temporary:
            temporary.write_bytes(content)
    atomic_text(directory / "results.json", json.dumps([asdict(record) for record in records], indent=1) + "\n")
    atomic_text(directory / "table.md", markdown(records, circumstances))
    path = directory / "report.html"
    atomic_text(path, page(records, circumstances, figures))
    return path


def gather(records: Sequence[Record]) -> dict[str, list[str]]:
    """{fact: its different values} of all records."""
    found = {name: [str(r.about[name]) for r in records if name in r.about] for name in FACTS}
    return {name: list(dict.fromkeys(values)) for name, values in found.items() if values}


def point_columns(records: Sequence[Record]) -> Mapping[str, Callable[[Record], str]]:
    """The columns that tell these records apart."""
    return POINT | (MACHINE if len({record.machine for record in records}) > 1 else {})


def markdown(records: Sequence[Record], circumstances: Mapping[str, Sequence[str]]) -> str:
    """The table with what it was measured on and with."""
    points = point_columns(records)
    rows = [[*points, *NUMBERS], ["---"] * (len(points) + len(NUMBERS))]
    for record in records:
        reason = [f"failed: {record.failure}".replace("|", "\\|"), *[""] * (len(NUMBERS) - 1)]
        numbers = [cell(record.result) for cell in NUMBERS.values()] if record.result else reason
        rows.append([*(cell(record) for cell in points.values()), *numbers])
    facts = [f"- {name}: {'; '.join(values)}" for name, values in circumstances.items()]
    return "\n".join(["# sweep", "", *facts, "", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


# ---- the HTML file ----


def page(
    records: Sequence[Record], circumstances: Mapping[str, Sequence[str]], figures: Mapping[str, tuple[str, bytes]]
) -> str:
    """The whole report as one HTML document; figures are titles and PNG files."""
    finished = sum(record.result is not None for record in records)
    failed = f", {len(records) - finished} failed" if finished < len(records) else ""
    points = point_columns(records)
    rows = [
        row([*(cell(r) for cell in points.values()), *(cell(r.result) for cell in NUMBERS.values() if r.result)],
            "" if r.result else r.failure, len(NUMBERS))
        for r in records
    ]  # fmt: skip
    return document("mmearth-ray: sweep", [
        heading("What a training step costs", 1),
        paragraph(f"{finished} points measured{failed}, on {'; '.join(circumstances['device'])}", "soft"),
        table([*points, *NUMBERS], rows),
        heading("Figures"), *(image(*figure) for figure in figures.values()),
        heading("How to read it"), bullets(NOTES),
        heading("Measured with"), facts(circumstances),
    ])  # fmt: skip
