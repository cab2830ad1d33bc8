"""The state-space dual recurrence in both directions at once.

    y[t] = (F[t] C[t] + R[t] C[t] + D x[t]) silu(z[t])          D and z where given

F is the state of `ssd_scan` from a row's first event to its last, R that of the same scan from its last to its first.
Events and what reads them are shared; steps and decays are each direction's own. Both states hold the event itself.

Shapes: B rows, T events in all, H heads, P channels of a head, N state per channel, G groups; directions are forward
and backward, in this order. The mathematics takes the letters of `ssd_scan`.
Source: Dao & Gu 2024, arXiv:2405.21060, for each direction; Hwang et al. 2024, Hydra, arXiv:2407.09941, for their sum.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.launch import check_tensors
from ssd_torchrec.ops.ssd_scan import check_scan, skip_and_gate, ssd_scan_chunked, ssd_scan_definition
from ssd_torchrec.ops.ssd_triton import ssd_scan_bidirectional_triton


def _sum_of_both(
    scan: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    layout: JaggedLayout,
    dt_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
) -> Tensor:
    bias = [None, None] if dt_bias is None else dt_bias.unbind()
    forward, backward = (
        scan(x, dt[:, way], A[way], B, C, layout, dt_bias=bias[way], reverse=way == 1) for way in (0, 1)
    )
    return skip_and_gate(forward + backward, x, D, z).to(x.dtype)


def ssd_scan_bidirectional_definition(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    layout: JaggedLayout,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """The definition, one event at a time and one direction after the other; in fp64 the truth."""
    return _sum_of_both(ssd_scan_definition, x, dt, A, B, C, layout, dt_bias, D, z)


def ssd_scan_bidirectional_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    layout: JaggedLayout,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """Chunk by chunk, one direction after the other."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # so that the sum of both is rounded once
    return _sum_of_both(ssd_scan_chunked, wide, dt, A, B, C, layout, dt_bias, D, z).to(x.dtype)


def ssd_scan_bidirectional(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    layout: JaggedLayout,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """Selective state-space recurrence within each row, in both directions; no state crosses a row boundary.

    Args:
        x: (T, H, P) what enters the states, scaled by the steps.
        dt: (T, 2, H) raw steps forward and backward, before bias and softplus.
        A: (2, H) natural logs of the decays of a unit step, at most 0.
        B: (T, G, N) direction in which an event enters the states; G divides H.
        C: (T, G, N) direction in which they are read.
        dt_bias: (2, H) added to `dt`.
        D: (H,) skip from `x` to the output, once.
        z: (T, H, P) gate; the output is multiplied by silu(z).

    Returns:
        (T, H, P) in the dtype of `x`; summed in fp32, or in fp64 if `x` is.

    Raises:
        JaggedLayoutError: a tensor of events does not hold the events of `layout`.
        ShapeError: shapes do not fit each other, `A` is above 0 (looked at on the CPU only: on CUDA it is trusted), or
            a head's state is larger than the kernels hold, 64 x 128 on CUDA.
        DtypeError: on CUDA, tensors are neither fp64 nor of a dtype that kernels take, or not on one device.

    Deterministic. Takes the definition if `x` is fp64; else has no second derivative. Rows of at most 32 events cost on
    CUDA about what one direction does.
    """
    if dt.ndim != 3 or dt.shape[1] != 2:
        raise ShapeError(
            f"dt must be (T, 2, H), got {tuple(dt.shape)}; stack the steps of both directions at dimension 1"
        )
    check_shape("A", A, (2, dt.shape[2]), "give each direction of each head one value")
    check_shape("dt_bias", dt_bias, (2, dt.shape[2]), "give each direction of each head one value")
    for way in (0, 1):
        bias = None if dt_bias is None else dt_bias[way]
        check_scan(x, dt[:, way], A[way], B, C, layout, bias, D, z, None)
    if x.dtype == torch.float64:
        scan = ssd_scan_bidirectional_definition
    elif x.is_cuda:
        check_tensors(
            "ssd_scan_bidirectional", x, {"dt": dt, "A": A, "B": B, "C": C, "dt_bias": dt_bias, "D": D, "z": z}
        )
        scan = ssd_scan_bidirectional_triton
    else:
        scan = ssd_scan_bidirectional_chunked
    return scan(x, dt, A, B, C, layout, dt_bias=dt_bias, D=D, z=z)
