"""Gated root-mean-square norm of each event.

    u   = y silu(z)                                            gate first, then norm
    out = u / sqrt(mean(u^2) + eps) * weight                   mean over the channels of a group

Shapes: T events, E channels, in `groups` groups of E / groups.
Source: Dao & Gu 2024, arXiv:2405.21060, section 7.3, as its authors' code has it with norm_before_gate off.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.gated_norm_triton import gated_norm_triton
from ssd_torchrec.ops.launch import check_tensors
from ssd_torchrec.ops.precision import sum_dtype
from ssd_torchrec.ops.registry import refuse_double_backward


def gated_norm_definition(y: Tensor, z: Tensor, weight: Tensor, *, eps: float, groups: int = 1) -> Tensor:
    """The definition, in the dtype of its inputs: any device, differentiable; in fp64 the truth."""
    u = (y * F.silu(z)).unflatten(-1, (groups, -1))  # (T, groups, E / groups)
    normed = u * (u.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed.flatten(-2) * weight).to(y.dtype)


class _GatedNorm(torch.autograd.Function):
    """The gradient by hand: autograd's goes over the events half as often again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
        gate = F.silu(z)
        u = (y * gate).unflatten(-1, (groups, -1))
        scale = u.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (T, groups, 1)
        normed = u.mul_(scale).flatten(-2)
        ctx.save_for_backward(y, z, weight, gate, normed, scale)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("gated_norm")
        (dout,) = grad_outputs
        y, z, weight, gate, normed, scale = ctx.saved_tensors
        by_group = (scale.shape[1], -1)
        shares = dout * normed
        dweight = shares.sum(0)
        along = shares.mul_(weight).unflatten(-1, by_group).mean(-1, keepdim=True)  # (T, groups, 1) of u's length
        du = (dout * weight).unflatten(-1, by_group)
        du = du.addcmul_(normed.unflatten(-1, by_group), along, value=-1).mul_(scale).flatten(-2)
        return du * gate, torch.ops.aten.silu_backward(du * y, z), dweight, None, None


def gated_norm_by_hand(y: Tensor, z: Tensor, weight: Tensor, *, eps: float, groups: int = 1) -> Tensor:
    """The definition at least in fp32, with its gradient written down."""
    wide = (t.to(sum_dtype(y)) for t in (y, z, weight))
    return _GatedNorm.apply(*wide, eps, groups).to(y.dtype)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, *, eps: float, groups: int = 1) -> Tensor:
    """Norm of the gated events, channel group by channel group.

    Args:
        y: (T, E) events.
        z: (T, E) gate before its SiLU.
        weight: (E,) scale of each channel.
        eps: added to the mean square, at least 0.
        groups: a divisor of E.

    Returns:
        (T, E) in the dtype of `y`; computed in fp32, or in fp64 if `y` is.

    Raises:
        ShapeError: shapes do not fit each other, `groups` does not divide E, or on a GPU a group has more than 8192
            channels.
        DtypeError: `y` is none of fp64, fp32, bf16 and fp16, or another tensor is no floating point one or elsewhere.

    Deterministic. Takes the definition if `y` is fp64; else it has no second derivative.
    """
    if y.ndim != 2 or groups < 1 or y.shape[1] % groups:
        raise ShapeError(
            f"y must be (T, E) with E a multiple of groups, got {tuple(y.shape)} and {groups} groups; change either"
        )
    check_shape("z", z, tuple(y.shape), "gate each channel of y")
    check_shape("weight", weight, (y.shape[1],), "scale each channel of y")
    if y.dtype == torch.float64:
        return gated_norm_definition(y, z, weight, eps=eps, groups=groups)
    check_tensors("gated_norm", y, {"z": z, "weight": weight})
    norm = gated_norm_triton if y.is_cuda else gated_norm_by_hand
    return norm(y, z, weight, eps=eps, groups=groups)
