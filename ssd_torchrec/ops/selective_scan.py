"""Selective state-space recurrence (Mamba-1) within each row of a jagged batch.

    delta[t] = softplus(dt[t] + dt_bias)                             above 0; softplus(v) = v where v > 20
    S[t]     = exp(delta[t] A) S[t-1] + delta[t] x[t] B[t]^T         before a row's first event: initial_state, or 0
    y[t]     = (S[t] C[t] + D x[t]) silu(z[t])                       D and z where given

Shapes: B rows, T events in all, E channels, N state per channel. The mathematics takes the letters A (E, N) decay rate,
B and C (T, N) how an event enters and reads the state, the same for all channels, D (E,) skip. Each channel has its own
step, and each number of its state its own rate. Backwards, t-1 is t+1 and a row's first event its last.
Source: Gu & Dao 2023, arXiv:2312.00752, section 3 and algorithm 2.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.chunks import chunk_table
from ssd_torchrec.ops.precision import sum_dtype
from ssd_torchrec.ops.selective_stepped import stepped_scan
from ssd_torchrec.ops.selective_triton import selective_scan_triton


def selective_scan_definition(
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
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """The definition, one event at a time: any device, any dtype, differentiable; in fp64 the truth."""
    delta = _step(dt, dt_bias)
    decays = (delta[..., None] * A).exp()  # (T, E, N)
    entering = (delta * x)[..., None] * B[:, None]  # (T, E, N)
    initial = x.new_zeros(layout.num_rows, *A.shape) if initial_state is None else initial_state
    nothing = torch.stack(
        [t[:0].sum() for t in (x, decays, entering, C, initial)]
    ).sum()  # 0, in the graph of each input
    y, final = [], []
    for state, (start, stop) in zip(initial.unbind(), pairwise(layout.offsets.tolist()), strict=True):
        outputs = []
        for t in range(stop - 1, start - 1, -1) if reverse else range(start, stop):
            state = decays[t] * state + entering[t]
            outputs.append((state * C[t]).sum(-1))
        y += reversed(outputs) if reverse else outputs
        final.append(state + nothing)
    out = torch.stack(y) if y else x + nothing
    out = _skip_and_gate(out, x, D, z).to(x.dtype)
    if not return_final_state:
        return out
    return out, (torch.stack(final) if final else initial + nothing).to(sum_dtype(x))


def selective_scan_stepped(
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
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """One event of every row at once, longest rows first: as many steps as the longest row has events."""
    dtype = sum_dtype(x)
    events = x.to(dtype)
    y, final = stepped_scan(
        events,
        _step(dt.to(dtype), dt_bias).to(dtype),
        A.to(dtype),
        B.to(dtype),
        C.to(dtype),
        chunk_table(layout, 1, reverse=reverse),
        initial_state=None if initial_state is None else initial_state.to(dtype),
    )
    y = _skip_and_gate(y, events, D, z).to(x.dtype)
    return (y, final) if return_final_state else y


def _step(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    return F.softplus(dt if dt_bias is None else dt + dt_bias)


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D * x
    return y if z is None else y * F.silu(z.to(y.dtype))


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    layout: JaggedLayout,
    dt_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    layout.check(x)
    if x.ndim != 2 or B.ndim != 2:
        raise ShapeError(
            f"x must be (T, E) and B (T, N), got {tuple(x.shape)} and {tuple(B.shape)}; channels have no heads here, "
            "and share B and C"
        )
    (T, E), N = x.shape, B.shape[1]
    check_shape("dt", dt, (T, E), "give each channel of each event one step")
    check_shape("A", A, (E, N), "give each channel of x a rate for each number of its state")
    check_shape("B", B, (T, N), "take x and B from the same events")
    check_shape("C", C, (T, N), "B and C share the state size")
    for name, parameter in {"dt_bias": dt_bias, "D": D}.items():
        check_shape(name, parameter, (E,), "give each channel of x one value")
    check_shape("z", z, (T, E), "gate each channel of x")
    check_shape("initial_state", initial_state, (layout.num_rows, E, N), "give each row a state")
    if A.device.type == "cpu" and bool((A > 0).any()):
        raise ShapeError(f"A must be at most 0, got {A.max().item():.6g}; pass -A_log.exp()")


def selective_scan(
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
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """Selective state-space recurrence within each row; state never crosses a row boundary.

    Args:
        x: (T, E) what enters the state, scaled by the step.
        dt: (T, E) raw steps, before bias and softplus.
        A: (E, N) natural log of the decay of a unit step, at most 0.
        B: (T, N) direction in which an event enters the state.
        C: (T, N) direction in which it is read.
        dt_bias: (E,) added to `dt`.
        D: (E,) skip from `x` to the output.
        z: (T, E) gate; the output is multiplied by silu(z).
        reverse: run from each row's last event to its first.
        initial_state: (B, E, N) before each row's first event, or after its last if `reverse`; 0 if None.
        return_final_state: also return the state after each row's last event, or at its first if `reverse`.

    Returns:
        (T, E) in the dtype of `x`; summed in fp32, or in fp64 if `x` is. With `return_final_state` also (B, E, N) in
        the dtype of the sums; a row without events keeps its initial state.

    Raises:
        JaggedLayoutError: a tensor of events does not hold the events of `layout`.
        ShapeError: shapes do not fit each other, the state is larger than the kernels hold (on CUDA only), or `A` is
            above 0 (looked at on the CPU only: on CUDA it is trusted).
        DtypeError: on CUDA, a tensor is of a dtype that the kernels do not take, or on another device.

    Deterministic; other rows change a row's result by rounding at most, on CUDA only by whether long rows are cut into
    pieces. Takes the definition if `x` is fp64; else has no second derivative.
    """
    _check(x, dt, A, B, C, layout, dt_bias, D, z, initial_state)
    if x.dtype == torch.float64:
        scan = selective_scan_definition
    else:
        scan = selective_scan_triton if x.is_cuda else selective_scan_stepped
    return scan(
        x,
        dt,
        A,
        B,
        C,
        layout,
        dt_bias=dt_bias,
        D=D,
        z=z,
        reverse=reverse,
        initial_state=initial_state,
        return_final_state=return_final_state,
    )
