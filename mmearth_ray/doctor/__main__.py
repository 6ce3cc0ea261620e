"""Check a machine or a cluster before a long run: python -m mmearth_ray.doctor [CONFIG.yaml] key=value ..."""

import sys

from mmearth_ray import config as configuration
from mmearth_ray import settings
from mmearth_ray.doctor import machine
from mmearth_ray.doctor.findings import Finding, examine, summary
from mmearth_ray.errors import run_command
from mmearth_ray.keys import Config

USAGE = """Check whether this machine, or the Ray cluster that it joins, can carry the run that pretrain starts with
the same words.

usage: python -m mmearth_ray.doctor [CONFIG.yaml ...] [key=value ...]

One line per check: ok, warning or failed, the value, its bound, what to do.  Nothing stays behind but what is named.
Exit codes: 0 nothing failed, 1 something did, 2 a wrong command or setting.

"""


def main(arguments: list[str]) -> int:
    """The command.  Returns the exit code; raises UsageError for the caller to report."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE + settings.help_text(Config))
        return 0
    config = configuration.load(arguments)
    if missing := [name for name, found in machine.versions().items() if found == "none" and name != "deepspeed"]:
        text = f"{' and '.join(missing)}: not installed here; install requirements.lock"
        print(Finding("failed", "versions", text))
        return 1

    from mmearth_ray.doctor import places
    from mmearth_ray.doctor.case import Case  # torch and Ray take seconds to import; errors above need not wait
    from mmearth_ray.doctor.checks import CHECKS
    from mmearth_ray.doctor.cluster import leave

    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        print(finding, flush=True)
        findings.append(finding)

    try:
        for finding in examine(Case(config), CHECKS):
            tell(finding)
    finally:
        leave()
        for place in places.sweep():
            text = f"{place} may be there, for it could not be removed; do so once that storage answers"
            tell(Finding("warning", "left behind", text))
    print(summary(findings))
    return 1 if any(finding.level == "failed" for finding in findings) else 0


def entry() -> int:
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(entry())
