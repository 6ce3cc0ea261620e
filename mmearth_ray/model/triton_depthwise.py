"""A depthwise convolution of packed blocks on a GPU, in Triton: neighbours are found by an index, no map is filled.

A row of a block, Q cells of D channels, is W = Q D contiguous numbers: lanes.  One column further is D lanes further, in this
block or the next, so the kernels know rows and lanes only.  W is the same in every stage, and for all published sizes a
multiple of 64: tiles of 64 lanes leave no thread idle, whatever the number of channels, and are contiguous in memory.

- `_convolve`: a program computes all Q rows of a few blocks, 64 lanes wide, in registers.  For each column of the kernel it
  loads its K taps, then every input row once, which serves up to K output rows: 7 (Q + 6) loads for 49 Q products.
  With the kernel turned by half a turn it is the gradient of its input, as the same patches are visible on both sides.
- `_correlate`: a program adds up the gradient of the kernel over its share of the blocks, for 64 lanes; all columns of the
  kernel lie in one tile, so that what they read in common comes from the cache.  One column more, which sees ones, is that of
  the bias.  Programs write their sums side by side, and PyTorch adds them: no atomics, the same bits every time.

Sums are float32 whatever the features are.  Products with hidden cells are done, with zeros: neighbours in a tile of blocks are
hidden at different places.  Shares and tiles depend on shapes alone, not on the GPU.  Sizes are chosen by reasoning and by what
the compiler says of registers; they have not been tuned on a GPU.

Shapes: N packed blocks, Q cells along the side of a block, D channels, W = Q D lanes, K the kernel; in the kernels P blocks,
T columns of the kernel with the bias's, rounded up to a power of two, and L lanes of a tile.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (triton may be absent, and what it compiles is Python in its syntax only)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmearth_ray.model.neighbours import Neighbours

LANES = 64  # of a tile: divides 8 dims[0], which is W, for every published size
WARPS = 4
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}  # fused: an instruction a product
PROGRAMS = 512  # that share the gradient of a kernel: about four for each multiprocessor of a large GPU


@triton.jit
def _input_row(x_ptr, slots_ptr_A, known_A, stride, moved_AL, lane_L, row: tl.constexpr, Q: tl.constexpr, D: tl.constexpr):
    """Row `row` (0 is the first of the block itself) as float32 (A, L), from the patch at `slots_ptr_A` or, past its W lanes,
    from the next one; zero where that is hidden."""
    slots_ptr_A += row // Q * stride
    slot_AL = tl.load(slots_ptr_A, mask=known_A, other=-1)[:, None]
    if Q > 1:
        next_A = tl.load(slots_ptr_A + 1, mask=known_A, other=-1)
        slot_AL = tl.where(moved_AL < Q * D, slot_AL, next_A[:, None])
        moved_AL = tl.where(moved_AL < Q * D, moved_AL, moved_AL - Q * D)
    shown_AL = (slot_AL >= 0) & (lane_L < Q * D)[None, :]
    place_AL = slot_AL.to(tl.int64) * (Q * Q * D) + row % Q * Q * D + moved_AL
    return tl.load(x_ptr + place_AL, mask=shown_AL, other=0.0).to(tl.float32)


@triton.jit
def _zeros(count: tl.constexpr, A: tl.constexpr, L: tl.constexpr):
    sums = ()
    for _ in tl.static_range(count):
        sums += (tl.zeros((A, L), tl.float32),)
    return sums


@triton.jit
def _add_products(sums, x, factors, i: tl.constexpr, Q: tl.constexpr, K: tl.constexpr):
    """Sum j takes x times factor i - j, where there is one.  K sums have Q factors, or Q sums K factors."""
    added = ()
    for j in tl.static_range(Q):
        added += (sums[j] + x * factors[i - j] if (i - j >= 0) and (i - j < K) else sums[j],)
    return added


@triton.jit(do_not_specialize=["patches", "stride"])
def _convolve(
    x_ptr, weight_ptr, bias_ptr, out_ptr, slots_ptr, places_ptr, patches, stride,
    Q: tl.constexpr, D: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr, BIASED: tl.constexpr,
    P: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (Q * D + L - 1) // L
    AROUND: tl.constexpr = (K // 2 + Q - 1) // Q  # patches to the left that the kernel reaches
    patch_P = tl.program_id(0) // TILES * P + tl.arange(0, P)
    lane_L = tl.program_id(0) % TILES * L + tl.arange(0, L)
    known_P, known_L = patch_P < patches, lane_L < Q * D
    slots_ptr_P = slots_ptr + tl.load(places_ptr + patch_P, mask=known_P, other=0)
    weight_ptr_L = weight_ptr + lane_L % D
    sums = _zeros(Q, P, L)
    for kx in range(K):
        taps = ()
        for ky in tl.static_range(K):
            tap = (K * K - 1 - ky * K - kx) if TURNED else (ky * K + kx)
            taps += (tl.load(weight_ptr_L + tap * D, mask=known_L, other=0.0).to(tl.float32)[None, :],)
        ahead = kx - K // 2 + AROUND * Q
        moved_PL = lane_L[None, :] + ahead % Q * D
        for i in tl.static_range(Q + K - 1):
            slots = slots_ptr_P + (ahead // Q - AROUND)
            x_PL = _input_row(x_ptr, slots, known_P, stride, moved_PL, lane_L, i - K // 2, Q, D)
            sums = _add_products(sums, x_PL, taps, i, Q, K)
    bias_L = tl.zeros((L,), tl.float32)
    if BIASED:
        bias_L += tl.load(bias_ptr + lane_L % D, mask=known_L, other=0.0).to(tl.float32)
    out_ptr_PL = out_ptr + patch_P.to(tl.int64)[:, None] * (Q * Q * D) + lane_L[None, :]
    for q in tl.static_range(Q):
        value_PL = (sums[q] + bias_L[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr_PL + q * Q * D, value_PL, mask=known_P[:, None] & known_L[None, :])


@triton.jit(do_not_specialize=["patches", "stride", "share"])
def _correlate(
    x_ptr, grad_ptr, sums_ptr, slots_ptr, places_ptr, patches, stride, share,
    Q: tl.constexpr, D: tl.constexpr, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (Q * D + L - 1) // L
    AROUND: tl.constexpr = (K // 2 + Q - 1) // Q
    part = tl.program_id(0) // TILES
    lane_L = tl.program_id(0) % TILES * L + tl.arange(0, L)
    kx_T, known_L = tl.arange(0, T), lane_L < Q * D
    ahead_T = kx_T - K // 2 + AROUND * Q
    moved_TL = lane_L[None, :] + (ahead_T % Q * D)[:, None]
    grad_ptr_L = grad_ptr + part.to(tl.int64) * share * (Q * Q * D) + lane_L
    sums = _zeros(K, T, L)
    for patch in range(part * share, tl.minimum(part * share + share, patches)):
        slots_ptr_T = slots_ptr + tl.load(places_ptr + patch) + (ahead_T // Q - AROUND)
        grads = ()
        for q in tl.static_range(Q):
            grads += (tl.load(grad_ptr_L + q * Q * D, mask=known_L, other=0.0).to(tl.float32)[None, :],)
        for i in tl.static_range(Q + K - 1):
            x_TL = _input_row(x_ptr, slots_ptr_T, kx_T < K, stride, moved_TL, lane_L, i - K // 2, Q, D)
            x_TL = tl.where((kx_T == K)[:, None], 1.0, x_TL)
            sums = _add_products(sums, x_TL, grads, i, K, Q)
        grad_ptr_L += Q * Q * D
    sums_ptr_TL = sums_ptr + (part.to(tl.int64) * K * T + kx_T)[:, None] * (Q * D) + lane_L[None, :]
    for ky in tl.static_range(K):
        tl.store(sums_ptr_TL + ky * T * Q * D, sums[ky], mask=known_L[None, :])


class Depthwise(torch.autograd.Function):
    """Packed features (B, V, Q, Q, D) and their index, weight (D, 1, K, K), bias (D,) or None -> features of that shape."""

    @staticmethod
    def forward(ctx: Any, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None, neighbours: Neighbours) -> Tensor:
        x_BVQQD, weight_LD = x_BVQQD.contiguous(), weight_D1KK.flatten(1).t().contiguous()
        ctx.save_for_backward(x_BVQQD, weight_LD, *neighbours)
        return _convolved(x_BVQQD, weight_LD, bias_D, neighbours, turned=False)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_BVQQD, weight_LD, *index = ctx.saved_tensors
        grad_BVQQD, neighbours = grads[0].contiguous(), Neighbours(*index)
        d_x_BVQQD = d_weight_D1KK = d_bias_D = None
        if ctx.needs_input_grad[0]:
            d_x_BVQQD = _convolved(grad_BVQQD, weight_LD, None, neighbours, turned=True)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_weight_D1KK, d_bias_D = _correlated(x_BVQQD, grad_BVQQD, _side(weight_LD), neighbours)
            d_weight_D1KK, d_bias_D = d_weight_D1KK.to(weight_LD.dtype), d_bias_D.to(weight_LD.dtype)
        return d_x_BVQQD, d_weight_D1KK, d_bias_D if ctx.needs_input_grad[2] else None, None


@torch.compiler.disable  # torch.compile would look into it, and finds nothing to improve
def depthwise(x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None, neighbours: Neighbours) -> Tensor:
    """The convolution of packed features with zeros at hidden cells and outside, with its gradients."""
    return Depthwise.apply(x_BVQQD, weight_D1KK, bias_D, neighbours)  # type: ignore[return-value]


def _side(weight_LD: Tensor) -> int:
    """K of K K taps."""
    return round(len(weight_LD) ** 0.5)


def _convolved(x_BVQQD: Tensor, weight_LD: Tensor, bias_D: Tensor | None, neighbours: Neighbours, *, turned: bool) -> Tensor:
    cells, channels = x_BVQQD.shape[-2:]
    out_BVQQD, patches = torch.empty_like(x_BVQQD), neighbours.places_BV.numel()
    lanes = min(LANES, triton.next_power_of_2(cells * channels))
    at_once = 8 if cells <= 2 and x_BVQQD.element_size() == 2 else 4  # lanes of each row in a thread's registers
    blocks = at_once * 32 * WARPS // lanes
    programs = triton.cdiv(patches, blocks) * triton.cdiv(cells * channels, lanes)
    with torch.cuda.device_of(x_BVQQD):
        _convolve[(programs,)](
            x_BVQQD, weight_LD, bias_D, out_BVQQD, *neighbours, patches, neighbours.slots_BRS.shape[2],
            Q=cells, D=channels, K=_side(weight_LD), TURNED=turned, BIASED=bias_D is not None, P=blocks, L=lanes,
            **OPTIONS,
        )  # fmt: skip
    return out_BVQQD


def _correlated(x_BVQQD: Tensor, grad_BVQQD: Tensor, kernel: int, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
    """The gradients of weight (D, 1, K, K) and bias (D,), in float32."""
    (cells, channels), patches = x_BVQQD.shape[-2:], neighbours.places_BV.numel()
    lanes, columns = min(LANES, triton.next_power_of_2(cells * channels)), triton.next_power_of_2(kernel + 1)
    tiles = triton.cdiv(cells * channels, lanes)
    share = triton.cdiv(patches, triton.cdiv(PROGRAMS, tiles))
    parts = triton.cdiv(patches, share)
    sums = x_BVQQD.new_empty(parts, kernel, columns, cells, channels, dtype=torch.float32)
    with torch.cuda.device_of(x_BVQQD):
        _correlate[(parts * tiles,)](
            x_BVQQD, grad_BVQQD, sums, *neighbours, patches, neighbours.slots_BRS.shape[2], share,
            Q=cells, D=channels, K=kernel, T=columns, L=lanes, **OPTIONS,
        )  # fmt: skip
    sums_KTD = sums.sum((0, 3))
    return sums_KTD[:, :kernel].permute(2, 0, 1)[:, None].contiguous(), sums_KTD[0, kernel]
