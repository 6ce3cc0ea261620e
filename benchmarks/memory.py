"""Memory that training steps need, measured in a process of its own.

    python -m benchmarks.memory [key=value ...]      --help lists the keys; prints one line of JSON

On a CPU the peak of the process during a few steps less what it held just before the first one; on a GPU the most that
PyTorch had allocated, with weights and batch.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch

from benchmarks.computations import PLAIN, Work, make_subject, our_step, plain_step
from benchmarks.roofline import PRECISIONS, Precision
from benchmarks.timing import Stopwatch
from mmearth_ray import settings
from mmearth_ray.errors import DataError, run_command
from mmearth_ray.model.encoder import BACKENDS, SIZES, Backend
from mmearth_ray.settings import key

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    size: str = key("atto", "encoder size", among=tuple(SIZES))
    image_size: int = key(56, "px", at_least=8)
    patch_size: int = key(8, "px")
    batch: int = key(32, "tiles per step", at_least=1)
    computation: str = key("packed", "backend of ours, or the published computation", among=(*BACKENDS, PLAIN))
    precision: str = key("fp32", "of ours", among=tuple(PRECISIONS))
    tf32: bool = key(False, "whether float32 products on a GPU may be rounded to TF32")
    threads: int = key(0, "threads of PyTorch; 0 leaves them as they are", at_least=0)
    steps: int = key(2, "steps", at_least=1)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    print(json.dumps({"bytes": measure(settings.load(Options, [], arguments))}))
    return 0


def in_fresh_process(options: Options) -> int:
    """Bytes, measured in a new process.  Raises DataError, with its last words, if that fails."""
    arguments = [f"{f.name}={str(getattr(options, f.name)).lower()}" for f in fields(options)]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if found.returncode:
        raise DataError(f"memory was not measured: {(found.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return json.loads(found.stdout.splitlines()[-1])["bytes"]


def measure(options: Options) -> int:
    """Bytes that the steps need in this process, which should be a fresh one."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allow_tf32(options.tf32)
    work = _work(options, device)
    return peak_of_steps(work, device, options.steps)


def peak_of_steps(work: Work, device: torch.device, steps: int) -> int:
    """Bytes that the steps need, the first of this process: on a CPU its peak so far less what it held just before them, on a
    GPU the most that PyTorch had allocated."""
    before = status("VmRSS") if device.type == "cpu" else 0
    for _ in range(steps):
        work(Stopwatch(device))
    return status("VmHWM") - before if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


def _work(options: Options, device: torch.device) -> Work:
    subject = make_subject(options.size, options.image_size, options.patch_size, options.batch, device)
    if options.computation == PLAIN:
        return plain_step(subject)
    return our_step(subject, cast(Backend, options.computation), cast(Precision, options.precision))


def allow_tf32(allowed: bool) -> None:
    """Whether products and convolutions of float32 on a GPU may be rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def status(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most so far (VmHWM).

    The latter and not `ru_maxrss`, which Linux starts at the peak of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """From now on VmHWM is as VmRSS is (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
