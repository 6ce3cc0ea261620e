"""What steps found, left on the device until a window of steps is fetched at once, so that no step waits for the device.

Shapes: T targets, N steps in the window.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmearth_ray.experiment import Experiment
from mmearth_ray.stream.prepare import SampleSpec, elements
from mmearth_ray.train.engine import DDPEngine


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
        """Losses (null where nothing was valid), coverage and the weighted loss, as they are logged of such samples."""
        possible = elements(spec) * self.tiles
        names = [m.name for m in spec.targets]
        found = zip(names, self.errors.tolist(), self.counts.tolist(), possible.tolist(), strict=True)
        rows = [(name, error / count if count else None, count / most) for name, error, count, most in found]
        return {
            "loss": self.loss,
            "losses": {name: loss for name, loss, _ in rows},
            "coverage": {name: coverage for name, _, coverage in rows},
        }


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
    """Steps that have not been fetched yet: what they found, when the first began, and what the host knows of each."""

    begin: float
    found: list[Found] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    wait: float = 0.0

    def add(self, found: Found, note: dict[str, Any], wait: float) -> None:
        self.found.append(found)
        self.notes.append(note)
        self.wait += wait

    def entries(self, experiment: Experiment, sums: list[Sums], end: float) -> list[dict[str, Any]]:
        """The lines of the metrics, one a step.  Speed and waiting are those of the window.

        Where image sizes take turns a line tells the step's: losses and speed follow it.
        """
        took = end - self.begin
        speed = {"tiles_per_second": sum(s.tiles for s in sums) / took, "data_wait": self.wait / took}
        entries = []
        for note, s in zip(self.notes, sums, strict=True):
            spec = experiment.spec_of(note["step"])
            size = {"image_size": spec.image_size} if experiment.source.turns else {}
            entries.append({**note, **size, **s.report(spec), **speed, "storage_faults": s.faults})
        return entries


def fetch(steps: list[Found], engine: DDPEngine, stop: bool = False) -> tuple[list[Sums], bool]:
    """The steps over all workers, and whether any worker asks to stop; the one place where the host waits for the device."""
    errors_NT = torch.stack([s.errors for s in steps])
    others = errors_NT.new_tensor([float(stop), *(float(s.faults) for s in steps)])
    agreed, others = engine.all_sum(torch.cat([errors_NT.flatten(), others])).split([errors_NT.numel(), len(others)])
    errors_NT, (any_stop, *faults) = agreed.view_as(errors_NT), others.tolist()
    weigh = engine.module.weigh
    with torch.no_grad():
        losses_N = torch.stack(
            [weigh(e.float(), s.counts, 1.0, s.log_variances) for e, s in zip(errors_NT, steps, strict=True)]
        )
    counts_NT, applied_N = torch.stack([s.counts for s in steps]), torch.stack([s.applied for s in steps])
    flat = torch.cat([losses_N[:, None].double(), applied_N[:, None].double(), counts_NT.double(), errors_NT], 1).cpu()
    rows = [row.split([1, 1, len(s.counts), len(s.counts)]) for row, s in zip(flat, steps, strict=True)]
    found = [
        Sums(errors, counts.long(), float(loss), s.tiles, bool(applied), int(failed))
        for (loss, applied, counts, errors), s, failed in zip(rows, steps, faults, strict=True)
    ]
    return found, bool(any_stop)
