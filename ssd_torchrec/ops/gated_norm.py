"""Gated root-mean-square norm of each event.

    u   = y silu(z)                                            gate first, then norm
    out = u / sqrt(mean(u^2) + eps) * weight                   mean over the channels of a group

Shapes: T events, E channels, in `groups` groups of E / groups.
Source: Dao & Gu 2024, arXiv:2405.21060, section 7.3, as its authors' code has it with norm_before_gate off.
"""

import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.precision import sum_dtype


def gated_norm_definition(y: Tensor, z: Tensor, weight: Tensor, *, eps: float, groups: int = 1) -> Tensor:
    """The definition, in the dtype of its inputs: any device, differentiable; in fp64 the truth."""
    u = (y * F.silu(z)).unflatten(-1, (groups, -1))  # (T, groups, E / groups)
    normed = u * (u.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed.flatten(-2) * weight).to(y.dtype)


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
        ShapeError: shapes do not fit each other, or `groups` does not divide E.

    Deterministic.
    """
    if y.ndim != 2 or groups < 1 or y.shape[1] % groups:
        raise ShapeError(
            f"y must be (T, E) with E a multiple of groups, got {tuple(y.shape)} and {groups} groups; change either"
        )
    check_shape("z", z, tuple(y.shape), "gate each channel of y")
    check_shape("weight", weight, (y.shape[1],), "scale each channel of y")
    wide = (t.to(sum_dtype(y)) for t in (y, z, weight))  # the definition is fast enough in fp32
    return gated_norm_definition(*wide, eps=eps, groups=groups).to(y.dtype)
