"""Layers of ConvNeXt V2, for images of which only some patches are visible.

Features are always blocks of cells, channels last.  After the stem every visible patch of an image is a block of 8 x 8
cells; each stage halves it, down to one cell.  Matrices, norms and GELU act on cells one by one; the convolutions go
through a `Layout`, so the layers need not know whether they see a few patches (`PackedLayout`) or a whole map
(`DenseLayout`, one block per image), nor which library convolves.

Sources: ConvNeXt V2 (arXiv:2301.00808) for the block and GRN; MP-MAE (arXiv:2405.02771) for the stem and patch sizes.

Shapes: B images, V visible patches of an image, R x S patches in the grid of an image, Q cells along the side of a block
(QQ need not be square in the dense case), P pixels along the side of a patch, D channels, O output channels, F = 4 D.
"""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmearth_ray.model.depthwise import Canvas, DenseDepthwise, PackedDepthwise, as_autocast

EPS = 1e-6  # of LayerNorm and GRN: the published ConvNeXt V2 encoder
CELLS = 8  # cells along the side of a patch after the stem: three halvings later it is one
MLP_RATIO = 4  # width of the hidden layer of a block over its own: ConvNeXt


class _Spread(torch.autograd.Function):
    """Rows to their places among zeros: (N, K), places (N,) -> (total, K).  Places are distinct."""

    @staticmethod
    def forward(ctx: Any, rows_NK: Tensor, places_N: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(places_N)
        return rows_NK.new_zeros(total, rows_NK.shape[1]).index_copy_(0, places_N, rows_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places_N,) = ctx.saved_tensors
        return _Collect.apply(grads[0], places_N), None, None  # type: ignore[return-value]


class _Collect(torch.autograd.Function):
    """Rows back from their places: (total, K), places (N,) -> (N, K).  As places are distinct, nothing adds up."""

    @staticmethod
    def forward(ctx: Any, rows_TK: Tensor, places_N: Tensor) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.total = rows_TK.shape[0]
        return rows_TK.index_select(0, places_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places_N,) = ctx.saved_tensors
        return _Spread.apply(grads[0].contiguous(), places_N, ctx.total), None  # type: ignore[return-value]


class Layout(Protocol):
    """Where the blocks of a batch lie in their images, and how they are convolved."""

    def pixels(self, image_BCHW: Tensor) -> Tensor:
        """The visible pixels, as features: (B, V, P, P, C)."""
        ...

    def convolve(self, image_BCHW: Tensor, weight_OCKK: Tensor, bias_O: Tensor | None) -> Tensor:
        """Convolution of the image, odd kernel, zeros at hidden pixels and outside: (B, V, P, P, O) at visible pixels."""
        ...

    def inside(self, x_BVQQD: Tensor, weight_ODKK: Tensor, bias_O: Tensor | None, groups: int) -> Tensor:
        """Convolution whose kernel equals its stride, so that it stays inside a block: (B, V, Q / K, Q / K, O)."""
        ...

    def depthwise(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
        """Depthwise convolution, odd kernel, with zeros at hidden cells and outside: keeps the shape of the features."""
        ...


class DenseLayout:
    """Everything is visible: one block per image, the map itself, whatever its shape."""

    def pixels(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW.permute(0, 2, 3, 1).contiguous()[:, None]

    def convolve(self, image_BCHW: Tensor, weight_OCKK: Tensor, bias_O: Tensor | None) -> Tensor:
        image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
        x_BOHW = functional.conv2d(image_BCHW, weight_OCKK, bias_O, padding=weight_OCKK.shape[-1] // 2)
        return x_BOHW.permute(0, 2, 3, 1)[:, None]

    def inside(self, x_BVQQD: Tensor, weight_ODKK: Tensor, bias_O: Tensor | None, groups: int) -> Tensor:
        return _inside(x_BVQQD, weight_ODKK, bias_O, groups)

    def depthwise(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
        return _depthwise(x_BVQQD.squeeze(1), weight_D1KK, bias_D)[:, None]


class PackedLayout:
    """Some patches of a grid of `grid` = (R, S) patches are visible: `visible_BV` holds their row-major indices.

    Every image shows the same number of patches, so features need no padding.  For a depthwise convolution on a GPU whole
    rows of Q cells, contiguous in a block, are spread into a zeroed map; for one on a CPU see `Canvas`.
    """

    def __init__(self, visible_BV: Tensor, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.visible_BV = visible_BV
        self.image_B1 = torch.arange(len(visible_BV), device=visible_BV.device)[:, None]
        self._places: dict[int, Tensor] = {}
        self._canvases: dict[tuple[int, int], Canvas] = {}

    def pixels(self, image_BCHW: Tensor) -> Tensor:
        return self._windows(image_BCHW, halo=0).unflatten(0, self.visible_BV.shape)

    def convolve(self, image_BCHW: Tensor, weight_OCKK: Tensor, bias_O: Tensor | None) -> Tensor:
        windows_NPPC = self._windows(image_BCHW, halo=weight_OCKK.shape[-1] // 2)
        x_NOPP = functional.conv2d(windows_NPPC.permute(0, 3, 1, 2), _in_order(weight_OCKK), bias_O)
        return x_NOPP.permute(0, 2, 3, 1).unflatten(0, self.visible_BV.shape)

    def inside(self, x_BVQQD: Tensor, weight_ODKK: Tensor, bias_O: Tensor | None, groups: int) -> Tensor:
        return _inside(x_BVQQD, weight_ODKK, bias_O, groups)

    def _windows(self, image_BDHW: Tensor, halo: int) -> Tensor:
        """Pixels of every visible patch with `halo` pixels around it, zero where hidden: (B V, P + 2 halo, P + 2 halo, D)."""
        (rows, columns), (batch, _, height, width) = self.grid, image_BDHW.shape
        seen_BL = torch.zeros(batch, rows * columns, dtype=torch.bool, device=image_BDHW.device)
        seen_BL = seen_BL.scatter(1, self.visible_BV, True)
        patches_BDRPSP = image_BDHW.reshape(batch, -1, rows, height // rows, columns, width // columns)
        seen_B1R1S1 = seen_BL.view(batch, 1, rows, 1, columns, 1)
        shown_BDHW = torch.where(seen_B1R1S1, patches_BDRPSP, 0).view_as(image_BDHW)  # out of place: also a target
        padded_BHWD = functional.pad(shown_BDHW.permute(0, 2, 3, 1), (0, 0, halo, halo, halo, halo))
        size = height // rows + 2 * halo
        windows_BRSPPD = padded_BHWD.unfold(1, size, size - 2 * halo).unfold(2, size, size - 2 * halo).movedim(3, 5)
        return windows_BRSPPD[self.image_B1, self.visible_BV // columns, self.visible_BV % columns].flatten(0, 1)

    def depthwise(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
        if x_BVQQD.device.type == "cpu":
            key = x_BVQQD.shape[2], weight_D1KK.shape[-1]
            canvas = self._canvases.get(key) or self._canvases.setdefault(key, Canvas(self.visible_BV, self.grid, *key))
            return PackedDepthwise.apply(*as_autocast(x_BVQQD, weight_D1KK, bias_D), canvas)  # type: ignore[return-value]
        return self.on_maps(x_BVQQD, weight_D1KK, bias_D)

    def on_maps(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
        """The depthwise convolution as it is on a GPU."""
        (rows, columns), (batch, _, cells, _, channels) = self.grid, x_BVQQD.shape
        places, total = self._row_places(cells), batch * rows * cells * columns
        map_TK: Tensor = _Spread.apply(x_BVQQD.reshape(-1, cells * channels), places, total)  # type: ignore[assignment]
        map_BHWD = _depthwise(map_TK.view(batch, rows * cells, columns * cells, channels), weight_D1KK, bias_D)
        out_NK: Tensor = _Collect.apply(map_BHWD.reshape(total, -1), places)  # type: ignore[assignment]
        return out_NK.view_as(x_BVQQD)

    def _row_places(self, cells: int) -> Tensor:
        """Where each of the `cells` rows of each block lies in a map of (B, R, cells, S) rows: (B V cells,)."""
        if cells not in self._places:
            rows, columns = self.grid
            first_BV = (self.image_B1 * rows + self.visible_BV // columns) * cells * columns + self.visible_BV % columns
            steps_Q = torch.arange(cells, device=first_BV.device) * columns
            self._places[cells] = (first_BV[..., None] + steps_Q).flatten()
        return self._places[cells]


def _depthwise(map_BHWD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
    """An ordinary depthwise convolution that keeps the size; channels-last in memory, before and after."""
    padding = weight_D1KK.shape[-1] // 2
    if map_BHWD.device.type == "cpu" and torch.is_grad_enabled():
        return DenseDepthwise.apply(*as_autocast(map_BHWD, weight_D1KK, bias_D))  # type: ignore[return-value]
    map_BDHW = map_BHWD.permute(0, 3, 1, 2)
    return functional.conv2d(map_BDHW, weight_D1KK, bias_D, padding=padding, groups=len(weight_D1KK)).permute(0, 2, 3, 1)


def _inside(x_BVQQD: Tensor, weight_ODKK: Tensor, bias_O: Tensor | None, groups: int) -> Tensor:
    """Every block by itself, as if it were an image; without groups a matrix product of the cells under the kernel."""
    side = weight_ODKK.shape[-1]
    if groups == 1:
        x_BVQQKKD = x_BVQQD.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4)
        return functional.linear(x_BVQQKKD.flatten(4), weight_ODKK.permute(0, 2, 3, 1).flatten(1), bias_O)
    x_NDQQ = x_BVQQD.flatten(0, 1).permute(0, 3, 1, 2)
    x_NOQQ = functional.conv2d(x_NDQQ, _in_order(weight_ODKK), bias_O, stride=side, groups=groups)
    return x_NOQQ.permute(0, 2, 3, 1).unflatten(0, x_BVQQD.shape[:2])


def _in_order(weight_ODKK: Tensor) -> Tensor:
    """The weight, so that its gradient has its strides: DistributedDataParallel would copy a channels-last one."""
    return weight_ODKK.flatten().view(weight_ODKK.shape)


class ImageConv(nn.Conv2d):
    """The 3x3 convolution of the stem, which looks across patches: an image (B, C, H, W) -> features (B, V, P, P, O)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, image_BCHW: Tensor, layout: Layout) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return layout.convolve(image_BCHW, self.weight, self.bias)


class DepthwiseConv(nn.Conv2d):
    """The depthwise convolution of a block: looks across patches, through the layout.  Weight (D, 1, 7, 7)."""

    def __init__(self, channels: int, kernel_size: int = 7) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x_BVQQD: Tensor, layout: Layout) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return layout.depthwise(x_BVQQD, self.weight, self.bias)


class BlockConv(nn.Conv2d):
    """A convolution whose kernel equals its stride, and so stays inside a block: (B, V, Q, Q, D) -> (B, V, Q/k, Q/k, O)."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, groups: int = 1) -> None:
        super().__init__(channels, out_channels, kernel_size, stride=kernel_size, groups=groups)

    def forward(self, x_BVQQD: Tensor, layout: Layout) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return layout.inside(x_BVQQD, self.weight, self.bias, self.groups)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels, the last dimension, with the eps that ConvNeXt uses everywhere; float32 under autocast."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, input: Tensor) -> Tensor:  # on a GPU autocast does the same by itself
        low = input.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        return super().forward(input.float() if low else input)


class _GlobalResponse(torch.autograd.Function):
    """GRN with its gradient written out: fewer passes over the widest features, a tenth of an atto encoder's step on a CPU.

    `over`: the dimensions that the norm runs over; where the batch is one of them, B is 1 in the names below.
    """

    @staticmethod
    def forward(ctx: Any, x_BVQQF: Tensor, gamma_F: Tensor, beta_F: Tensor, eps: float, over: tuple[int, ...]) -> Tensor:
        norm_B111F = x_BVQQF.square().sum(over, keepdim=True, dtype=torch.float32).sqrt()
        mean_B1111 = norm_B111F.mean(-1, keepdim=True) + eps
        scale_B111F = 1 + gamma_F * (norm_B111F / mean_B1111)
        ctx.save_for_backward(x_BVQQF, gamma_F, norm_B111F, mean_B1111, scale_B111F)
        ctx.over = over
        return torch.addcmul(beta_F.to(x_BVQQF.dtype), x_BVQQF, scale_B111F.to(x_BVQQF.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_BVQQF, gamma_F, norm_B111F, mean_B1111, scale_B111F = ctx.saved_tensors
        (grad_BVQQF,) = grads
        response_B111F = norm_B111F / mean_B1111
        d_scale_B111F = (grad_BVQQF * x_BVQQF).sum(ctx.over, keepdim=True, dtype=torch.float32)
        d_response_B111F = d_scale_B111F * gamma_F
        shared_B1111 = (d_response_B111F * response_B111F).mean(-1, keepdim=True)
        d_norm_B111F = (d_response_B111F - shared_B1111) / mean_B1111
        slope_B111F = torch.where(norm_B111F > 0, d_norm_B111F / norm_B111F, 0)  # a silent channel: the norm is at rest
        d_x_BVQQF = torch.mul(grad_BVQQF, scale_B111F.to(grad_BVQQF.dtype))
        d_x_BVQQF = d_x_BVQQF.addcmul_(x_BVQQF, slope_B111F.to(x_BVQQF.dtype))
        d_gamma_F = (d_scale_B111F * response_B111F).sum((0, 1, 2, 3))
        return d_x_BVQQF, d_gamma_F, grad_BVQQF.sum((0, 1, 2, 3), dtype=torch.float32), None, None


Scope = Literal["image", "batch"]

SCOPES: dict[Scope, tuple[int, ...]] = {"image": (1, 2, 3), "batch": (0, 1, 2, 3)}
"""Dimensions of features that GRN's norm runs over."""


class GRN(nn.Module):
    """Global response normalisation of ConvNeXt V2 (arXiv:2301.00808, section 3.2), per image, over its visible cells.

    With G the L2 norm of a channel over all cells of an image, and N = G / (mean of G over channels + eps):
    y = gamma x N + beta + x.  gamma and beta (F,) start at 0, which makes it the identity.

    The scope "batch" takes G over all images of the batch, as the published sparse encoder does
    (github.com/vishalned/MMEarth-train, models/sparse_norm_layers.py): an image's features then depend on its neighbours.
    """

    def __init__(self, channels: int, eps: float = EPS, scope: Scope = "image") -> None:
        super().__init__()
        self.eps = eps
        self.over = SCOPES[scope]
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BVQQF: Tensor) -> Tensor:
        return _GlobalResponse.apply(x_BVQQF, self.gamma, self.beta, self.eps, self.over)  # type: ignore[return-value]


class Block(nn.Module):
    """A ConvNeXt V2 block: depthwise 7x7, LayerNorm, widen, GELU (exact), GRN, narrow, plus the input."""

    def __init__(self, channels: int, grn_eps: float = EPS, grn_scope: Scope = "image") -> None:
        super().__init__()
        self.dwconv = DepthwiseConv(channels)
        self.norm = LayerNorm(channels)
        self.pwconv1 = nn.Linear(channels, MLP_RATIO * channels)
        self.grn = GRN(MLP_RATIO * channels, grn_eps, grn_scope)
        self.pwconv2 = nn.Linear(MLP_RATIO * channels, channels)

    def forward(self, x_BVQQD: Tensor, layout: Layout) -> Tensor:
        y_BVQQD = self.norm(self.dwconv(x_BVQQD, layout))
        y_BVQQF = self.grn(functional.gelu(self.pwconv1(y_BVQQD)))
        return x_BVQQD + self.pwconv2(y_BVQQF)
