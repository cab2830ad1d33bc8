"""The gated norm in Triton: each event is read once on the way there, and once on the way back.

    out[t] = u r w                              u = y silu(z), r = 1 / sqrt(m), m = mean(u^2) + eps
    du[t]  = r (dn - u mean(u dn) / m)          dn = dout w
    dy[t]  = du silu(z)                         dz[t] = du y silu'(z)
    dw     = sum_t dout u r

Means are over the channels of a group. A program takes whole groups of some events, so no mean leaves it, and nothing
but the inputs is kept for the gradient. u is divided by m in one go: u r, twice, would carry the rounding of r into a
difference of near equals. Backwards a bounded number of programs walk over the events, each sums its share of dw in
registers, and the shares are added at the end: no atomics, so the same sum each time.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.ops.launch import inner_contiguous
from ssd_torchrec.ops.registry import refuse_double_backward, register

WIDEST_GROUP = 8192
"""Channels of a group that one program holds."""

TILE = 1024
"""Values of a tile, if a group is no wider: eight for each thread of four warps."""

BACKWARD_WARPS = 16 * 132
"""Warps of all programs of the gradient together, 16 on each processor of a Hopper; the shares of dw depend on it."""


@triton.jit
def _load_tile(ptr, t, e, STRIDE: tl.constexpr, inside):
    return tl.load(ptr + t[:, None] * STRIDE + e[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -1.4426950408889634))  # tl.sigmoid takes four instructions more


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    y_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    T,
    eps,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    EVENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WIDTH: tl.constexpr = E // GROUPS
    group = tl.program_id(0) % GROUPS
    t = (tl.program_id(0) // GROUPS).to(tl.int64) * EVENTS + tl.arange(0, EVENTS)
    channel = tl.arange(0, BLOCK)
    e = group * WIDTH + channel
    inside = (t < T)[:, None] & (channel < WIDTH)[None, :]
    y = _load_tile(y_ptr, t, e, Y_STRIDE, inside)
    z = _load_tile(z_ptr, t, e, Z_STRIDE, inside)
    weight = tl.load(weight_ptr + e, mask=channel < WIDTH, other=0.0).to(tl.float32)
    u = y * z * _sigmoid(z)
    scale = tl.rsqrt(tl.sum(u * u, axis=1) / WIDTH + eps)[:, None]
    tl.store(out_ptr + t[:, None] * E + e[None, :], u * scale * weight[None, :], mask=inside)


@triton.jit(do_not_specialize=["T", "programs"])
def _backward_kernel(
    dout_ptr,
    y_ptr,
    z_ptr,
    weight_ptr,
    dy_ptr,
    dz_ptr,
    share_ptr,
    T,
    programs,
    eps,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    DOUT_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    EVENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WIDTH: tl.constexpr = E // GROUPS
    program, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    channel = tl.arange(0, BLOCK)
    e = group * WIDTH + channel
    weight = tl.load(weight_ptr + e, mask=channel < WIDTH, other=0.0).to(tl.float32)
    dweight = tl.zeros([EVENTS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(T, EVENTS), programs):
        t = tl.arange(0, EVENTS).to(tl.int64) + tile * EVENTS
        inside = (t < T)[:, None] & (channel < WIDTH)[None, :]
        dout = _load_tile(dout_ptr, t, e, DOUT_STRIDE, inside)
        y = _load_tile(y_ptr, t, e, Y_STRIDE, inside)
        z = _load_tile(z_ptr, t, e, Z_STRIDE, inside)
        share_open = _sigmoid(z)
        gate = z * share_open
        u = y * gate
        mean_square = tl.where(t < T, tl.sum(u * u, axis=1) / WIDTH + eps, 1.0)[:, None]  # eps may be 0
        scale = tl.rsqrt(mean_square)
        dweight += dout * (u * scale)
        dnormed = dout * weight[None, :]
        along = tl.sum(u * dnormed, axis=1)[:, None] / WIDTH
        du = (dnormed - u * (along / mean_square)) * scale
        tl.store(dy_ptr + t[:, None] * E + e[None, :], du * gate, mask=inside)
        dz = du * y * (share_open + gate * (1 - share_open))
        tl.store(dz_ptr + t[:, None] * E + e[None, :], dz, mask=inside)
    tl.store(share_ptr + program * E + e, tl.sum(dweight, axis=0), mask=channel < WIDTH)


def _tile(width: int) -> dict[str, Any]:
    """Of groups of `width` channels: how many events a tile takes, and how many threads share it."""
    block = triton.next_power_of_2(width)
    return {"EVENTS": max(1, TILE // block), "BLOCK": block, "num_warps": min(max(block // 512, 4), 16)}


def _launch_forward(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    out = y.new_empty(y.shape)
    if not out.numel():
        return out
    events, width = y.shape
    y, z, weight = inner_contiguous(y), inner_contiguous(z), weight.contiguous()
    options = {"E": width, "GROUPS": groups, "Y_STRIDE": y.stride(0), "Z_STRIDE": z.stride(0), **_tile(width // groups)}
    grid = (math.ceil(events / options["EVENTS"]) * groups,)
    with torch.cuda.device_of(y):
        _forward_kernel[grid](y, z, weight, out, events, eps, **options)
    return out


def _launch_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    dy, dz = y.new_empty(y.shape), z.new_empty(z.shape)
    if not dy.numel():
        return dy, dz, weight.new_zeros(weight.shape, dtype=torch.float32)
    events, width = y.shape
    dout, y, z, weight = inner_contiguous(dout), inner_contiguous(y), inner_contiguous(z), weight.contiguous()
    options = {"E": width, "GROUPS": groups, "Y_STRIDE": y.stride(0), "Z_STRIDE": z.stride(0), **_tile(width // groups)}
    options["DOUT_STRIDE"] = dout.stride(0)
    most = max(1, BACKWARD_WARPS // options["num_warps"] // groups)
    programs = min(most, math.ceil(events / options["EVENTS"]))
    shares = y.new_empty(programs, width, dtype=torch.float32)
    with torch.cuda.device_of(y):
        _backward_kernel[programs * groups,](dout, y, z, weight, dy, dz, shares, events, programs, eps, **options)
    return dy, dz, shares.sum(0)


register(
    "gated_norm(Tensor y, Tensor z, Tensor weight, float eps, int groups) -> Tensor",
    _launch_forward,
    fake=lambda y, *_: y.new_empty(y.shape),
)
register(
    "gated_norm_backward(Tensor dout, Tensor y, Tensor z, Tensor weight, float eps, int groups) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_backward,
    fake=lambda dout, y, z, weight, *_: (
        y.new_empty(y.shape),
        z.new_empty(z.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
    ),
)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.eps, ctx.groups = eps, groups
        return torch.ops.ssd_torchrec.gated_norm(y, z, weight, eps, groups)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("gated_norm")
        y, z, weight = ctx.saved_tensors
        dy, dz, dweight = torch.ops.ssd_torchrec.gated_norm_backward(*grad_outputs, y, z, weight, ctx.eps, ctx.groups)
        return dy, dz, dweight.to(weight.dtype), None, None


def gated_norm_triton(y: Tensor, z: Tensor, weight: Tensor, *, eps: float, groups: int = 1) -> Tensor:
    """The kernels: whole groups of an event in one program, sums in fp32.

    Raises:
        ShapeError: a group has more channels than a program holds.
    """
    if y.shape[1] > WIDEST_GROUP * groups:
        raise ShapeError(
            f"a group must have at most {WIDEST_GROUP} channels on the GPU, got {y.shape[1] // groups}; use more groups"
        )
    return _GatedNorm.apply(y, z, weight, eps, groups)
