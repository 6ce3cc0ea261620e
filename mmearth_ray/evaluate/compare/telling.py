"""The whole of a comparison's report: what its figures, tables and notes say, ready to be laid out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmearth_ray.evaluate.compare import tables
from mmearth_ray.evaluate.compare.contenders import Role
from mmearth_ray.evaluate.compare.panels import SHOWN, curves, share, sizes
from mmearth_ray.evaluate.compare.summary import Summary
from mmearth_ray.evaluate.datasets.task import Task
from mmearth_ray.evaluate.protocols.metrics import primary
from mmearth_ray.evaluate.protocols.names import MEANING
from mmearth_ray.report.efficiency import Efficiency

MOST_ABSENT = 8  # classes named in a note


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """With what a comparison was computed: the command as it was typed, settings and versions."""

    command: str
    settings: Mapping[str, Sequence[str]]
    versions: Mapping[str, str]
    normalisation: str
    supervised: bool


def tell(summary: Summary, task: Task, about: Circumstances) -> Efficiency:
    """Everything that the report of a comparison says."""
    info, metric = task.info, primary(task.info.goal)
    scored = sum(len(cell.results) for cell in summary.cells.values())
    lost = sum(len(cell.failures) for cell in summary.cells.values())
    images = ", ".join(f"{name} {count:,}" for name, count in info.counts.items())
    lead = (
        f"{info.name}: {info.goal}, {len(info.classes)} classes, {len(info.bands)} bands, {info.height} x {info.width} px, "
        f"{images} images. {scored} points scored" + (f", {lost} failed." if lost else ".")
    )
    return Efficiency(
        title=f"Label efficiency on {info.name}", lead=lead, command=about.command, settings=about.settings,
        findings=tables.findings(summary), curves=curves(summary, metric), sizes=sizes(summary, metric),
        scores=tables.score_table(summary), differences=tables.difference_table(summary),
        encoders=tables.encoder_table(summary, info, about.normalisation), failures=tables.failures(summary),
        notes=[*reading(metric, about, bool(info.folds)), *absences(summary), *unfinished(summary), *info.notes],
        machine=machine(summary, about),
    )  # fmt: skip


def reading(metric: str, about: Circumstances, folds: bool) -> list[str]:
    """How numbers and intervals came about."""
    notes = [
        f"Scores are {SHOWN[metric]} over the whole test split" + (", all folds together." if folds else "."),
        "Intervals hold 95 %: Student's t over seeds (other labelled images, other initial weights) and a bootstrap over test "
        "images, half widths added in squares. n is the number of seeds; where a result does not depend on the seed n is 1, "
        "and the interval is that of the bootstrap alone.",
        "Subsets of the labels are nested, and stratified by class or value where an image has one: of one seed, 1 % is part "
        "of 5 %, and every encoder has the same images. The validation split, which chooses regularisation, rate and step, is "
        "not cut.",
        "Differences are paired: the same seeds, the same resamples of the same test images. A star marks those whose interval "
        "does not hold 0. Many are compared: of twenty true zeros one has a star.",
        "random: the same structure with fresh weights for every seed, frozen. supervised: those weights trained on the labels "
        "alone, from scratch. band statistics: mean and standard deviation of every band. Where supervised and band "
        "statistics do not know a protocol, their lines are those of fine-tuning and of logistic regression.",
    ]
    if not about.supervised:
        notes.append("The supervised baseline from scratch was left out (supervised=false).")
    return notes


def absences(summary: Summary) -> list[str]:
    """Classes that no labelled image of a subset has, by fraction: nothing can predict them there, and they count as errors."""
    found: dict[float, set[str]] = {}
    for (_, _, fraction), cell in summary.cells.items():
        found.setdefault(fraction, set()).update(name for result in cell.results.values() for name in result.absent)
    return [
        f"With {share(fraction)} of the labels, in at least one subset no image has a label of: {_named(names)}. Such classes "
        "are never predicted, and their test images count as errors."
        for fraction, names in sorted(found.items())
        if names
    ]


def unfinished(summary: Summary) -> list[str]:
    """Protocols with trainings that were best on validation at their last step, or fits that did not converge."""
    notes = []
    for protocol in dict.fromkeys(cell.protocol for cell in summary.cells.values()):
        results = [result for cell in summary.cells.values() if cell.protocol == protocol for result in cell.results.values()]
        late, stopped = sum(_was_late(r.chosen) for r in results), sum(False in _each(r.chosen, "converged") for r in results)
        what = f"{MEANING[protocol].capitalize()}:"
        if late:
            notes.append(
                f"{what} {late} of {len(results)} points were best on validation at the last step, and may gain by more."
            )
        if stopped:
            notes.append(f"{what} {stopped} of {len(results)} points have a fit that ended before it converged.")
    return notes


def _was_late(chosen: Mapping[str, Any]) -> bool:
    """Whether the best step of a training, in some fold, was the last; a published recipe always ends there."""
    best, steps = _each(chosen, "best_step"), _each(chosen, "steps")
    folds = max(len(best), len(steps))
    best, steps = (each * folds if len(each) == 1 else each for each in (best, steps))
    return chosen.get("recipe") == "converged" and any(b == s for b, s in zip(best, steps, strict=True))


def _each(chosen: Mapping[str, Any], name: str) -> list[Any]:
    """Of every fold; one value where all agree, none where nothing is said."""
    value = chosen.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def _named(names: set[str]) -> str:
    more = len(names) - MOST_ABSENT
    return ", ".join(sorted(names)[:MOST_ABSENT]) + (f" and {more} more" if more > 0 else "")


def machine(summary: Summary, about: Circumstances) -> dict[str, list[str]]:
    """Versions, and the machines that points were computed on."""
    results = [result for cell in summary.cells.values() for result in cell.results.values()]
    found = {
        name: list(dict.fromkeys(str(result.machine[name]) for result in results if name in result.machine))
        for name in ("processor", "device", "threads", "versions")
    }
    fit = sum(result.seconds_fit for result in results)
    encoders = [c.name for c in summary.contenders if c.role is Role.ENCODER]
    return {
        **{name: values for name, values in found.items() if values},
        "fitting": [f"{fit:,.0f} s for {len(results)} points of {len(encoders)} encoders and their baselines"],
        **{name: [value] for name, value in about.versions.items()},
    }
