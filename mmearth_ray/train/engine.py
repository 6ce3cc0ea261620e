"""The engine: how the workers of a run act as one optimizer.  The loop sees the interface `Engine` and nothing below it.

Gradients are sums over workers and micro-batches, because every loss is already divided by what the whole global batch
holds; DistributedDataParallel averages, which is undone by scaling the loss with the number of workers.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmearth_ray.keys import Optimizer
from mmearth_ray.model.layers import Block
from mmearth_ray.objective import Objective
from mmearth_ray.stream.prepare import Batch
from mmearth_ray.train.compiled import compile_checked

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of a parameter


class Engine(Protocol):
    """What the loop sees of an engine.  Every worker makes the same calls in the same order, with its own batches.

    Weights, moments and gradients are float32; with the precision "bf16" matrices and convolutions run in bfloat16 (autocast).
    """

    module: Objective
    device: torch.device
    forwarded: Callable[[], None]
    """Called by `backward` between its forward and its backward pass; whoever measures them sets it."""

    def backward(self, batch: dict[str, Tensor], totals: Tensor, share: float, *, last: bool) -> Tensor:
        """Add a micro-batch's gradients; with the step's last one they are summed over workers.  Returns sums (T,).

        Where its loss is not finite, no gradient is: so every worker learns of it without asking.
        """
        ...

    def step(self, learning_rate: float) -> Tensor:
        """Apply the gradients and clear them, unless their norm is no finite float32.

        Then this step changes nothing, and unless the engine skips such steps no later one does.  Returns whether they were
        applied, a bool () on the device; the same on every worker, since gradients are sums over workers.
        """
        ...

    def errors(self, batch: dict[str, Tensor]) -> Tensor:
        """Sums of errors of every image by itself (B, T), of this worker's batch alone."""
        ...

    def evaluate(self, batch: dict[str, Tensor], totals: Tensor) -> Tensor:
        """Sums of errors per target (T,), of this worker's batch alone."""
        ...

    def reconstruct(self, batch: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What the objective's `reconstruct` gives; all workers ask for the same batch."""
        ...

    def log_variances(self) -> Tensor | None:
        """A copy of the weights of the losses as they are now (T,), or None where they have none."""
        ...

    def all_sum(self, values: Tensor) -> Tensor:
        """The sum over workers, on the device."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """All parameters by name, float32."""
        ...

    def moments(self) -> Mapping[str, Tensor]:
        """AdamW's state by parameter name: `exp_avg/<name>`, `exp_avg_sq/<name>`, `step/<name>`."""
        ...

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Load what `moments` gave, possibly under another engine or number of workers."""
        ...


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


def recompute_blocks(module: nn.Module, *, reentrant: bool) -> None:
    """Let every block keep its input alone and compute its activations again in the backward pass.

    `reentrant`: where parameters come and go with the passes, what was saved cannot be compared with what is computed again.
    """
    for block in module.modules():
        if isinstance(block, Block):
            block.forward = partial(_recomputed, block.forward, reentrant)  # type: ignore[method-assign]


def _recomputed(forward: Any, reentrant: bool, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=reentrant, preserve_rng_state=False)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host waits for nothing, which takes pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch's numeric arrays as tensors, in their native types."""
    arrays = {name: array for name, array in batch.items() if array.dtype.kind in "buif"}
    return {name: send(torch.from_numpy(array), device) for name, array in arrays.items()}


def ddp(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """The module, its gradients averaged over all processes.  Buffers stay what each process made them."""
    named = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # renamed in PyTorch 2.13
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{buffers: False}, **options)


def unmeasured() -> None:
    """What an engine calls between its passes where nobody measures them."""


def adamw(module: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """The optimizer of every engine; the schedule sets its learning rate."""
    return torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay),
        lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True,
    )  # fmt: skip


class Passes:
    """What all engines do alike: passes that change nothing, and sums over workers."""

    module: Objective

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
        self.forwarded: Callable[[], None] = unmeasured

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor], totals: Tensor) -> Tensor:
        with self.autocast():
            return self.module(batch, totals, 1.0)[1]

    def errors(self, batch: dict[str, Tensor]) -> Tensor:
        with self.autocast():
            return self.module.errors_of_images(batch)

    def reconstruct(self, batch: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return self.module.reconstruct(batch)

    def all_sum(self, values: Tensor) -> Tensor:
        return all_sum(values, self.device)


class DDPEngine(Passes):
    """Every worker holds the whole model; gradients are all-reduced while the backward pass runs.

    `clip`: the largest norm of all gradients together; 0: any.  `skips`: a step that is not finite stops no later one.

    Of a model for several image sizes, a step trains what its own size passes.  Parameters of the other sizes are left alone:
    weights, moments and the count of steps that corrects them stay as they are, without decay.  So a parameter's history is
    that of the steps of its size, which the steps' numbers tell: the same for any number of workers, and after resuming.
    """

    def __init__(
        self,
        module: Objective,
        settings: Optimizer,
        device: torch.device,
        precision: str = "fp32",
        compiled: bool = False,
        clip: float = 0.0,
        skips: bool = False,
    ) -> None:
        super().__init__(device, precision)
        self.module = module.to(device)
        self.clip, self.skips = clip, skips
        self.precision = precision
        self.to_compile = compiled
        self.compiled_for: set[int] = set()
        self.healthy = torch.ones((), dtype=torch.bool, device=device)
        self.workers = dist.get_world_size() if dist.is_initialized() else 1
        self.optimizer = adamw(self.module, settings)
        self.forward: nn.Module = self.module
        if self.workers > 1:
            devices = [device.index] if device.type == "cuda" else None
            self.forward = ddp(self.module, device_ids=devices)

    def backward(self, batch: dict[str, Tensor], totals: Tensor, share: float, *, last: bool) -> Tensor:
        patch_size = self.module.patch_size(batch)
        if self.to_compile and patch_size not in self.compiled_for:  # before DistributedDataParallel sees a first such batch
            self.compiled_for.add(patch_size)
            compile_checked(self.module, batch, totals, share, precision=self.precision, autocast=self.autocast)
        waits = nullcontext() if last or not isinstance(self.forward, DistributedDataParallel) else self.forward.no_sync()
        with waits:
            with self.autocast():
                loss, sums = self.forward(batch, totals, share)
            self.forwarded()
            (loss * spread(self.workers, loss)).backward()
        for parameter in self.module.model.idle(patch_size) if last else ():
            parameter.grad = None  # zero everywhere, on all workers; AdamW passes over parameters without one
        return sums

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor], totals: Tensor) -> Tensor:
        with self.autocast():
            return self.module.forward(batch, totals, 1.0)[1]  # not compiled: batches of any size come by

    def log_variances(self) -> Tensor | None:
        held = self.module.log_variances
        return None if held is None else held.detach().clone()

    def step(self, learning_rate: float) -> Tensor:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = norm_of(norms_of(gradients))
        self.healthy = norm.isfinite() if self.skips else self.healthy & norm.isfinite()
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # The fused kernel's own switch, which GradScaler uses as well: nothing waits for the device.
        self.optimizer.found_inf = (~self.healthy).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.healthy

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def moments(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.module.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{kind}/{name}"] = value
        return found

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            kinds = [kind for kind in MOMENTS if f"{kind}/{name}" in moments]
            if kinds:
                state = {kind: moments[f"{kind}/{name}"].to(self.device, copy=True) for kind in kinds}
                self.optimizer.state[parameter] = state


def spread(factor: int, loss: Tensor) -> Tensor:
    """The factor, or NaN where the loss is not finite: times it, the loss has no finite gradient then."""
    return factor + 0 * loss.detach()


def norms_of(gradients: list[Tensor]) -> Sequence[Tensor]:
    """The norm of each, float64 (), without a copy in double precision."""
    return torch._foreach_norm(gradients, 2, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]


def norm_of(norms: Sequence[Tensor]) -> Tensor:
    """The norm of gradients, float32 (), from the float64 norms of their parts, whose squares do not overflow."""
    return torch.linalg.vector_norm(torch.stack(list(norms))).float()


def all_sum(values: Tensor, device: torch.device) -> Tensor:
    """The sum over workers, on the device."""
    held = send(values, device).clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(held)
    return held


def first_said(engine: Engine, rank: int, workers: int, text: str) -> str:
    """The first text that is not empty, in the order of workers, cut to 500 bytes: the same on all of them."""
    said = torch.zeros(workers, 500, dtype=torch.int64)
    given = text.encode()[:500]
    said[rank, : len(given)] = torch.tensor(list(given), dtype=torch.int64)
    texts = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in engine.all_sum(said).tolist())
    return next((text for text in texts if text), "")
