"""Recording a measurement: JSON and Markdown side by side, with what is needed to make it again."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mmearth_ray.files import atomic_text

RESULTS = Path(__file__).parent / "results"

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Instruction sets that decide how fast matrices are multiplied, by their names in /proc/cpuinfo."""

LIBRARIES = ("numpy", "ray", "triton", "MinkowskiEngine")
"""Whose versions are recorded where they are loaded: modules, which are named as their distributions are."""

Row = Mapping[str, Any]


def circumstances(module: str) -> dict[str, Any]:
    """Hardware, versions, commit and command of this process."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        **_gpu(),
        **_processor(Path("/proc/cpuinfo")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in LIBRARIES if name in sys.modules},
    }


def hardware() -> str:
    """The kind of machine, as it stands in the names of results: `gpu`, or `cpu` with the number of cores."""
    return "gpu" if torch.cuda.is_available() else f"cpu{os.cpu_count()}"


def _gpu() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    return {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda)}


def _processor(cpuinfo: Path) -> dict[str, str]:
    """Name and instruction sets of the processor; the name is the `device` where there is no GPU."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    known = set(fields.get("flags", "").split())
    instructions = " ".join(i for i in INSTRUCTIONS if i in known) or "none of note"
    return {"processor" if torch.cuda.is_available() else "device": name, "instructions": instructions}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write(theme: str, about: Mapping[str, Any], rows: Sequence[Row], tables: Mapping[str, Sequence[Row]] | None = None) -> Path:
    """Write `<theme>_<hardware>_<date>.json` and `.md`; returns the Markdown's path.

    `tables` are further tables by their headings.
    """
    tables = {name: more for name, more in (tables or {}).items() if more}
    path = RESULTS / f"{theme}_{hardware()}_{about['date']}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "rows": rows, **({"tables": tables} if tables else {})}
    atomic_text(path.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    lines = [f"# {theme}", "", *[f"- {name}: {value}" for name, value in about.items()], "", *table(rows)]
    for name, more in tables.items():
        lines += ["", f"## {name}", "", *table(more)]
    atomic_text(path, "\n".join(lines) + "\n")
    return path


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as a Markdown table.  A cell that a row does not have, or that is None, stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return head + [f"| {' | '.join(_cell(row.get(name)) for name in names)} |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
