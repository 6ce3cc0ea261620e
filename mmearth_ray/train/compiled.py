"""`torch.compile` behind a gate: a compiled objective trains only if it computes what the plain one does.

Shapes: T targets.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mmearth_ray.errors import DataError
from mmearth_ray.objective import Objective

Backend = str | Callable

# Largest difference of the loss, relative, and of a parameter's gradient, relative to its norm plus 1e-3 of the largest norm.
# float32: rounding of other orders of sums; bf16: 8 bits of a significand.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 1e-1)}


def compile_checked(
    objective: Objective,
    batch: dict[str, Tensor],
    totals_T: Tensor,
    share: float,
    *,
    precision: str,
    autocast: Callable[[], AbstractContextManager],
    backend: Backend = "inductor",
) -> None:
    """Compile the objective in place, so that names of parameters stay, and compare it with itself on one micro-batch.

    Of a model for several image sizes, that is for the micro-batch's size; others are compiled when they come.
    Raises DataError where the loss or a gradient differs by more than rounding explains; the objective is then as before.
    """
    names, parameters = zip(*objective.named_parameters(), strict=True)

    def measure(run: Callable[..., tuple[Tensor, Tensor]]) -> tuple[float, list[Tensor]]:
        with autocast():
            loss, _ = run(batch, totals_T, share)
        return float(loss.detach()), list(torch.autograd.grad(loss, parameters))

    plain_loss, plain = measure(objective.forward)
    if objective._compiled_call_impl is None:
        objective.compile(backend=backend, dynamic=False if objective.model.sizes else None)
    try:
        loss, gradients = measure(objective)
        worst, name = _worst(names, gradients, plain)
    except Exception as error:
        _undo(objective)
        raise DataError(f"train.compile=true failed: {_last_line(error)}; use train.compile=false") from error
    loss_limit, gradient_limit = TOLERANCES[precision]
    difference = abs(loss - plain_loss) / max(1.0, abs(plain_loss))
    if not (difference <= loss_limit and worst <= gradient_limit):
        _undo(objective)
        raise DataError(
            f"train.compile=true changes the step: the loss by {difference:.1e} of itself (at most {loss_limit:.0e}), "
            f"the gradient of {name} by {worst:.1e} (at most {gradient_limit:.0e}); use train.compile=false"
        )


def _worst(names: tuple[str, ...], gradients: list[Tensor], plain: list[Tensor]) -> tuple[float, str]:
    """The largest difference of a gradient, and whose it is."""
    norms = [float(p.norm()) for p in plain]
    floor = 1e-3 * max(norms) + torch.finfo(torch.float32).tiny
    found = [float((g - p).norm()) / (norm + floor) for g, p, norm in zip(gradients, plain, norms, strict=True)]
    odd = [i for i, value in enumerate(found) if value != value]  # NaN compares with nothing
    place = odd[0] if odd else max(range(len(found)), key=found.__getitem__)
    return found[place], names[place]


def _undo(objective: Objective) -> None:
    objective._compiled_call_impl = None


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
