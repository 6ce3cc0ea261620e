"""What a comparison's figures show: scores over labels, over parameters and over seconds, with their intervals."""

from collections.abc import Callable, Sequence

import numpy as np

from mmearth_ray.evaluate.compare.contenders import Contender, Role, structure_of
from mmearth_ray.evaluate.compare.summary import Cell, Summary
from mmearth_ray.evaluate.protocols.names import FINETUNE, MEANING, PROTOCOLS
from mmearth_ray.report.curves import Line, Mark, Panel

ACROSS = {Role.SUPERVISED: FINETUNE, Role.STATISTICS: "logistic"}
"""Baselines that are drawn under every protocol, by the one that they have."""

SHOWN = {"accuracy": "accuracy", "micro_f1": "micro F1", "miou": "mean IoU", "r2": "R2"}
"""What axes call the primary metrics."""


def curves(summary: Summary, metric: str) -> list[Panel]:
    """A panel for every protocol: the primary metric over labelled images, a line for every contender."""
    return [
        Panel(f"{MEANING[protocol]}", "labelled training images, and share of all", SHOWN[metric],
              _lines(summary, protocol), _ticks(summary, protocol))
        for protocol in protocols_of(summary)
    ]  # fmt: skip


def sizes(summary: Summary, metric: str) -> list[Panel]:
    """Two panels for every protocol, of the scores with the most labels: over parameters and over seconds per image."""
    made: list[Panel] = []
    for protocol in protocols_of(summary):
        fraction = max(f for name, p, f in summary.cells if p == protocol)
        title = f"{MEANING[protocol]}, {share(fraction)} of labels"
        for label, x_of in (("parameters of the encoder, millions", _millions), (seconds_label(summary), seconds_of(summary))):
            lines = [
                _point_line(contender, cell, x_of(contender))
                for contender, used in _drawn(summary.contenders, protocol)
                if (cell := summary.cell(contender.name, used, fraction)) and cell.estimate
            ]
            made.append(Panel(title, label, SHOWN[metric], lines))
    return made


def protocols_of(summary: Summary) -> list[str]:
    """Protocols of the encoders, in the order of their cost; where there are none, of whatever there is."""
    wanted = {p for c in summary.contenders if c.role is Role.ENCODER for p in c.protocols}
    return [p for p in PROTOCOLS if p in (wanted or {p for c in summary.contenders for p in c.protocols})]


def share(fraction: float) -> str:
    """A share as people read it: 1 %."""
    return f"{100 * fraction:g} %"


def seconds_of(summary: Summary) -> Callable[[Contender], float | None]:
    """What one image costs a contender: seconds of its features, or of those of an encoder of the same structure."""
    found: dict[str, list[float]] = {}
    for (name, _, _), cell in summary.cells.items():
        structure = next(_structure(c) for c in summary.contenders if c.name == name)
        known = [result.seconds_features for result in cell.results.values()]
        found.setdefault(structure, []).extend(seconds for seconds in known if seconds is not None)

    def seconds(contender: Contender) -> float | None:
        values = found.get(_structure(contender))
        return float(np.median(values)) if values else None

    return seconds


def seconds_label(summary: Summary) -> str:
    clocks = {
        str(r.machine.get("clock", "cpu"))
        for cell in summary.cells.values()
        for r in cell.results.values()
        if r.seconds_features is not None
    }
    return f"{' or '.join(sorted(c.upper() for c in clocks)) or 'CPU'}-seconds of one image's features"


def _structure(contender: Contender) -> str:
    subject = contender.subjects[0]
    return subject.digest if subject.kind == "statistics" else structure_of(subject, "dataset")


def _millions(contender: Contender) -> float | None:
    return contender.subjects[0].parameters / 1e6 or None


def _drawn(contenders: Sequence[Contender], protocol: str) -> list[tuple[Contender, str]]:
    """Contenders of a protocol's panel, each with the protocol that its line is of."""
    found = []
    for contender in contenders:
        across = ACROSS.get(contender.role, "")
        used = protocol if protocol in contender.protocols else across if across in contender.protocols else ""
        if used:
            found.append((contender, used))
    return found


def _lines(summary: Summary, protocol: str) -> list[Line]:
    found = []
    for contender, used in _drawn(summary.contenders, protocol):
        cells = [cell for (name, p, _), cell in summary.cells.items() if (name, p) == (contender.name, used)]
        marks = [mark for cell in cells if (mark := _mark(cell, cell.train))]
        found.append(Line(contender.name, marks, baseline=contender.role is not Role.ENCODER))
    return [line for line in found if line.marks]


def _mark(cell: Cell, x: float) -> Mark | None:
    e = cell.estimate
    return None if e is None or x <= 0 else Mark(x, e.mean, e.low, e.high)


def _point_line(contender: Contender, cell: Cell, x: float | None) -> Line:
    """One mark, or a level across the panel of what has no parameters."""
    mark = _mark(cell, x or 1.0)
    baseline = contender.role is not Role.ENCODER
    return Line(contender.name, [mark] if mark else [], baseline=baseline, level=x is None, joined=False)


def _ticks(summary: Summary, protocol: str) -> dict[float, str]:
    """{labelled images: "16, 10 %"} of the fractions; two of as many images have one tick."""
    found: dict[float, list[str]] = {}
    for (_, p, fraction), cell in summary.cells.items():
        if p == protocol and cell.train > 0:
            words = found.setdefault(round(cell.train), [])
            words += [share(fraction)] if share(fraction) not in words else []
    return {images: f"{images:,}\n{', '.join(words)}" for images, words in sorted(found.items())}
