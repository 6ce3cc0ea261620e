"""The training loop of one worker.  It knows neither Ray nor the engine's kind: both are handed in.

A step: take this worker's micro-batches from the stream, agree with the other workers on how many valid elements the
global batch holds, run forward and backward on each micro-batch, update, write down what happened.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmearth_ray.checkpoints.folder import read_tensors
from mmearth_ray.config import learning_rate_of, micro_batch_of
from mmearth_ray.errors import DataError
from mmearth_ray.experiment import Experiment, build_objective, fixed_settings, versions
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import Batch, elements
from mmearth_ray.stream.source import Source
from mmearth_ray.train import checkpoint
from mmearth_ray.train.engine import ENGINES, DDPEngine
from mmearth_ray.train.initial import load_initial
from mmearth_ray.train.journal import METRICS, Journal, cut_back, ledger_path
from mmearth_ray.train.outputs import description_of, draw_reconstructions, export_model
from mmearth_ray.train.schedule import learning_rate

# Batches are only ever read, so it does not matter that arrays from the object store cannot be written.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class Worker:
    """Which of the workers this is, and what it computes on."""

    rank: int
    workers: int
    device: torch.device
    threads: int


class Control(Protocol):
    """The line to whoever started the run."""

    def tell(self, progress: dict[str, Any]) -> None:
        """Show the latest progress.  Called by rank 0 after every step; must not block."""

    def should_stop(self) -> bool:
        """Whether to save and end after the present step.  Only rank 0's answer counts."""
        ...


OpenStream = Callable[[Source, MicroBatches], Iterator[Batch]]


@dataclass(frozen=True)
class Sums:
    """What a step (or a validation) found, over the whole global batch: errors and valid elements per target (T,), the
    weighted loss before the update, and how many tiles."""

    errors: Tensor
    counts: Tensor
    loss: float
    tiles: int
    applied: bool = True

    @classmethod
    def over_workers(cls, errors: Tensor, counts: Tensor, tiles: int, engine: DDPEngine) -> "Sums":
        """Weigh the errors (summed over this worker's batches) and the counts (of all workers) with the present weights."""
        errors = _all_sum(errors, engine.device)
        objective = engine.module
        with torch.no_grad():
            parts = errors.float().to(engine.device), counts.to(engine.device)
            return cls(errors, counts, float(objective.weigh(*parts, 1.0, objective.log_variances)), tiles)

    def report(self, experiment: Experiment) -> dict[str, Any]:
        """Losses (null where nothing was valid), coverage and the weighted loss, as they are logged."""
        possible = elements(experiment.spec) * self.tiles
        names = [m.name for m in experiment.spec.targets]
        found = zip(names, self.errors.tolist(), self.counts.tolist(), possible.tolist(), strict=True)
        rows = [(name, error / count if count else None, count / most) for name, error, count, most in found]
        return {
            "loss": self.loss,
            "losses": {name: loss for name, loss, _ in rows},
            "coverage": {name: coverage for name, _, coverage in rows},
        }


def run(experiment: Experiment, worker: Worker, open_stream: OpenStream, control: Control) -> None:
    """Train from the newest checkpoint (or the beginning) to the last step of this call, and write every output.

    Raises DataError if the data are damaged, the disk is full or the loss is no longer finite.
    """
    torch.set_num_threads(worker.threads)
    config = experiment.config
    engine = ENGINES[config.train.engine](build_objective(experiment), config.optimizer, worker.device)
    done = _restore(experiment, engine)
    if _all_sum(torch.tensor([done]), engine.device).item() != done * worker.workers:
        raise RuntimeError(f"workers found different newest checkpoints in {experiment.run} (this one step {done})")
    if worker.rank == 0:
        cut_back(experiment.run, done)
        checkpoint.clear_incoming(experiment.run)
    _barrier()
    ranges = MicroBatches(
        done + 1, experiment.last_step, global_batch=config.train.global_batch,
        workers=worker.workers, rank=worker.rank, micro_batch=micro_batch_of(config),
    )  # fmt: skip
    with ExitStack() as files:
        metrics = files.enter_context(Journal(experiment.run / METRICS)) if worker.rank == 0 else None
        ledger = files.enter_context(Journal(ledger_path(experiment.run, worker.rank))) if config.train.ledger else None
        stream = open_stream(experiment.source, ranges) if len(ranges) else iter(())
        saved, stop = done, False
        for step in range(done + 1, experiment.last_step + 1):
            begin = time.perf_counter()
            batches = [next(stream) for _ in range(ranges.per_step)]
            wait = time.perf_counter() - begin
            rate = _learning_rate(experiment, step)
            wanted = control.should_stop() if worker.rank == 0 else False
            sums, stop = _step(engine, batches, worker, rate, stop=wanted, local=config.train.averaging == "local")
            if not sums.applied:
                raise DataError(_not_finite(experiment, step, sums))
            took = time.perf_counter() - begin
            speed = {"lr": rate, "tiles_per_second": sums.tiles / took, "data_wait": wait / took}
            entry = {"step": step, **sums.report(experiment), **speed}
            if ledger:
                ledger.write({"step": step, "world": worker.workers, "ids": [i for b in batches for i in b["id"].tolist()]})
            if experiment.held_out and (step % config.validate.every == 0 or step == experiment.steps):
                entry["validation"] = validate(experiment, engine, worker, experiment.held_out)
            if metrics:
                metrics.write(entry)
                control.tell(entry)
            last = stop or step == experiment.last_step
            if last or step % config.checkpoint.every == 0:
                _save(experiment, engine, worker, step, [f for f in (metrics, ledger) if f])
                saved = step
            if config.figure.every and step % config.figure.every == 0 and not last:
                _draw(experiment, engine, worker, step)
            if stop:
                break
    _draw(experiment, engine, worker, saved)
    if worker.rank == 0:
        export_model(experiment, engine.weights(), saved)
    _barrier()


def _step(
    engine: DDPEngine, batches: list[Batch], worker: Worker, rate: float, *, stop: bool, local: bool
) -> tuple[Sums, bool]:
    """One optimizer step over this worker's micro-batches.  Returns the global sums, and whether any worker wants to stop.

    Errors are divided by the valid elements of the global batch or, as published, by the micro-batch's own (`local`).
    A loss or a gradient that is not finite leaves the weights as they are.
    """
    counts = torch.from_numpy(np.sum([batch["count"].sum(0) for batch in batches], axis=0))
    agreed = _all_sum(torch.cat([counts, torch.tensor([int(stop)])]), engine.device)
    totals, stop = agreed[:-1], bool(agreed[-1])
    share = 1.0 / (worker.workers * len(batches))
    errors = torch.zeros(len(totals), dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(batches, 1):
        tensors = to_device(batch, engine.device)
        divisors = torch.from_numpy(batch["count"].sum(0)) / share if local else totals
        errors += engine.backward(tensors, divisors.to(engine.device), share, last=number == len(batches)).double()
    tiles = sum(len(batch["id"]) for batch in batches) * worker.workers
    sums = Sums.over_workers(errors, totals, tiles, engine)
    if not np.isfinite(sums.loss) or not engine.gradients_are_finite():
        return replace(sums, applied=False), stop
    engine.step(rate)
    return sums, stop


def _not_finite(experiment: Experiment, step: int, sums: Sums) -> str:
    names = [m.name for m, e in zip(experiment.spec.targets, sums.errors.tolist(), strict=True) if not np.isfinite(e)]
    return (
        f"the loss of step {step} is not finite ({', '.join(names) or 'its gradient'}); nothing was saved after the last "
        "checkpoint; use a lower optimizer.base_lr in a new run, or check the data with `shards verify`"
    )


def validate(experiment: Experiment, engine: DDPEngine, worker: Worker, held_out: Source) -> dict[str, Any]:
    """The loss on the first held-out tiles, each with a fixed crop and mask; every worker takes an equal part."""
    tiles = min(held_out.samples, experiment.config.validate.tiles)
    first, last = (tiles * r // worker.workers for r in (worker.rank, worker.rank + 1))
    size = micro_batch_of(experiment.config)
    ranges = [(start, min(start + size, last)) for start in range(first, last, size)]
    targets = len(experiment.spec.targets)
    counts, errors = torch.zeros(targets, dtype=torch.int64), torch.zeros(targets, dtype=torch.float64)
    with torch.no_grad():
        for batch in held_out.batches(ranges):
            mine = torch.from_numpy(batch["count"].sum(0))
            _, sums = engine.module(to_device(batch, engine.device), mine.to(engine.device), 1.0)
            counts, errors = counts + mine, errors + sums.double().cpu()
    return Sums.over_workers(errors, _all_sum(counts, engine.device), tiles, engine).report(experiment)


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch's numeric arrays as tensors, in their native types."""
    arrays = {name: array for name, array in batch.items() if array.dtype.kind in "buif"}
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def _learning_rate(experiment: Experiment, step: int) -> float:
    schedule = experiment.config.schedule
    return learning_rate(
        step, steps=experiment.steps, peak=learning_rate_of(experiment.config),
        minimum=schedule.min_lr, warmup_fraction=schedule.warmup_fraction,
    )  # fmt: skip


def _restore(experiment: Experiment, engine: DDPEngine) -> int:
    """Load the newest checkpoint, or the weights to start from.  Returns the steps that are done."""
    found = checkpoint.newest(experiment.run)
    if found:
        weights, moments = (read_tensors(found / f"{part}.safetensors") for part in ("model", "optimizer"))
        engine.restore(weights, moments)
        return checkpoint.load_state(found).step
    if experiment.config.model.init:
        load_initial(engine.module, Path(experiment.config.model.init))
    return 0


def _save(experiment: Experiment, engine: DDPEngine, worker: Worker, step: int, journals: list[Journal]) -> None:
    """Make the journals safe on every worker, then let rank 0 commit a checkpoint."""
    for journal in journals:
        journal.flush()
    _barrier()
    if worker.rank == 0:
        state = checkpoint.State(
            step=step, position=step * experiment.config.train.global_batch,
            settings=fixed_settings(experiment.config), identity=experiment.identity, versions=versions(),
            description=description_of(experiment, step).to_json(),
        )  # fmt: skip
        checkpoint.save(experiment.run, state, engine.weights(), engine.moments(), experiment.config.checkpoint.keep)
    _barrier()


def _draw(experiment: Experiment, engine: DDPEngine, worker: Worker, step: int) -> None:
    """Rank 0 draws what the model makes of the first held-out (or training) tiles."""
    if worker.rank == 0 and experiment.config.figure.tiles:
        source = experiment.held_out or experiment.source
        batch = next(source.batches([(0, min(experiment.config.figure.tiles, source.samples))]))
        draw_reconstructions(experiment, engine.module, batch, to_device(batch, engine.device), step)


def _all_sum(values: Tensor, device: torch.device) -> Tensor:
    """The sum over workers, on the CPU."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values.cpu()
    held = values.to(device)
    dist.all_reduce(held)
    return held.cpu()


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
