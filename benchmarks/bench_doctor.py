"""What the doctor says of this machine, kept beside the results of the benchmarks.

    python -m benchmarks.bench_doctor [CONFIG.yaml ...] [key=value ...]      the words of the doctor, or of its README example

Rates of disks and of the all-reduce are those of the moment: run it while nothing else does.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.record import Row, circumstances, write
from mmearth_ray.errors import DataError, run_command

EXAMPLE = ["configs/embedded.yaml", "train.workers=2", "run.directory=runs/doctor"]
LEVEL, SUBJECT = 8, 16
"""Widths of the columns before the text."""


def main(arguments: list[str]) -> int:
    words = arguments or EXAMPLE
    done = subprocess.run([sys.executable, "-m", "mmearth_ray.doctor", *words], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    rows = findings(done.stdout)
    if not rows:
        raise DataError("the doctor checked nothing, so there is nothing to keep")
    *_, result = done.stdout.splitlines()
    about = {
        **circumstances("benchmarks.bench_doctor"),
        "checked": " ".join(words),
        "result": f"{result}, exit code {done.returncode}",
    }
    print(f"written to {write('doctor', about, rows)}")
    return 0


def findings(said: str) -> list[Row]:
    """The lines of the checks.  Places are told from the working directory, as nobody else has it."""
    here = f"{Path.cwd()}/"
    lines = [line.replace(here, "") for line in said.splitlines() if line.startswith(("ok ", "warning ", "failed "))]
    return [
        {
            "level": line[:LEVEL].strip(),
            "check": line[LEVEL : LEVEL + 1 + SUBJECT].strip(),
            "found": line[LEVEL + SUBJECT + 2 :],
        }
        for line in lines
    ]


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
