"""The engine: how the workers of a run act as one optimizer.  The loop sees this interface and nothing below it.

Gradients are sums over workers and micro-batches, because every loss is already divided by what the whole global batch
holds; DistributedDataParallel averages, which is undone by scaling the loss with the number of workers.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmearth_ray.config import Optimizer
from mmearth_ray.objective import Objective


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


class DDPEngine:
    """Every worker holds the whole model; gradients are all-reduced while the backward pass runs."""

    def __init__(self, module: Objective, settings: Optimizer, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device
        self.workers = dist.get_world_size() if dist.is_initialized() else 1
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.module, settings.weight_decay),
            lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True,
        )  # fmt: skip
        self.forward: nn.Module = self.module
        if self.workers > 1:
            devices = [device.index] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(
                self.module, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def loss(self, batch: dict[str, Tensor], totals: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the global loss, and its sums of errors per target (T,)."""
        return self.forward(batch, totals, share)

    def backward(self, batch: dict[str, Tensor], totals: Tensor, share: float, *, last: bool) -> Tensor:
        """Add a micro-batch's gradients; on the step's last one they are summed over workers.  Returns sums (T,)."""
        waits = nullcontext() if last or not isinstance(self.forward, DistributedDataParallel) else self.forward.no_sync()
        with waits:
            loss, sums = self.loss(batch, totals, share)
            (loss * self.workers).backward()
        return sums

    def gradients_are_finite(self) -> bool:
        """Whether every gradient is a number; the same answer on every worker, since gradients are summed over them."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def step(self, learning_rate: float) -> None:
        """Apply the gradients and clear them."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

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
