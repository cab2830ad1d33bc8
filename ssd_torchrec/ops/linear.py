"""The linear map of each event, and its gradients, through the fastest products that the CPU has.

    y  = x weight^T + bias
    dx = dy weight          dweight = dy^T x          dbias = sum_t dy[t]

Shapes: T events, D channels in, E channels out. PyTorch gives fp32 products to MKL, which takes AVX2 on processors that
are not Intel's; oneDNN, which comes with PyTorch, asks what the processor can do.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.ops.registry import refuse_double_backward

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right.T + bias` of matrices on the CPU, without gradient.

    Args:
        left: (M, D); copied if its rows are not contiguous.
        right: (N, D), of any strides.
        bias: (N,) or None.
    """
    if HAS_ONEDNN and left.dtype == torch.float32 and left.numel() and right.numel():
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return left @ right.T if bias is None else torch.addmm(bias, left, right.T)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear")
        (dy,) = grad_outputs
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(dy, weight.T) if needs_x else None,
            over_events(dy, x) if needs_weight else None,
            dy.sum(0) if needs_bias else None,
        )


def over_events(dy: Tensor, x: Tensor) -> Tensor:
    """`dy.T @ x`, (E, D) of (T, E) and (T, D) on the CPU; turns the narrower one, which is copied for it."""
    return product(dy.T, x.T) if dy.shape[1] <= x.shape[1] else product(x.T, dy.T).T


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear map of each event.

    Args:
        x: (T, D).
        weight: (E, D).
        bias: (E,) or None.

    Returns:
        (T, E), as `torch.nn.functional.linear` has it, autocast and dtypes included.

    Deterministic. In fp32 on the CPU it has no second derivative.
    """
    is_fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if HAS_ONEDNN and x.device.type == "cpu" and x.ndim == 2 and is_fp32:
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)
