"""The convolutions of an encoder by MinkowskiEngine 0.5.4, on visible cells only, where it is installed (`make minkowski`).

An alternative to `PackedLayout` with the same weights and, up to rounding, the same results: the library that the published
code computes with.  It runs on CPUs, in float32 or float64 (under autocast, too).

Cells are sites of a sparse tensor, also those whose values are all zero.  A cell of a block with Q cells along its side
covers FINEST / Q units; its site is the (image, row, column) of its first unit, its tensor stride FINEST / Q.

Shapes: as in layers; N = B V Q Q sites in the order of the features, M of them in another layer, L = K K places of a kernel.
"""

import collections
import collections.abc
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmearth_ray.errors import UsageError

FINEST = 32  # units along the side of a patch: the most pixels a patch may have

KernelMap = dict[int, Tensor]
"""For each place of a kernel that meets any site: rows of the input, and the rows of the output that they add to, (2, n)."""


def require_minkowski() -> None:
    """Raise UsageError, with the reason, unless MinkowskiEngine can be imported."""
    try:
        _ = _engine().MinkowskiConvolutionFunction  # an empty folder of that name can be imported, too
    except (
        Exception
    ) as error:  # not there, built for another PyTorch, broken by a newer Python: all mean that it cannot be used
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"model.backend=minkowski needs MinkowskiEngine, which cannot be imported ({reason}); build it with"
            " 'make minkowski' (README, MinkowskiEngine) or use model.backend=packed"
        ) from error


def _engine() -> ModuleType:
    """MinkowskiEngine.  Importing it needs a name that Python 3.10 removed, warns, and sets a variable on large machines."""
    if sys.modules.get("MinkowskiEngine") is not None:
        return sys.modules["MinkowskiEngine"]
    threads = os.environ.get("OMP_NUM_THREADS")
    removed = not hasattr(collections, "Sequence")
    if removed:
        collections.Sequence = collections.abc.Sequence  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="MinkowskiEngine")  # no CUDA; many threads
            return importlib.import_module("MinkowskiEngine")
    finally:
        if removed:
            del collections.Sequence  # pyright: ignore[reportAttributeAccessIssue]
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Where several threads fill a kernel map, its order, and with it the last bits of sums, differs from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Channelwise(torch.autograd.Function):
    """What MinkowskiChannelwiseConvolution computes with a kernel map, (N, D) and kernel (L, D) -> (M, D), and its gradient.

    That class is right, too, but it makes an encoder's step half as long again, keeps L copies of its input for the gradient,
    and draws random numbers when it is made.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, kernel_LD: Tensor, pairs: KernelMap, total: int) -> Tensor:
        ctx.save_for_backward(x_ND, kernel_LD)
        ctx.pairs = pairs
        out_MD = x_ND.new_zeros(total, x_ND.shape[1])
        for place, (source, target) in pairs.items():
            out_MD.index_add_(0, target, x_ND.index_select(0, source).mul_(kernel_LD[place]))
        return out_MD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        x_ND, kernel_LD = ctx.saved_tensors
        d_x_ND, d_kernel_LD = torch.zeros_like(x_ND), torch.zeros_like(kernel_LD)
        for place, (source, target) in ctx.pairs.items():
            part_nD = grads[0].index_select(0, target)
            d_kernel_LD[place] = (part_nD * x_ND.index_select(0, source)).sum(0)
            d_x_ND.index_add_(0, source, part_nD.mul_(kernel_LD[place]))
        return d_x_ND, d_kernel_LD, None, None


class MinkowskiLayout:
    """Some patches of a grid of `grid` = (R, S) patches are visible: `visible_BV` holds their row-major indices.

    One coordinate manager serves a layout: sites, and which of them a kernel joins, are worked out once per forward pass.
    """

    def __init__(self, visible_BV: Tensor, grid: tuple[int, int]) -> None:
        if visible_BV.device.type != "cpu":
            raise UsageError("model.backend=minkowski runs on CPUs only; set train.gpus=false or model.backend=packed")
        self.grid = grid
        self.visible_BV = visible_BV
        self._engine = _engine()
        cpu, threads = self._engine.CoordinateMapType.CPU, torch.get_num_threads()  # it sets these for the whole process
        self._manager = self._engine.CoordinateManager(D=2, num_threads=threads, coordinate_map_type=cpu)
        self._keys: dict[int, Any] = {}
        self._maps: dict[tuple[int, int, int], KernelMap] = {}

    def pixels(self, image_BCHW: Tensor) -> Tensor:
        rows, columns = self.grid
        patches_BRPSPC = image_BCHW.permute(0, 2, 3, 1).unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
        image_B1 = torch.arange(len(image_BCHW))[:, None]
        return patches_BRPSPC.transpose(2, 3).flatten(1, 2)[image_B1, self.visible_BV]

    def convolve(self, image_BCHW: Tensor, weight_OCKK: Tensor, bias_O: Tensor | None) -> Tensor:
        return self._convolution(self.pixels(image_BCHW), weight_OCKK, bias_O, stride=1)

    def inside(self, x_BVQQD: Tensor, weight_ODKK: Tensor, bias_O: Tensor | None, groups: int) -> Tensor:
        kernel_size = weight_ODKK.shape[-1]
        if groups == 1:
            return self._convolution(x_BVQQD, weight_ODKK, bias_O, stride=kernel_size)
        assert groups == len(weight_ODKK) == x_BVQQD.shape[-1], "MinkowskiEngine knows groups of one channel only"
        return self._channelwise(x_BVQQD, weight_ODKK, bias_O, stride=kernel_size)

    def depthwise(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
        return self._channelwise(x_BVQQD, weight_D1KK, bias_D, stride=1)

    def _convolution(self, x_BVQQD: Tensor, weight_ODKK: Tensor, bias_O: Tensor | None, stride: int) -> Tensor:
        cells, after, kernel_LDO = x_BVQQD.shape[2], x_BVQQD.shape[2] // stride, _kernel(weight_ODKK)
        kernel = self._engine.KernelGenerator(weight_ODKK.shape[-1], stride, dimension=2)
        self._pairs(cells, weight_ODKK.shape[-1], stride)  # the engine keeps it, and finds it again
        mode = importlib.import_module("MinkowskiEngineBackend._C").ConvolutionMode.DEFAULT
        out_MO = self._engine.MinkowskiConvolutionFunction.apply(
            _rows(x_BVQQD, kernel_LDO), kernel_LDO, kernel, mode, self._sites(cells), self._sites(after), self._manager
        )
        return self._features(out_MO, bias_O, after)

    def _channelwise(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None, stride: int) -> Tensor:
        cells, after, kernel_LD = x_BVQQD.shape[2], x_BVQQD.shape[2] // stride, _kernel(weight_D1KK).squeeze(1)
        pairs, total = self._pairs(cells, weight_D1KK.shape[-1], stride), self.visible_BV.numel() * after**2
        out_MD: Tensor = _Channelwise.apply(_rows(x_BVQQD, kernel_LD), kernel_LD, pairs, total)  # type: ignore[assignment]
        return self._features(out_MD, bias_D, after)

    def _features(self, x_MD: Tensor, bias_D: Tensor | None, cells: int) -> Tensor:
        x_BVQQD = x_MD.unflatten(0, (*self.visible_BV.shape, cells, cells))
        return x_BVQQD if bias_D is None else x_BVQQD + bias_D

    def _pairs(self, cells: int, kernel_size: int, stride: int) -> KernelMap:
        """The sites that a kernel joins, from blocks with `cells` cells along their sides."""
        if (cells, kernel_size, stride) not in self._maps:
            keys = self._sites(cells), self._sites(cells // stride)
            with _one_thread():
                self._maps[cells, kernel_size, stride] = self._manager.kernel_map(*keys, stride, kernel_size)
        return self._maps[cells, kernel_size, stride]

    def _sites(self, cells: int) -> Any:
        """The key of the sites of blocks with `cells` cells along their sides; CPU maps keep the order they are given."""
        if cells not in self._keys:
            (batch, _), columns, unit = self.visible_BV.shape, self.grid[1], FINEST // cells
            image_BV = torch.arange(batch)[:, None].expand_as(self.visible_BV)
            corner_BV3 = torch.stack([image_BV, self.visible_BV // columns * FINEST, self.visible_BV % columns * FINEST], 2)
            steps_Q = torch.arange(0, FINEST, unit)
            steps_N3 = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), steps_Q, steps_Q)
            sites_N3 = (corner_BV3[:, :, None] + steps_N3).flatten(0, 2).int()
            self._keys[cells], _ = self._manager.insert_and_map(sites_N3, unit)
        return self._keys[cells]


def _kernel(weight_ODKK: Tensor) -> Tensor:
    """Places in the engine's order, row + K column: (O, D, K, K) -> (L, D, O), so for single channels -> (L, 1, D)."""
    return weight_ODKK.permute(3, 2, 1, 0).flatten(0, 1).contiguous()


def _rows(x_BVQQD: Tensor, like: Tensor) -> Tensor:
    """Features as the engine takes them, in the precision of its kernel: (N, D)."""
    return x_BVQQD.flatten(0, 3).to(like.dtype).contiguous()
