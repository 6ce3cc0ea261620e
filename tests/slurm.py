"""Slurm on this machine: `srun` and `scontrol` that run what they are asked to right here, and note it down."""

import json
import os
import socket
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "cluster" / "slurm.sh"

COMMANDS = {
    # one task on one node: its command, in the place of this process
    "srun": """
first = next(place for place, word in enumerate(sys.argv) if place and not word.startswith("--"))
note(sys.argv[1:first])
command = sys.argv[first:]
os.execvp(command[0], command)
""",
    "scontrol": """
note(sys.argv[1:])
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
""",
}


def install(folder: Path, nodes: int, cpus: int) -> dict[str, str]:
    """Put the commands into `folder`.  Returns what a batch script finds in its environment on that many nodes."""
    for name, body in COMMANDS.items():
        line = f"json.dumps([{name!r}, os.getpid(), what]) + chr(10)"
        note = f"def note(what):\n    open({str(folder / 'notes.jsonl')!r}, 'a').write({line})"
        (folder / name).write_text(f"#!{sys.executable}\nimport json, os, sys\n{note}\n{body}")
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": f"{os.getpid()}{nodes}",
        "SLURM_JOB_NODELIST": ",".join([socket.gethostname()] * nodes),
        "SLURM_SUBMIT_DIR": str(SCRIPT.parents[1]),
        "SLURM_CPUS_PER_TASK": str(cpus),
    }


def notes(folder: Path, command: str) -> list[tuple[int, list[str]]]:
    """(process id, arguments) of each call of the command so far."""
    path = folder / "notes.jsonl"
    calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(pid, arguments) for name, pid, arguments in calls if name == command]
