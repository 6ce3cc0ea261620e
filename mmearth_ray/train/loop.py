"""The training loop of one worker.  It knows neither Ray nor the engine's kind: both are handed in.

A step: take this worker's micro-batches from the stream, agree with the other workers on how many valid elements the
global batch holds, run forward and backward on each micro-batch, update, write down what happened.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmearth_ray.config import learning_rate_of, micro_batch_of
from mmearth_ray.errors import DataError
from mmearth_ray.experiment import Experiment, build_objective
from mmearth_ray.patience import note, take_noted
from mmearth_ray.stream.plan import MicroBatches
from mmearth_ray.stream.prepare import Batch
from mmearth_ray.stream.source import Source
from mmearth_ray.train import checkpoint
from mmearth_ray.train.checkpoint import State
from mmearth_ray.train.clock import Clock
from mmearth_ray.train.control import Control
from mmearth_ray.train.engine import Engine, first_said, send, to_device
from mmearth_ray.train.engines import build_engine
from mmearth_ray.train.evaluating import Evaluating
from mmearth_ray.train.handing import handed_out
from mmearth_ray.train.initial import load_initial
from mmearth_ray.train.journal import Journal, cut_back, ledger_path
from mmearth_ray.train.nonfinite import Guard
from mmearth_ray.train.outputs import clear_half_written, draw_reconstructions, export_model
from mmearth_ray.train.ownership import require_claim
from mmearth_ray.train.parts import Team, fill
from mmearth_ray.train.peak import Utilisation, peak_of
from mmearth_ray.train.saver import Kept, Saver
from mmearth_ray.train.schedule import learning_rate
from mmearth_ray.train.trackers import Metrics, remember_run
from mmearth_ray.train.window import Found, Sums, Window, fetch

# Batches are only ever read, so it does not matter that arrays from the object store cannot be written.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class Worker:
    """Which of the workers this is, and what it computes on."""

    rank: int
    workers: int
    device: torch.device
    threads: int


OpenStream = Callable[[Source, MicroBatches], Iterator[Batch]]


def run(experiment: Experiment, worker: Worker, open_stream: OpenStream, control: Control) -> None:
    """Train from the newest checkpoint (or the beginning) to the last step of this call, and write every output.

    Raises DataError if the data are damaged, the disk is full or a loss is not finite (see `train.nonfinite`).
    """
    torch.set_num_threads(worker.threads)
    config = experiment.config
    engine, state = _begin(experiment, worker)
    done = state.step
    _take_back(experiment, worker, done)
    ranges = MicroBatches(
        done + 1, experiment.last_step, global_batch=config.train.global_batch,
        workers=worker.workers, rank=worker.rank, micro_batch=micro_batch_of(config, worker.workers),
    )  # fmt: skip
    guard = Guard(experiment, engine, ranges, control.warn, state.skipped_steps, state.skipped_in_a_row)
    team = Team(worker.rank, worker.workers, partial(first_said, engine, worker.rank, worker.workers))
    with ExitStack() as files:
        saver = files.enter_context(Saver(experiment, guard, team, done))
        metrics = files.enter_context(Metrics(experiment, done, control.warn)) if worker.rank == 0 else None
        ledger = files.enter_context(Journal(ledger_path(experiment.run, worker.rank))) if config.train.ledger else None
        evaluating = files.enter_context(Evaluating(experiment, engine, team, done, control))
        journals = [journal for journal in (metrics, ledger, evaluating) if journal]
        stream = open_stream(experiment.source, ranges) if len(ranges) else iter(())
        clock, use = Clock.of(worker.device), _utilisation(experiment, worker)
        window, engine.forwarded = Window(clock), partial(clock.enter, "backward")
        for step in range(done + 1, experiment.last_step + 1):
            clock.enter("data_wait")
            with control.waiting():
                batches = [next(stream) for _ in range(ranges.per_step)]
            rate = _learning_rate(experiment, step)
            found = _step(engine, batches, worker, rate, clock, local=config.train.averaging == "local")
            window.add(found, {"step": step, "lr": rate})
            if ledger:
                ledger.write({"step": step, "world": worker.workers, "ids": [i for b in batches for i in b["id"].tolist()]})
            if not _is_due(experiment, step, worker.device):
                continue
            sums, stop, memory = fetch(window.found, engine, control.should_stop() if worker.rank == 0 else False)
            entries = window.entries(experiment, sums, memory, use)
            _judge(guard, saver, sums, entries, metrics)
            if experiment.held_out and (step % config.validate.every == 0 or step == experiment.steps):
                clock.enter("validation")
                entries[-1]["validation"] = validate(experiment, engine, worker, experiment.held_out)
                clock.enter("rest")
            evaluating.look(step, entries, clock)
            if metrics:
                for entry in entries:
                    metrics.write(entry)
                control.tell(entries[-1])
            last = stop or step == experiment.last_step
            _save(saver, step, clock, journals, due=last or step % config.checkpoint.every == 0)
            if config.figure.every and step % config.figure.every == 0 and not last:
                _draw(experiment, engine, worker, step, metrics, clock)
            if stop:
                break
            window = Window(clock)
        saver.settle(wait=True)
        _draw(experiment, engine, worker, saver.saved, metrics, clock)
        evaluating.finish(metrics)
    if worker.rank == 0:
        _export(experiment, saver.saved)


FETCH_EVERY = {"cpu": 1, "cuda": 10}  # a GPU that waits for the host after every step stands still in the meantime


def _is_due(experiment: Experiment, step: int, device: torch.device) -> bool:
    """Whether the metrics leave the device after this step: every few steps, and whenever they are needed."""
    config = experiment.config
    every = config.train.fetch_every or FETCH_EVERY[device.type]
    intervals = (every, config.checkpoint.every, config.validate.every, config.figure.every, config.eval.every)
    return step in (experiment.last_step, experiment.steps) or any(n and step % n == 0 for n in intervals)


def _step(engine: Engine, batches: list[Batch], worker: Worker, rate: float, clock: Clock, *, local: bool) -> Found:
    """One optimizer step over this worker's micro-batches; what it found stays on the device.

    Errors are divided by the valid elements of the global batch or, as published, by the micro-batch's own (`local`).
    A gradient that is not finite leaves the weights as they are.
    """
    clock.enter("rest")
    counts = [torch.from_numpy(batch["count"].sum(0)) for batch in batches]
    totals = engine.all_sum(torch.stack(counts).sum(0))
    share = 1.0 / (worker.workers * len(batches))
    errors = torch.zeros(len(totals), dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(batches, 1):
        clock.enter("to_device")
        tensors = to_device(batch, engine.device)
        clock.enter("forward")
        divisors = send(counts[number - 1] / share, engine.device) if local else totals
        errors += engine.backward(tensors, divisors, share, last=number == len(batches)).double()
    weighed_with = engine.log_variances()
    clock.enter("optimizer")
    applied = engine.step(rate)
    clock.enter("rest")
    tiles = sum(len(batch["id"]) for batch in batches) * worker.workers
    faults = sum(int(batch["faults"].sum()) for batch in batches) + take_noted()  # those of checkpoints and figures
    return Found(errors, totals, weighed_with, applied, tiles, faults)


def _judge(guard: Guard, saver: Saver, sums: list[Sums], entries: list[dict[str, Any]], metrics: Metrics | None) -> None:
    """Raise DataError where a step that is not finite ends the run; lines and checkpoint of those before it are kept."""
    lines, refused = guard.judge(sums, entries)
    if not refused:
        return
    for line in lines if metrics else ():
        metrics.write(line)  # pyright: ignore[reportOptionalMemberAccess]
    try:
        saver.settle(wait=True)
    except DataError as error:
        refused += f"; the checkpoint before it was not saved either ({error})"
    raise DataError(refused)


def validate(experiment: Experiment, engine: Engine, worker: Worker, held_out: Source) -> dict[str, Any]:
    """The loss on the first held-out tiles, each with a fixed crop and mask; every worker takes an equal part.

    Workers may hold parts of the model, so all make the same number of passes: one with less to do looks at a tile in vain.
    """
    tiles = min(held_out.samples, experiment.config.validate.tiles)
    first, last = (tiles * r // worker.workers for r in (worker.rank, worker.rank + 1))
    size = micro_batch_of(experiment.config, worker.workers)
    ranges = [(start, min(start + size, last)) for start in range(first, last, size)]
    most = -(-tiles // worker.workers)
    in_vain = [(0, 1)] * (-(-most // size) - len(ranges))
    targets = len(experiment.spec.targets)
    counts = torch.zeros(targets, dtype=torch.int64)
    errors = torch.zeros(targets, dtype=torch.float64, device=engine.device)
    faults = 0
    for number, batch in enumerate(held_out.batches([*ranges, *in_vain])):
        faults += int(batch["faults"].sum())
        mine = torch.from_numpy(batch["count"].sum(0))
        sums = engine.evaluate(to_device(batch, engine.device), mine.to(engine.device)).double()
        if number < len(ranges):
            counts += mine
            errors += sums
    applied = torch.ones((), dtype=torch.bool, device=engine.device)
    found = Found(errors, engine.all_sum(counts), engine.log_variances(), applied, tiles, faults)
    (sums,) = fetch([found], engine).steps
    return {**sums.report(experiment.spec), "storage_faults": sums.faults}


def _utilisation(experiment: Experiment, worker: Worker) -> Utilisation:
    """Of all workers' devices, by what rank 0, which writes it down, knows of its own."""
    log, precision = experiment.config.log, experiment.config.train.precision
    return Utilisation(
        experiment, peak_of(worker.device, precision, log.peak_tflops) if worker.rank == 0 else None, worker.workers
    )


def _learning_rate(experiment: Experiment, step: int) -> float:
    schedule = experiment.config.schedule
    return learning_rate(
        step, steps=experiment.steps, peak=learning_rate_of(experiment.config),
        minimum=schedule.min_lr, warmup_fraction=schedule.warmup_fraction,
    )  # fmt: skip


def _begin(experiment: Experiment, worker: Worker) -> tuple[Engine, State]:
    """The engine around the newest checkpoint, or around the weights to start from, and what is done."""
    require_claim(experiment)
    config = experiment.config
    folder = checkpoint.directory_of(config)
    with handed_out(folder, worker.rank, worker.workers, worker.device) as (state, weights, moments):
        module = build_objective(experiment, initial=state is None)
        if state:
            fill(module, weights)
        elif config.model.init:
            load_initial(module, Path(config.model.init))
        engine = build_engine(module, config, worker.device, worker.workers)
        if state:
            engine.restore(moments)
    return engine, state or State(0, 0, {}, {}, {})


def _take_back(experiment: Experiment, worker: Worker, done: int) -> None:
    """Drop what an earlier start wrote after the restored step; no worker goes on before."""
    if worker.rank == 0:
        remember_run(experiment)
        cut_back(experiment.run, done)
        clear_half_written(experiment.run)
        checkpoint.clear_incoming(checkpoint.directory_of(experiment.config))
    _barrier()


def _save(saver: Saver, step: int, clock: Clock, journals: Sequence[Kept], *, due: bool) -> None:
    """Commit the checkpoint that is on its way, if it has arrived, and begin this step's where it is due."""
    if due or saver.begun:
        clock.enter("checkpoint")
        saver.settle()
        if due:
            saver.begin(step, journals)
        clock.enter("rest")


def _draw(experiment: Experiment, engine: Engine, worker: Worker, step: int, metrics: Metrics | None, clock: Clock) -> None:
    """Draw what the model makes of the first held-out (or training) tiles.  All workers compute it, rank 0 keeps it."""
    if not experiment.config.figure.tiles:
        return
    clock.enter("figure")
    source = experiment.held_out or replace(experiment.source, turns=())
    batch = next(source.batches([(0, min(experiment.config.figure.tiles, source.samples))]))
    note(int(batch["faults"].sum()))
    shown = engine.reconstruct(to_device(batch, engine.device))
    if metrics:
        metrics.figure(draw_reconstructions(experiment, batch, shown, step), step)
    clock.enter("rest")


def _export(experiment: Experiment, step: int) -> None:
    """Export the model of a checkpoint.  Rank 0 alone does, and nobody waits for it: a store may take longer than a collective
    operation is given."""
    last = checkpoint.checkpoint_path(checkpoint.directory_of(experiment.config), step)
    with checkpoint.opened(last, moments=False) as (weights, _):
        export_model(experiment, weights, step)


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
