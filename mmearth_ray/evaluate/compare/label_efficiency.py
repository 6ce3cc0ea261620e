"""Label efficiency: every encoder with every share of the labels, under every protocol, several times, and one report.

    OUT/points/*.json, *.npz   a file for each point, and what it predicted (see `points`)
    OUT/run.json               what the points have in common (see `ledger`)
    OUT/results.csv            a row for every metric of every point
    OUT/report.html            curves, tables, differences, failures: one file that needs no other

The same command goes on where it was stopped, and computes nothing twice.
"""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.compare.comparison import complete, room_of, say
from mmearth_ray.evaluate.compare.contenders import Role, contenders_of, open_all
from mmearth_ray.evaluate.compare.ledger import Ledger, encoders_of
from mmearth_ray.evaluate.compare.options import LabelEfficiencyOptions
from mmearth_ray.evaluate.compare.planning import Planned, fixed_of, open_dataset, plan, require_each_once
from mmearth_ray.evaluate.compare.points import Store
from mmearth_ray.evaluate.compare.rows import to_csv
from mmearth_ray.evaluate.compare.score import outcome_of
from mmearth_ray.evaluate.compare.summary import summarise
from mmearth_ray.evaluate.compare.telling import Circumstances, tell
from mmearth_ray.evaluate.datasets.task import Task
from mmearth_ray.evaluate.features.feeding import feed_of
from mmearth_ray.evaluate.protocols.splits import rounds
from mmearth_ray.experiment import versions
from mmearth_ray.files import atomic_text, locked
from mmearth_ray.progress import counted
from mmearth_ray.report.efficiency import page
from mmearth_ray.settings import flatten

RESULTS, REPORT = "results.csv", "report.html"


def run(options: LabelEfficiencyOptions) -> int:
    """Compute what is not done yet, and write table and report.

    Raises UsageError for settings that cannot work or differ from those of `out`, DataError for bad data, and at the end if
    points have no score.
    """
    task = open_dataset(options.dataset)
    for name in ("fractions", "protocols"):
        require_each_once(name, getattr(options, name))
    subjects = open_all(options.encoders, options.names)
    contenders = contenders_of(subjects, options.protocols, options.seeds, options.normalisation, supervised=options.supervised)
    for contender in contenders:
        feed_of(contender.subjects[0], task.info, options.normalisation)
    rounds(task)
    fixed, room = fixed_of(options, task), room_of(options, task)
    planned = plan(contenders, options.fractions, options.seeds, task, fixed)
    out, command = Path(options.out).expanduser(), command_of(options)
    growing = {"fractions": options.fractions, "seeds": list(range(options.seeds)), "protocols": options.protocols,
               "baselines": list(dict.fromkeys(c.role for c in contenders if c.role is not Role.ENCODER))}  # fmt: skip
    about = {"command": command, "versions": versions(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    settings = {name: [shown(value)] for name, value in flatten(options).items()}
    circumstances = Circumstances(command=command, settings=settings, versions=versions(), normalisation=options.normalisation,
                                  supervised=any(c.role is Role.SUPERVISED for c in contenders))  # fmt: skip
    store = Store(out)
    with locked(out, "is comparing encoders in", "out"):
        Ledger(fixed=fixed, growing=growing, encoders=encoders_of(subjects)).keep(out, about)
        failed = complete([entry.point for entry in planned], task, store, room, say)
        report = write_results(planned, task, store, out, circumstances)
    print(f"report written to {report}")
    if failed:
        raise DataError(f"{failed} of {counted(len(planned), 'point')} failed, see {report}; the same command tries them again")
    return 0


def write_results(planned: Sequence[Planned], task: Task, store: Store, out: Path, circumstances: Circumstances) -> Path:
    """Write table and report of what is done of a plan; returns the report's path."""
    atomic_text(out / RESULTS, to_csv(planned, task.info, store.read, store.failure))
    resamples = int(planned[0].point.fixed["bootstrap"])
    read = lambda point: outcome_of(store.arrays(point), task.info)  # noqa: E731
    summary = summarise(planned, task.info.goal, resamples, store.read, read, store.failure)
    atomic_text(out / REPORT, page(tell(summary, task, circumstances)))
    return out / REPORT


def command_of(options: LabelEfficiencyOptions) -> str:
    """The command that does the same: every setting that is not the default."""
    usual = flatten(LabelEfficiencyOptions())
    keys = [f"{name}={shown(value)}" for name, value in flatten(options).items() if value != usual[name]]
    return shlex.join(["python", "-m", "mmearth_ray.evaluate", "label-efficiency", *keys])


def shown(value: Any) -> str:
    """A setting as it is typed."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
