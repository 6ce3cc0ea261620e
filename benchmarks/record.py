"""Recording a measurement: JSON and Markdown side by side, with what is needed to make it again."""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def circumstances(module: str) -> dict[str, Any]:
    """Hardware, versions, commit and command of this process."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write(theme: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write `<theme>_<hardware>_<date>.json` and `.md`; returns the Markdown's path."""
    kind = "gpu" if torch.cuda.is_available() else f"cpu{about['cores']}"
    path = RESULTS / f"{theme}_{kind}_{about['date']}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    lines = [f"# {theme}", "", *[f"- {name}: {value}" for name, value in about.items()], "", *table(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a Markdown table."""
    names = list(rows[0])
    cells = [[f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    head = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return head + [f"| {' | '.join(row)} |" for row in cells]
