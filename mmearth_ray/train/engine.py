"""The engine: how the workers of a run act as one optimizer.  The loop sees this interface and nothing below it.

Gradients are sums over workers and micro-batches, because every loss is already divided by what the whole global batch
holds; DistributedDataParallel averages, which is undone by scaling the loss with the number of workers.
"""

import inspect
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmearth_ray.config import Optimizer
from mmearth_ray.objective import Objective
from mmearth_ray.train.compiled import compile_checked


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups as published: no decay on biases, normalisation layers and loss weights; decay on all the rest.

    The rest includes gamma and beta of GRN and the mask token, which the published code keeps in tensors of two and more
    dimensions and therefore decays.
    """
    plain = {
        f"{name}.{leaf}" if name else leaf
        for name, layer in module.named_modules()
        for leaf, _ in layer.named_parameters(recurse=False)
        if leaf == "bias" or leaf == "log_variances" or isinstance(layer, nn.LayerNorm)
    }
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name not in plain], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
    ]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host waits for nothing, which takes pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def ddp(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """The module, its gradients averaged over all processes.  Buffers stay what each process made them."""
    named = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # renamed in PyTorch 2.13
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{buffers: False}, **options)


class DDPEngine:
    """Every worker holds the whole model; gradients are all-reduced while the backward pass runs.

    Weights, moments and gradients are float32; with the precision "bf16" matrices and convolutions run in bfloat16 (autocast).

    Of a model for several image sizes, a step trains what its own size passes.  Parameters of the other sizes are left alone:
    weights, moments and the count of steps that corrects them stay as they are, without decay.  So a parameter's history is
    that of the steps of its size, which the steps' numbers tell: the same for any number of workers, and after resuming.
    """

    def __init__(
        self, module: Objective, settings: Optimizer, device: torch.device, precision: str = "fp32", compiled: bool = False
    ) -> None:
        self.module = module.to(device)
        self.device = device
        self.precision = precision
        self.to_compile = compiled
        self.compiled_for: set[int] = set()
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
        self.healthy = torch.ones((), dtype=torch.bool, device=device)
        self.workers = dist.get_world_size() if dist.is_initialized() else 1
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.module, settings.weight_decay),
            lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True,
        )  # fmt: skip
        self.forward: nn.Module = self.module
        if self.workers > 1:
            devices = [device.index] if device.type == "cuda" else None
            self.forward = ddp(self.module, device_ids=devices)

    def backward(self, batch: dict[str, Tensor], totals: Tensor, share: float, *, last: bool) -> Tensor:
        """Add a micro-batch's gradients; on the step's last one they are summed over workers.  Returns sums (T,)."""
        patch_size = self.module.patch_size(batch)
        if self.to_compile and patch_size not in self.compiled_for:  # before DistributedDataParallel sees a first such batch
            self.compiled_for.add(patch_size)
            compile_checked(self.module, batch, totals, share, precision=self.precision, autocast=self.autocast)
        waits = nullcontext() if last or not isinstance(self.forward, DistributedDataParallel) else self.forward.no_sync()
        with waits:
            with self.autocast():
                loss, sums = self.forward(batch, totals, share)
            (loss * self.workers).backward()
        for parameter in self.module.model.idle(patch_size) if last else ():
            parameter.grad = None  # zero everywhere, on all workers; AdamW passes over parameters without one
        return sums

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor], totals: Tensor) -> Tensor:
        """Sums of errors per target (T,), on this worker alone."""
        with self.autocast():
            return self.module.forward(batch, totals, 1.0)[1]  # not compiled: batches of any size come by

    def step(self, learning_rate: float) -> Tensor:
        """Apply the gradients and clear them, unless one is not finite now or was not earlier.

        Returns whether they were applied, a bool () on the device; the same on every worker, since gradients are sums over
        workers.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=torch.inf)  # unlike the 2-norm, this cannot overflow
        self.healthy = self.healthy & largest.isfinite()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # The fused kernel's own switch, which GradScaler uses as well: nothing waits for the device.
        self.optimizer.found_inf = (~self.healthy).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.healthy

    def all_sum(self, values: Tensor) -> Tensor:
        """The sum over workers, on the device."""
        held = send(values, self.device).clone()
        if self.workers > 1:
            dist.all_reduce(held)
        return held

    def weights(self) -> dict[str, Tensor]:
        """All parameters by name, float32."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state by parameter name: `exp_avg/<name>`, `exp_avg_sq/<name>`, `step/<name>`."""
        found = {}
        for name, parameter in self.module.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{kind}/{name}"] = value
        return found

    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Load what `weights` and `moments` gave, possibly under another engine or number of workers."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(weights[name])
                state = {key.split("/", 1)[0]: value for key, value in moments.items() if key.split("/", 1)[1] == name}
                self.optimizer.state[parameter] = {kind: value.to(self.device, copy=True) for kind, value in state.items()}


ENGINES = {"ddp": DDPEngine}
