"""The packed layout with its depthwise convolution in Triton, on a GPU, where Triton is installed.

The same weights and, up to rounding, the same results as `PackedLayout`; the rest of the layout is its own.  Triton comes with
PyTorch's builds for GPUs.  TRITON_INTERPRET=1 runs the kernels on a CPU, very slowly, to test them.

Shapes: as in layers.
"""

import importlib
import os

import torch
from torch import Tensor

from mmearth_ray.errors import UsageError
from mmearth_ray.model.depthwise import as_autocast
from mmearth_ray.model.layers import PackedLayout
from mmearth_ray.model.neighbours import Neighbours, find_neighbours

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_triton() -> None:
    """Raise UsageError, with the reason, unless Triton can be imported."""
    try:
        _ = importlib.import_module("triton").jit
    except Exception as error:  # not there, or built for another Python: all mean that it cannot be used
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"model.backend=triton needs Triton, which cannot be imported ({reason}); install it with 'pip install triton' (on"
            " Linux) or use model.backend=packed"
        ) from error


class TritonLayout(PackedLayout):
    """Some patches of a grid of `grid` = (R, S) patches are visible; neighbours are found by an index, made once per layout."""

    def __init__(self, visible_BV: Tensor, grid: tuple[int, int]) -> None:
        if visible_BV.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UsageError(
                f"model.backend=triton runs on GPUs with CUDA, not on '{visible_BV.device.type}'; set train.gpus=true, or"
                " model.backend=packed"
            )
        super().__init__(visible_BV, grid)
        self._neighbours: dict[int, Neighbours] = {}

    def depthwise(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
        from mmearth_ray.model.triton_depthwise import depthwise  # here, as it imports Triton

        assert x_BVQQD.dtype in DTYPES, f"the sums are float32: {x_BVQQD.dtype} would lose precision"
        margin = max(weight_D1KK.shape[-1] // 2, 1)  # patches that the kernel reaches where a patch is one cell
        if margin not in self._neighbours:
            self._neighbours[margin] = find_neighbours(self.visible_BV, self.grid, margin)
        tensors = as_autocast(x_BVQQD, weight_D1KK, bias_D)
        return depthwise(*tensors, self._neighbours[margin])  # type: ignore[call-arg]  (compiler.disable hides its parameters)
