"""Runs the training loop in real worker processes joined by gloo, without Ray: what Ray Train does, without its start-up."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from groups import in_a_group

from mmearth_ray import config as configuration
from mmearth_ray.config import most_workers
from mmearth_ray.experiment import Experiment, open_experiment
from mmearth_ray.keys import Config
from mmearth_ray.storage import Location
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import Batch
from mmearth_ray.stream.source import Source
from mmearth_ray.train.loop import Worker, run


class Quiet:
    """A control that shows nothing and asks to stop after `last` steps, if given."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.seen = last, 0

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def tell(self, progress: dict[str, Any]) -> None:
        self.seen = progress["step"]

    def should_stop(self) -> bool:
        return self.last is not None and self.seen + 1 >= self.last

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)


def settings(shards: Location, run_directory: Path, *arguments: str) -> Config:
    """A configuration small enough for a test: atto on 32 px crops in 16 patches, no figure."""
    small = ["model.image_size=32", "train.global_batch=8", "train.steps=4", "figure.tiles=0", "model.decoder_width=32"]
    fixed = [f"data.shards={shards}", f"run.directory={run_directory}"]
    return configuration.load([*small, *fixed, *arguments])


def local_stream(source: Source, ranges: MicroBatches) -> Iterator[Batch]:
    return source.batches(ranges[i] for i in range(len(ranges)))


def train(shards: Location, run_directory: Path, *arguments: str, stop_after: int | None = None) -> Experiment:
    """Train with one worker per `train.workers`, each a process unless there is only one.  Returns the experiment."""
    config = settings(shards, run_directory, *arguments)
    run_directory.mkdir(parents=True, exist_ok=True)
    workers = most_workers(config)
    if workers == 1:
        experiment = open_experiment(config, shards)
        threads = torch.get_num_threads()
        run(experiment, Worker(0, 1, torch.device("cpu"), 1), local_stream, Quiet(stop_after))
        torch.set_num_threads(threads)
        return experiment
    in_a_group(workers, run_directory, train_as, config, shards, stop_after)
    return open_experiment(config, shards)


def train_as(rank: int, workers: int, config: Config, shards: Location, stop_after: int | None = None) -> None:
    """What each of the processes does."""
    worker = Worker(rank, workers, torch.device("cpu"), 1)
    run(open_experiment(config, shards), worker, local_stream, Quiet(stop_after))
