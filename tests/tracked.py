"""Runs whose trackers are looked at: lines of the metrics without any training."""

from pathlib import Path
from typing import Any

from processes import Quiet, settings

from mmearth_ray.experiment import Experiment, open_experiment
from mmearth_ray.train.journal import cut_back
from mmearth_ray.train.trackers import Metrics, remember_run


def opened(shards: Path, run: Path, *arguments: str) -> Experiment:
    run.mkdir(exist_ok=True)
    return open_experiment(settings(shards, run, *arguments), shards)


def entry(step: int, start: int = 1) -> dict[str, Any]:
    """A line of the metrics, of the run's first, second, ... start."""
    return {"step": step, "loss": step + 0.25, "losses": {"a": step * 2.0, "b": None}, "seconds": {"rest": 0.5}, "start": start}


def write(experiment: Experiment, done: int, steps: range, start: int = 1) -> None:
    """What rank 0 does: from the restored step on, so many steps, and then the end by whatever reason."""
    remember_run(experiment)
    cut_back(experiment.run, done)
    with Metrics(experiment, done, Quiet().warn) as lines:
        for step in steps:
            lines.write(entry(step, start))
