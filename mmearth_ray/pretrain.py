"""Pretrain an encoder: python -m mmearth_ray.pretrain [CONFIG.yaml] key=value ...

Reads the settings, resolves them against the data set, checks that a run directory that is already there belongs to the
same run, and hands the experiment to the workers.  Running the same command again resumes.
"""

import json
import sys
from pathlib import Path

from mmearth_ray import config as configuration
from mmearth_ray import settings
from mmearth_ray.config import EMBEDDED, Config
from mmearth_ray.errors import DataError, run_command
from mmearth_ray.experiment import Experiment, check_resume, open_experiment, versions
from mmearth_ray.shards.write import atomic_text, write_failure
from mmearth_ray.train import checkpoint

EMBEDDED_DIRECTORY = Path("data/embedded")

USAGE = """Pretrain a ConvNeXt V2 encoder with MP-MAE.

usage: python -m mmearth_ray.pretrain [CONFIG.yaml ...] [key=value ...]

Later settings win over earlier ones.  The same command again resumes from the newest checkpoint in run.directory.
Exit codes: 0 done (or saved and stopped), 1 bad data, 2 a wrong command or setting.

"""


def main(arguments: list[str]) -> int:
    """The command.  Returns the exit code; raises UsageError and DataError for the caller to report."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE + settings.help_text(Config))
        return 0
    config = configuration.load(arguments)
    experiment = open_experiment(config, shards_of(config))
    found = checkpoint.newest(experiment.run)
    if found:
        state = checkpoint.load_state(found)
        check_resume(experiment, state.settings, state.identity, experiment.run)
        if state.step >= experiment.last_step and (experiment.run / "exported").exists():
            print(f"{experiment.run} is already at step {state.step:,}: nothing left to do")
            report(experiment, stopped=False)
            return 0
        print(f"resuming {experiment.run} after step {state.step:,}")
    describe(experiment)

    from mmearth_ray.train.launch import launch  # Ray takes seconds to import; errors above come without the wait

    outcome = launch(experiment)
    report(experiment, outcome.stopped)
    return 0


def shards_of(config: Config) -> Path:
    """The directory of the data set; the embedded one is made on first use."""
    if config.data.shards != EMBEDDED:
        return Path(config.data.shards)
    from mmearth_ray.shards.manifest import MANIFEST
    from mmearth_ray.shards.synthesise import SynthesiseOptions, synthesise

    if not (EMBEDDED_DIRECTORY / MANIFEST).exists():
        print(f"making the embedded data set in {EMBEDDED_DIRECTORY}")
        synthesise(EMBEDDED_DIRECTORY, SynthesiseOptions())
    return EMBEDDED_DIRECTORY


def describe(experiment: Experiment) -> None:
    """Create the run directory and write down what the run is: `config.yaml` and `run.json`."""
    try:
        experiment.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(write_failure(experiment.run, error)) from error
    atomic_text(experiment.run / "config.yaml", settings.to_yaml(experiment.config))
    facts = {"versions": versions(), "identity": experiment.identity, "data_set": experiment.spec.dataset}
    atomic_text(experiment.run / "run.json", json.dumps(facts, indent=1) + "\n")
    held_out = min(experiment.held_out.samples, experiment.config.validate.tiles) if experiment.held_out else 0
    model, train = experiment.config.model, experiment.config.train
    print(
        f"{experiment.run}: {model.size}, {model.image_size} px in patches of {model.patch_size}, "
        f"{len(experiment.spec.targets)} targets; {experiment.source.samples:,} tiles to train on, {held_out:,} held out; "
        f"{experiment.steps:,} steps of {train.global_batch} tiles on {train.workers} workers"
    )


def report(experiment: Experiment, stopped: bool) -> None:
    """Say what the run left behind."""
    newest = checkpoint.newest(experiment.run)
    assert newest is not None
    step = checkpoint.load_state(newest).step
    on = "; the same command resumes" if stopped else "; without train.stop_at the same command goes on"
    print(f"{'stopped' if stopped else 'done'}: step {step:,} of {experiment.steps:,}{on if step < experiment.steps else ''}")
    print(f"  checkpoint  {newest}")
    print(f"  encoder     {experiment.run / 'exported' / 'encoder.safetensors'}")
    figures = sorted((experiment.run / "figures").glob("*.png"))
    if figures:
        print(f"  figure      {figures[-1]}")


def entry() -> int:
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(entry())
