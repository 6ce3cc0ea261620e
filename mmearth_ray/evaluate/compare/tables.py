"""What a comparison's tables hold: scores, paired differences, encoders, and the sentences that say what stands out."""

from collections.abc import Iterable, Sequence

from mmearth_ray.evaluate.compare.combined import Estimate
from mmearth_ray.evaluate.compare.contenders import Role
from mmearth_ray.evaluate.compare.panels import protocols_of, seconds_of, share
from mmearth_ray.evaluate.compare.summary import Cell, Difference, Summary
from mmearth_ray.evaluate.datasets.task import TaskInfo
from mmearth_ray.evaluate.features.feeding import feed_of
from mmearth_ray.evaluate.protocols.names import MEANING, PROTOCOLS
from mmearth_ray.report.efficiency import Table


def score_table(summary: Summary) -> Table:
    """A row for every contender and protocol, a column for every share of the labels."""
    fractions = fractions_of(summary)
    rows = []
    for protocol in PROTOCOLS:
        for contender in summary.contenders:
            cells = [summary.cell(contender.name, protocol, fraction) for fraction in fractions]
            if not any(cells):
                continue
            reasons = {reason for cell in cells if cell for reason in cell.failures.values()}
            if not any(cell and cell.results for cell in cells):
                rows.append(([contender.name, MEANING[protocol]], _reasons(reasons)))
            else:
                rows.append(([contender.name, MEANING[protocol], *(_score(cell) for cell in cells)], ""))
    return Table(["encoder", "protocol", *(_column(summary, fraction) for fraction in fractions)], rows)


def difference_table(summary: Summary) -> Table:
    """A row for every pair, a column for every share of the labels."""
    fractions = fractions_of(summary)
    rows: dict[tuple[str, str, str, str], dict[float, Difference]] = {}
    for entry in summary.differences:
        key = (entry.name, entry.other, entry.protocol, entry.other_protocol)
        rows.setdefault(key, {})[entry.fraction] = entry
    shown = []
    for (name, other, protocol, other_protocol), found in rows.items():
        other = other if other_protocol == protocol else f"{other}, {MEANING[other_protocol]}"
        cells = [signed(found[fraction].estimate) if fraction in found else "" for fraction in fractions]
        shown.append(([name, f"less {other}", MEANING[protocol], *cells], ""))
    return Table(["encoder", "compared with", "protocol", *(share(fraction) for fraction in fractions)], shown, 3)


def encoder_table(summary: Summary, info: TaskInfo, normalisation: str) -> Table:
    """What the contenders are: size, cost, bands that the data set lacks, normalisation in use."""
    seconds = seconds_of(summary)
    rows = []
    for contender in summary.contenders:
        subject, cost = contender.subjects[0], seconds(contender)
        feed = feed_of(subject, info, normalisation)
        filled = ", ".join([*feed.absent, *feed.unknown])
        many = f", {len(contender.subjects)} draws" if len(contender.subjects) > 1 else ""
        rows.append(([
            contender.name, f"{subject.spec}{many}", f"{subject.parameters / 1e6:.2f}" if subject.parameters else "0",
            str(subject.width or 2 * len(info.bands)), str(subject.patch), "" if cost is None else f"{cost:.2g}",
            filled or "none", feed.normalisation, subject.digest[:12],
        ], ""))  # fmt: skip
    head = ["encoder", "what it is", "parameters, M", "features", "patch, px", "seconds per image", "bands filled with 0",
            "normalisation", "digest"]  # fmt: skip
    return Table(head, rows)


def findings(summary: Summary) -> list[str]:
    """For every protocol, with the fewest and with the most labels: the best encoder, and what it is above its baseline."""
    found = []
    for protocol in protocols_of(summary):
        fractions = fractions_of(summary)
        for fraction in dict.fromkeys((fractions[0], fractions[-1])):
            names = [c.name for c in summary.contenders if c.role is Role.ENCODER]
            cells = [cell for name in names if (cell := summary.cell(name, protocol, fraction)) and cell.estimate]
            if cells:
                best = max(cells, key=lambda cell: cell.estimate.mean if cell.estimate else 0.0)  # of equals the first
                own = (best.name, protocol, fraction)
                against = [d for d in summary.differences if (d.name, d.protocol, d.fraction) == own]
                found.append(_sentence(best, len(cells), against[:1]))
    return found


def failures(summary: Summary) -> list[str]:
    """Every reason with the points that have no score for it."""
    found: dict[str, list[str]] = {}
    for cell in summary.cells.values():
        for seed, reason in cell.failures.items():
            found.setdefault(reason, []).append(f"{cell.name}, {MEANING[cell.protocol]}, {share(cell.fraction)}, seed {seed}")
    return [f"{reason} ({len(points)}: {'; '.join(points[:4])}{'; ...' if len(points) > 4 else ''})"
            for reason, points in found.items()]  # fmt: skip


def fractions_of(summary: Summary) -> list[float]:
    return sorted({fraction for _, _, fraction in summary.cells})


def signed(estimate: Estimate) -> str:
    """A difference with its interval; a star where the interval does not hold 0."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:+.3f}"
    star = " *" if estimate.low > 0 or estimate.high < 0 else ""
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]{star}"


def _sentence(best: Cell, among: int, against: Sequence[Difference]) -> str:
    first = f" is the best of {among}," if among > 1 else ""
    start = f"{MEANING[best.protocol].capitalize()}, {share(best.fraction)} of labels: {best.name}{first} {best.estimate}"
    if not against:
        return f"{start}."
    e = against[0].estimate
    if e.low is None or e.high is None:
        return f"{start}; {signed(e)} against {against[0].other}."
    verdict = "above" if e.low > 0 else "below" if e.high < 0 else "not to be told apart from"
    return f"{start}: {verdict} {against[0].other}, difference {signed(e).removesuffix(' *')}."


def _score(cell: Cell | None) -> str:
    if cell is None:
        return ""
    lost = f", {len(cell.failures)} failed" if cell.failures else ""
    if not cell.results:
        return f"{len(cell.failures)} failed"
    return f"{cell.estimate or 'undefined'}, n = {cell.estimate.seeds if cell.estimate else 0}{lost}"


def _reasons(reasons: Iterable[str]) -> str:
    return "; ".join(sorted(reasons))[:300]


def _column(summary: Summary, fraction: float) -> str:
    images = [cell.train for (_, _, f), cell in summary.cells.items() if f == fraction and cell.train]
    return f"{share(fraction)}, {round(images[0]):,} images" if images else share(fraction)
