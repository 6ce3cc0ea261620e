"""DeepSpeed's ZeRO: workers that each hold a part of the optimizer's state (stage 1), of the gradients (2), of the weights (3).

DeepSpeed averages gradients over workers and micro-batches; both are undone, so that they are sums as under every engine.
Nothing is compiled, so a machine needs no compiler and a lock that a killed compilation has left cannot hold up a start.
"""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmearth_ray.errors import DataError
from mmearth_ray.keys import Optimizer
from mmearth_ray.objective import Objective
from mmearth_ray.train.engine import MOMENTS, Passes, adamw, norm_of, norms_of, spread
from mmearth_ray.train.tensors import Gathered, shape_only

BUCKET = 50_000_000
"""Gradients that are reduced at once, at most, elements: a buffer of 200 MB.  DeepSpeed's own 500 million take 2 GB."""

KEPT_WHOLE = 100_000
"""Parameters of fewer elements are not parted by stage 3, as one message for each costs more (DeepSpeed's default)."""

LIVE = 100_000_000
"""Elements of weights that stage 3 keeps gathered, and within how many they must be needed again to be kept rather than
gathered anew.  With DeepSpeed's own 1e9 every worker would hold the whole model from the forward to the backward pass."""


class ZeroEngine(Passes):
    """The engine of `train.engine=zero1`, `zero2` and `zero3`.

    micro_batches: in a step.  clip: the largest norm of all gradients together; 0: any.  offload: moments and float32 weights
    stay in the host's memory, where the update is computed.  skips: a step that is not finite stops no later one.
    """

    def __init__(
        self,
        module: Objective,
        settings: Optimizer,
        device: torch.device,
        precision: str = "fp32",
        *,
        stage: int,
        micro_batches: int = 1,
        clip: float = 0.0,
        offload: bool = False,
        skips: bool = False,
    ) -> None:
        super().__init__(device, precision)
        self.deepspeed = load_deepspeed(device)
        join_group(device)
        self.stage, self.offload, self.skips = stage, offload, skips
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.healthy = True
        self.parameters = dict(module.named_parameters())
        self.shapes = {name: p.shape for name, p in self.parameters.items()}  # stage 3 leaves none of them
        self.optimizer = adamw(module, settings)
        plan = _plan(module, stage, micro_batches, clip, precision, offload and device.type)
        if stage == 3:  # each parameter by itself to the device and into its parts, so that the device never holds them all
            self.deepspeed.zero.Init(module=module, config_dict_or_path=plan)
        self.module = module.to(device)
        self.engine, *_ = self.deepspeed.initialize(model=module, optimizer=self.optimizer, config=plan)
        names = {id(p): name for name, p in self.parameters.items()}
        self.flat = {names[id(p)]: flat for flat, group in self._partitions() for p in group}
        self._make_moments()
        zero: Any = self.engine.optimizer  # its own sums of squares are float32 in some stages: they overflow above 1e19
        if stage == 3:
            zero._get_norm_groups = lambda: [self._norm()]
        else:
            zero.scaled_global_norm = self._norm

    def _norm(self) -> Tensor:
        """The norm of all gradients, float32 (), as under every engine."""
        zero: Any = self.engine.optimizer
        if self.offload:
            norms: Sequence[Tensor] = list(zero.norm_for_param_grads.values())
        else:
            held = [g for group in zero.averaged_gradients.values() for g in group]
            norms = norms_of(held) if held else ()
        squares = sum((norm.double().square() for norm in norms), torch.zeros((), dtype=torch.float64))
        return norm_of([self.all_sum(squares).sqrt()])

    def _partitions(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """Every flat float32 tensor that this worker's AdamW updates, and the parameters that a part of it belongs to."""
        zero = self.engine.optimizer
        if self.stage == 3:
            return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
        return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))

    def _make_moments(self) -> None:
        """AdamW's state before the first step.  DeepSpeed looks for it within that step, when only the first group has one."""
        for flat, _ in self._partitions():
            zeros = torch.zeros_like(flat, requires_grad=False)
            count = torch.zeros((), dtype=torch.float32, device=flat.device)
            self.optimizer.state[flat] = {"step": count, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        if self.stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def backward(self, batch: dict[str, Tensor], totals: Tensor, share: float, *, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss, sums = self.engine(batch, totals, share)
        self.forwarded()
        self.engine.backward(loss * spread(self.workers, loss), scale_wrt_gas=False)
        return sums

    def step(self, learning_rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if not (self.skips or self.healthy):  # the fused kernel's own switch: it leaves everything as it is
            self.optimizer.found_inf = torch.ones((), device=self.device)  # pyright: ignore[reportAttributeAccessIssue]
        self.engine.step()
        self.healthy = not self.engine.optimizer.overflow and (self.skips or self.healthy)
        return torch.full((), self.healthy, device=self.device)

    def log_variances(self) -> Tensor | None:
        held: Any = self.module.log_variances
        if held is None:
            return None
        if self.stage == 3 and held.ds_status.name != "AVAILABLE":
            return self._weight("log_variances").clone()
        return held.detach().clone()

    def weights(self) -> Mapping[str, Tensor]:
        if self.stage < 3:  # every worker has them all after a step, rounded nowhere
            return {name: p.detach() for name, p in self.parameters.items()}
        return Gathered({name: shape_only(shape) for name, shape in self.shapes.items()}, self._weight)

    def _weight(self, name: str) -> Tensor:
        return self.deepspeed.utils.safe_get_full_fp32_param(self.parameters[name])

    def moments(self) -> Mapping[str, Tensor]:
        full, counts = MOMENTS[:2], MOMENTS[2]
        like = {f"{kind}/{name}": shape_only(shape) for name, shape in self.shapes.items() for kind in full}
        like |= {f"{counts}/{name}": shape_only(()) for name in self.shapes}
        return Gathered(dict(sorted(like.items(), key=lambda item: item[0].partition("/")[2])), self._moment)

    def _moment(self, key: str) -> Tensor:
        kind, _, name = key.partition("/")
        if kind == "step":
            return self.optimizer.state[self.flat[name]][kind].clone()
        return self.deepspeed.utils.safe_get_full_optimizer_state(self.parameters[name], kind)

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """As every engine's.  Raises DataError where parameters have taken different numbers of steps: they share a count."""
        done = {float(moments[key]) for name in self.shapes if (key := f"step/{name}") in moments}
        if len(done) > 1:
            raise DataError(
                f"the parameters of the checkpoint have taken {min(done):.0f} to {max(done):.0f} steps, which "
                f"train.engine=zero{self.stage} cannot go on with: it counts them together; use train.engine=ddp"
            )
        if not done:
            return
        for flat, _ in self._partitions():
            self.optimizer.state[flat]["step"].fill_(*done)
        for name, parameter in self.parameters.items():
            for kind in MOMENTS[:2]:
                if (key := f"{kind}/{name}") in moments:
                    self._set(parameter, moments[key].to(self.device), kind)

    def _set(self, parameter: Any, value: Tensor, kind: str) -> None:
        if self.stage < 3:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)
            return
        mine = value.new_zeros(parameter.partition_numel())
        given = value.flatten()[self.rank * len(mine) :][: len(mine)]  # the last worker's part is filled up with zeros
        mine[: len(given)] = given
        self.deepspeed.utils.safe_set_local_optimizer_state(parameter, mine, kind)


def bucket_of(elements: int) -> int:
    """Elements of the buffer in which gradients are reduced, of a model of so many: an even number."""
    return min(BUCKET, elements + 1) // 2 * 2


def _plan(
    module: nn.Module, stage: int, micro_batches: int, clip: float, precision: str, offload: str | bool
) -> dict[str, Any]:
    """DeepSpeed's configuration.  What it does where a key is absent is not relied on."""
    bucket = bucket_of(sum(p.numel() for p in module.parameters()))
    zero: dict[str, Any] = {
        "stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": KEPT_WHOLE,
        "stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE,
    }  # fmt: skip
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": offload == "cuda"}
    plan: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports with it
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW: DeepSpeed's own are compiled at the start
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":  # gradients and weights travel in float32 whatever the layer
        plan["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return plan


def load_deepspeed(device: torch.device) -> Any:
    """The package, quiet and ready.  It is loaded here alone, as that takes seconds and only these engines need it."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # it would take a GPU that the machine has
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__dict__["__compatible_ops__"] = {}  # none of its compiled operators is used
    decorate, compiler.compile = compiler.compile, lambda: lambda function: function
    try:  # an optimizer that DeepSpeed loads whether asked for or not, and all of torch.compile with it: 10 s of every start
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        compiler.compile = decorate
    return deepspeed


def join_group(device: torch.device) -> None:
    """Make what DeepSpeed asks of a process: a group, were it of one, and the number of its device."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index or 0)
