"""Plan a run before renting GPUs: python -m mmearth_ray.plan [CONFIG.yaml ...] key=value ..."""

import sys

from mmearth_ray import settings
from mmearth_ray.config import load_as
from mmearth_ray.errors import UsageError, run_command
from mmearth_ray.keys import Config
from mmearth_ray.plan.planned import Options, plan
from mmearth_ray.plan.report import is_plans, report

USAGE = """Plan the run that pretrain starts with the same words, before renting GPUs for it.

usage: python -m mmearth_ray.plan [CONFIG.yaml ...] [key=value ...]

Per size: parameters, an engine and a micro-batch that fit into a GPU, what they hold there, steps and time.  Nothing is
trained, no data set is read and no GPU is needed: memory is counted on tensors without values, of the packed backend.  A GPU
for each of train.workers; train.micro_batch=null: the largest that fits.

"""


def main(arguments: list[str]) -> int:
    """The command.  Returns the exit code; raises UsageError for the caller to report."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE + settings.help_text(Options))
        return 0
    options = load_as(Options, arguments)
    try:
        load_as(Config, [word for word in arguments if not is_plans(word)])
    except UsageError as error:
        raise UsageError(f"{error}; pretrain has to take the same files, so give plan.* as key=value") from error
    found = []
    for size in options.sizes:
        print(f"counting what {size} holds ...", file=sys.stderr, flush=True)  # seconds each
        found.append(plan(options, size))
    print("\n".join(report(options, found, arguments)))
    return 0


def entry() -> int:
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(entry())
