"""What steps found, left on the device until a window of steps is fetched at once, so that no step waits for the device.

Shapes: T targets, N steps in the window.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmearth_ray.experiment import Experiment
from mmearth_ray.stream.prepare import SampleSpec, elements
from mmearth_ray.train.clock import ASIDE, STAGES, Clock
from mmearth_ray.train.engine import Engine
from mmearth_ray.train.peak import Utilisation


@dataclass(frozen=True)
class Sums:
    """What a step (or a validation) found, over the whole global batch: errors and valid elements per target (T,), the
    weighted loss before the update, how many tiles, whether the update was applied, and how many requests to a store failed
    before its data came."""

    errors: Tensor
    counts: Tensor
    loss: float
    tiles: int
    applied: bool = True
    faults: int = 0

    def report(self, spec: SampleSpec) -> dict[str, Any]:
        """Losses (null where nothing was valid, or they are not finite), coverage and the weighted loss, as they are logged."""
        possible = elements(spec) * self.tiles
        names = [m.name for m in spec.targets]
        found = zip(names, self.errors.tolist(), self.counts.tolist(), possible.tolist(), strict=True)
        rows = [(name, error / count if count else None, count / most) for name, error, count, most in found]
        return {
            "loss": _finite(self.loss),
            "losses": {name: _finite(loss) for name, loss, _ in rows},
            "coverage": {name: coverage for name, _, coverage in rows},
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


class Found(NamedTuple):
    """One step as it stands on the device.

    errors: this worker's sums, float64 (T,).  counts: valid elements of the global batch, int64 (T,).  log_variances: those
    the loss was weighed with.  applied: bool ().  tiles: of the global batch.  faults: failed requests for this worker's data.
    """

    errors: Tensor
    counts: Tensor
    log_variances: Tensor | None
    applied: Tensor
    tiles: int
    faults: int = 0


@dataclass
class Window:
    """Steps that have not been fetched yet: what they found, what the host knows of each, and where their time goes."""

    clock: Clock
    found: list[Found] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def add(self, found: Found, note: dict[str, Any]) -> None:
        """A step that is done."""
        self.found.append(found)
        self.notes.append(note)
        self.clock.end_step()

    def entries(
        self, experiment: Experiment, sums: list[Sums], memory: dict[str, float | None], use: Utilisation
    ) -> list[dict[str, Any]]:
        """The lines of the metrics, one a step.  Speed, waiting and memory are those of the window.

        Seconds are of this worker, each step's own; what happens between two steps is in those of the second, and only speed
        leaves out what training does not consist of (checkpoints, validation, figures).  Where image sizes take turns a line
        tells the step's: losses and speed follow it.
        """
        seconds = self.clock.read()
        took = sum(s[stage] for s in seconds for stage in STAGES if stage not in ASIDE)
        specs = [experiment.spec_of(note["step"]) for note in self.notes]
        tiles = [s.tiles for s in sums]
        window = {
            "tiles_per_second": sum(tiles) / took,
            "data_wait": sum(s["data_wait"] for s in seconds) / took,
            "mfu": use.share(list(zip(specs, tiles, strict=True)), took),
        }
        entries = []
        for note, s, spec, parts in zip(self.notes, sums, specs, seconds, strict=True):
            size = {"image_size": spec.image_size} if experiment.source.turns else {}
            split = {"seconds": {stage: round(value, 6) for stage, value in parts.items()}, "memory_gb": memory}
            entries.append({**note, **size, **s.report(spec), **window, **split, "storage_faults": s.faults})
        return entries


class Fetched(NamedTuple):
    """Steps as found by all workers, whether any worker asks to stop, and the memory of the fullest one, GB."""

    steps: list[Sums]
    stop: bool
    memory: dict[str, float | None]


def fetch(steps: list[Found], engine: Engine, stop: bool = False) -> Fetched:
    """The steps over all workers, and what else they tell each other; the one place where the host waits for the device."""
    errors_NT = torch.stack([s.errors for s in steps])
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    memory_W2 = np.zeros((workers, 2))  # the sum over workers of each one's own row holds all rows
    memory_W2[rank] = memory_in_use(engine.device)
    others = errors_NT.new_tensor([float(stop), *(float(s.faults) for s in steps), *memory_W2.flatten().tolist()])
    agreed, others = engine.all_sum(torch.cat([errors_NT.flatten(), others])).split([errors_NT.numel(), len(others)])
    errors_NT, (any_stop, *told) = agreed.view_as(errors_NT), others.tolist()
    faults, memory_W2 = told[: len(steps)], np.reshape(told[len(steps) :], (workers, 2))
    resident, allocated = (float(most) / 1e9 or None for most in memory_W2.max(0))
    weigh = engine.module.weigh
    with torch.no_grad():
        losses_N = torch.stack(
            [weigh(e, s.counts, 1.0, _double(s.log_variances)) for e, s in zip(errors_NT, steps, strict=True)]
        )
    counts_NT, applied_N = torch.stack([s.counts for s in steps]), torch.stack([s.applied for s in steps])
    flat = torch.cat([losses_N[:, None], applied_N[:, None].double(), counts_NT.double(), errors_NT], 1).cpu()
    rows = [row.split([1, 1, len(s.counts), len(s.counts)]) for row, s in zip(flat, steps, strict=True)]
    found = [
        Sums(errors, counts.long(), float(loss), s.tiles, bool(applied), int(failed))
        for (loss, applied, counts, errors), s, failed in zip(rows, steps, faults, strict=True)
    ]
    return Fetched(found, bool(any_stop), {"resident": resident, "gpu_peak": allocated})


def _double(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.double()


def memory_in_use(device: torch.device) -> tuple[float, float]:
    """Bytes of this process in memory now, and the most that its tensors took on a GPU so far; 0 where it is not known."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        resident = 0
    return float(resident), float(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
