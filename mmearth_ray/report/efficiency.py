"""The report of label efficiency: one HTML file with the command, curves, intervals, tables, failures and circumstances.

What is told comes ready made (`mmearth_ray.evaluate.compare.summary`); here it is laid out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmearth_ray.report.curves import Panel, draw
from mmearth_ray.report.html import bullets, document, facts, heading, image, paragraph, png, row, table


@dataclass(frozen=True)
class Table:
    """Cells of rows, of which so many hold words; a row with a failure has it in the place of the cells that it lacks."""

    head: Sequence[str]
    rows: Sequence[tuple[Sequence[str], str]]
    words: int = 2


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Everything that a report says: `curves` over labels, `sizes` over parameters and seconds; texts are whole sentences."""

    title: str
    lead: str
    command: str
    settings: Mapping[str, Sequence[str]]
    findings: Sequence[str]
    curves: Sequence[Panel]
    sizes: Sequence[Panel]
    scores: Table
    differences: Table
    encoders: Table
    failures: Sequence[str]
    notes: Sequence[str]
    machine: Mapping[str, Sequence[str]]


def page(report: Efficiency) -> str:
    """The whole report as one HTML document that needs nothing beside itself."""
    failures = [heading("Failures"), bullets(report.failures, "failed")] if report.failures else []
    return document(f"mmearth-ray: {report.title}", [
        heading(report.title, 1), paragraph(report.lead, "soft"),
        facts({"command": [report.command]}),
        *([bullets(report.findings)] if report.findings else []),
        *failures,
        heading("Score over the number of labels"), *_figure("score over the number of labelled images", report.curves),
        heading("Score over the size and the cost of the encoder"), *_figure("score over parameters and seconds", report.sizes),
        heading("Scores"), _table(report.scores),
        heading("Paired differences"), _table(report.differences),
        heading("Encoders"), _table(report.encoders),
        heading("How to read it"), bullets(report.notes),
        heading("Settings"), facts(report.settings),
        heading("Computed with"), facts(report.machine),
    ])  # fmt: skip


def _figure(title: str, panels: Sequence[Panel]) -> list[str]:
    drawn = [panel for panel in panels if any(line.marks for line in panel.lines)]
    return [image(title, png(draw(drawn)), full=True)] if drawn else [paragraph("No point has a score yet.", "soft")]


def _table(content: Table) -> str:
    if not content.rows:
        return paragraph("There is nothing to show.", "soft")
    rows = [row(cells, failure, len(content.head) - len(cells)) for cells, failure in content.rows]
    return table(content.head, rows, content.words)
