"""Pretrain an encoder: python -m mmearth_ray.pretrain [CONFIG.yaml] key=value ...

Reads the settings, resolves them against the data set, checks that a run directory that is already there belongs to the
same run, and hands the experiment to the workers.  Running the same command again resumes.
"""

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mmearth_ray import config as configuration
from mmearth_ray import settings
from mmearth_ray.config import sizes_of, worker_counts
from mmearth_ray.errors import DataError, UsageError, run_command
from mmearth_ray.experiment import Experiment, check_resume, open_experiment, versions
from mmearth_ray.files import atomic_text, locked
from mmearth_ray.keys import EMBEDDED, Config
from mmearth_ray.patience import take_noted
from mmearth_ray.progress import counted
from mmearth_ray.storage import Location, is_remote, locate
from mmearth_ray.train import checkpoint
from mmearth_ray.train.evaluating import check_evaluation
from mmearth_ray.train.initial import check_initial
from mmearth_ray.train.outputs import outputs_are_of
from mmearth_ray.train.ownership import RUN, check_owner, claim, run_id

EMBEDDED_DIRECTORY = Path("data/embedded")

USAGE = """Pretrain a ConvNeXt V2 encoder with MP-MAE.

usage: python -m mmearth_ray.pretrain [CONFIG.yaml ...] [key=value ...]

key=value wins over files, a later file over an earlier one.  The same command again resumes from the newest checkpoint in
run.directory.
Exit codes: 0 done (or saved and stopped), 1 bad data, 2 a wrong command or setting.

"""


def main(arguments: list[str]) -> int:
    """The command.  Returns the exit code; raises UsageError and DataError for the caller to report."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE + settings.help_text(Config))
        return 0
    config = configuration.load(arguments)
    check_stays(config)
    check_no_file(config)
    shards = shards_of(config)
    check_hang_timeout(config, shards)
    experiment = open_experiment(config, *shards)
    folder, run = checkpoint.directory_of(experiment.config), run_id(experiment.config)
    check_owner(folder, run)
    found = checkpoint.newest(folder)
    if found:
        state = checkpoint.load_state(found)
        check_resume(experiment, state.settings, state.identity, experiment.run)
        if state.step >= experiment.last_step and outputs_are_of(experiment.run, state.step):
            print(f"{experiment.run} is already at step {state.step:,}: nothing left to do")
            report(experiment, stopped=False)
            return 0
    else:
        check_initial(experiment)
    with locked(experiment.run, "is training in", "run.directory"):
        evaluated = check_evaluation(experiment)
        from mmearth_ray.train.launch import launch, start_ray  # Ray takes seconds to import; errors above need not wait

        start_ray(experiment.config)
        describe(experiment, run)
        if evaluated:
            print(f"  {evaluated}")
        if found:
            print(f"resuming {experiment.run} after {found.name}")
        claimed = replace(experiment, claim=claim(folder, run, str(experiment.run)))
        if failed := take_noted():
            print(f"requests to a store that failed so far and were asked again: {failed:,}")
        stopped = launch(claimed)
    report(experiment, stopped)
    return 0


JOB_COPIES = "runtime_resources"
"""Where Ray unpacks the working directory of a submitted job, below its own temporary directory, to remove it afterwards."""


def check_stays(config: Config) -> None:
    """Raise UsageError if the run would be written to a copy of a directory that Ray throws away."""
    for name, given in _kept(config).items():
        if not Path(given).expanduser().is_absolute() and JOB_COPIES in Path.cwd().parts:
            raise UsageError(f"{name}={given} is relative to a copy of the working directory that Ray removes after the job; "
                             "give an absolute path, on storage that all machines share")  # fmt: skip


def check_no_file(config: Config) -> None:
    """Raise UsageError if there is a file where the run is to have a directory."""
    for name, given in _kept(config).items():
        place = Path(given).expanduser()
        with suppress(OSError):  # of what may not be looked at there is more to say later
            if files := [path for path in (place, *place.parents) if path.is_file()]:
                raise UsageError(f"{name}={given}: {files[0]} is a file; name a directory")


def _kept(config: Config) -> dict[str, str]:
    """Local directories that the run writes, by their keys."""
    kept = {"run.directory": config.run.directory, "checkpoint.directory": config.checkpoint.directory}
    return {name: given for name, given in kept.items() if given and "://" not in given}


STORE_SECONDS = 150.0
"""The least `train.hang_timeout` with a store: one that stays away is given up before (see `Patience`)."""


def check_hang_timeout(config: Config, shards: list[Location]) -> None:
    """Raise UsageError if workers that wait for a store would be taken for hung."""
    kept = config.checkpoint.directory
    places = [*shards, *([locate(kept, "checkpoint.directory")] if kept else [])]
    remote = next((place for place in places if is_remote(place)), None)
    if remote and config.train.hang_timeout < STORE_SECONDS:
        raise UsageError(f"train.hang_timeout={config.train.hang_timeout:g}: workers may wait longer for {remote}; use at "
                         f"least {STORE_SECONDS:g}, or a local directory")  # fmt: skip


def shards_of(config: Config) -> list[Location]:
    """Where the data sets are; the embedded one is made on first use."""
    return [_embedded() if text == EMBEDDED else locate(text, "data.shards") for text in config.data.shards]


def _embedded() -> Path:
    from mmearth_ray.shards.manifest import MANIFEST
    from mmearth_ray.shards.synthesise import SynthesiseOptions, synthesise

    if not (EMBEDDED_DIRECTORY / MANIFEST).exists():
        print(f"making the embedded data set in {EMBEDDED_DIRECTORY}")
        synthesise(EMBEDDED_DIRECTORY, SynthesiseOptions())
    return EMBEDDED_DIRECTORY


def describe(experiment: Experiment, run: str) -> None:
    """Write down what the run of that id is, in `config.yaml` and `run.json`, and say it."""
    atomic_text(experiment.run / "config.yaml", settings.to_yaml(experiment.config))
    facts = {"run": run, "versions": versions(), "identity": experiment.identity, "data_set": experiment.source.name}
    atomic_text(experiment.run / RUN, json.dumps(facts, indent=1) + "\n")
    held_out = f"{min(experiment.held_out.samples, experiment.config.validate.tiles):,}" if experiment.held_out else "none"
    model, train = experiment.config.model, experiment.config.train
    counts = worker_counts(experiment.config)
    workers = f"{counts[0]} to {counted(counts[-1], 'worker')}" if len(counts) > 1 else counted(counts[0], "worker")
    crops = " and ".join(f"{size} px in patches of {patch}" for size, patch in dict.fromkeys(sizes_of(model)))
    print(
        f"{experiment.run}: {model.size}, {crops}, "
        f"{len(experiment.spec.targets)} targets; {experiment.source.samples:,} tiles to train on, {held_out} held out; "
        f"{experiment.steps:,} steps of {train.global_batch} tiles on {workers}"
    )


def report(experiment: Experiment, stopped: bool) -> None:
    """Say what the run left behind."""
    folder = checkpoint.directory_of(experiment.config)
    newest = checkpoint.newest(folder)
    if newest is None and stopped:
        print("stopped before the first checkpoint; the same command starts again")
        return
    if newest is None:
        raise DataError(f"training ended without a checkpoint in {folder}; is it on storage that all workers share?")
    state = checkpoint.load_state(newest)
    step = state.step
    on = "; the same command resumes" if stopped else "; without train.stop_at the same command goes on"
    print(f"{'stopped' if stopped else 'done'}: step {step:,} of {experiment.steps:,}{on if step < experiment.steps else ''}")
    if state.skipped_steps:
        print(f"  left out    {counted(state.skipped_steps, 'step')}, not finite: see 'skipped' in metrics.jsonl")
    print(f"  checkpoint  {newest}")
    print(f"  encoder     {experiment.run / 'exported' / 'encoder.safetensors'}")
    figures = sorted((experiment.run / "figures").glob("*.png"))
    if figures:
        print(f"  figure      {figures[-1]}")


def entry() -> int:
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(entry())
