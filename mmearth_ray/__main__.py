"""One entry to every command: mmearth-ray <command> ..., the same as python -m mmearth_ray.<command> ..."""

import importlib
import sys

from mmearth_ray import __version__
from mmearth_ray.errors import UsageError, run_command

COMMANDS = {
    "pretrain": ("mmearth_ray.pretrain", "pretrain an encoder"),
    "plan": ("mmearth_ray.plan.__main__", "what a run takes: memory by engine, micro-batch, steps and time"),
    "doctor": ("mmearth_ray.doctor.__main__", "check the machine or the cluster before a long run"),
    "evaluate": ("mmearth_ray.evaluate.__main__", "what an encoder is worth: labelled data sets, probes, label efficiency"),
    "checkpoints": ("mmearth_ray.checkpoints.__main__", "weights in and out: published checkpoints, timm names, ONNX"),
    "shards": ("mmearth_ray.shards.__main__", "make, check and look at data sets: convert, synthesise, verify, inspect"),
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"mmearth-ray {__version__}: pretrain Earth-observation encoders on Ray\n\nusage: mmearth-ray COMMAND ...\n")
        print("\n".join(f"  {name.ljust(12)} {meaning}" for name, (_, meaning) in COMMANDS.items()))
        print("\nmmearth-ray COMMAND --help tells more.")
        return 0
    if arguments[0] not in COMMANDS:
        raise UsageError(f"there is no command '{arguments[0]}'; use {' or '.join(COMMANDS)}")
    return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])


def entry() -> int:
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(entry())
