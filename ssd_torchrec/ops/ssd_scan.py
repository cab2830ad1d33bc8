"""State-space dual recurrence (Mamba-2) within each row of a jagged batch.

    delta[t] = softplus(dt[t] + dt_bias)                             above 0; softplus(v) = v where v > 20
    S[t]     = exp(A delta[t]) S[t-1] + delta[t] x[t] B[t]^T         before a row's first event: initial_state, or 0
    y[t]     = (S[t] C[t] + D x[t]) silu(z[t])                       D and z where given

Shapes: B rows, T events in all, H heads, P channels of a head, N state per channel, G groups. The mathematics takes the
letters A (H,) decay rate, B and C (T, G, N) how an event enters and reads the state, D (H,) skip; head h reads group
h * G // H. Backwards, t-1 is t+1 and a row's first event its last.
Source: Dao & Gu 2024, arXiv:2405.21060, sections 5 and 6.
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
from ssd_torchrec.ops.launch import check_tensors
from ssd_torchrec.ops.precision import sum_dtype
from ssd_torchrec.ops.ssd_chunked import chunked_scan
from ssd_torchrec.ops.ssd_triton import ssd_scan_triton


def ssd_scan_definition(
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
    decay = (delta * A).exp()[..., None, None]  # (T, H, 1, 1)
    share = x.shape[1] // B.shape[1]  # heads of a group
    B_heads, C_heads = (t.repeat_interleave(share, dim=1)[:, :, None] for t in (B, C))  # (T, H, 1, N)
    initial = x.new_zeros(layout.num_rows, *x.shape[1:], B.shape[-1]) if initial_state is None else initial_state
    nothing = torch.stack([t[:0].sum() for t in (x, decay, B, C, initial)]).sum()  # 0, and in the graph of every input
    decays, entering, reading = decay.unbind(), ((delta[..., None] * x)[..., None] * B_heads).unbind(), C_heads.unbind()
    y, final = [], []
    for state, (start, stop) in zip(initial.unbind(), pairwise(layout.offsets.tolist()), strict=True):
        outputs = []
        for t in range(stop - 1, start - 1, -1) if reverse else range(start, stop):
            state = decays[t] * state + entering[t]
            outputs.append((state * reading[t]).sum(-1))
        y += reversed(outputs) if reverse else outputs
        final.append(state + nothing)
    out = torch.stack(y) if y else x + nothing
    out = skip_and_gate(out, x, D, z).to(x.dtype)
    if not return_final_state:
        return out
    return out, (torch.stack(final) if final else initial + nothing).to(sum_dtype(x))


def ssd_scan_chunked(
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
    chunk: int | None = None,
) -> Any:
    """All rows at once, `chunk` events at a time; if None, as many as measured best, see `benchmarks/ops.py`."""
    state_is_small = x.shape[-1] * B.shape[-1] <= 1024  # made once a chunk: the larger it is, the longer chunks pay
    if chunk is None:
        short = 8 if layout.num_events <= 8 * layout.num_rows else 16  # rows of a few events would fill few slots of 16
        chunk = short if state_is_small or layout.longest <= 32 else 32
    table = chunk_table(layout, chunk, reverse=reverse)
    dtype = sum_dtype(x)
    events = x.to(dtype)
    delta = _step(dt.to(dtype), dt_bias)
    initial = None if initial_state is None else initial_state.to(dtype)
    y, final = chunked_scan(
        events,
        delta.to(dtype),
        A.to(dtype),
        B.to(dtype),
        C.to(dtype),
        table,
        initial_state=initial,
        keep_final=return_final_state,
    )
    y = skip_and_gate(y, events, D, z).to(x.dtype)
    return (y, final) if return_final_state else y


def _step(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    return F.softplus(dt if dt_bias is None else dt + dt_bias)


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) silu(z), with D and z where given."""
    if D is not None:
        y = y + D[:, None] * x
    return y if z is None else y * F.silu(z.to(y.dtype))


def check_scan(
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
    """Refuse what `ssd_scan` documents that it refuses, for every path."""
    layout.check(x)
    if x.ndim != 3 or B.ndim != 3 or not B.shape[1] or x.shape[1] % B.shape[1]:
        raise ShapeError(
            f"x must be (T, H, P) and B (T, G, N) with H a multiple of G, got {tuple(x.shape)} and {tuple(B.shape)}; "
            "split channels into heads and groups with unflatten"
        )
    T, H, P = x.shape
    check_shape("dt", dt, (T, H), "give each head of each event one step")
    check_shape("B", B, (T, *B.shape[1:]), "take x and B from the same events")
    check_shape("C", C, tuple(B.shape), "B and C share groups and state size")
    for name, parameter in {"A": A, "dt_bias": dt_bias, "D": D}.items():
        check_shape(name, parameter, (H,), "give each head of x one value")
    check_shape("z", z, (T, H, P), "gate each channel of x")
    check_shape("initial_state", initial_state, (layout.num_rows, H, P, B.shape[2]), "give each row a state")
    if A.device.type == "cpu" and bool((A > 0).any()):
        raise ShapeError(f"A must be at most 0, got {A.max().item():.6g}; pass -A_log.exp()")


def ssd_scan(
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
        x: (T, H, P) what enters the state, scaled by the step.
        dt: (T, H) raw steps, before bias and softplus; a time gate multiplies them before the call.
        A: (H,) natural log of the decay of a unit step, at most 0.
        B: (T, G, N) direction in which an event enters the state; G divides H.
        C: (T, G, N) direction in which it is read.
        dt_bias: (H,) added to `dt`.
        D: (H,) skip from `x` to the output.
        z: (T, H, P) gate; the output is multiplied by silu(z).
        reverse: run from each row's last event to its first.
        initial_state: (B, H, P, N) before each row's first event, or after its last if `reverse`; 0 if None.
        return_final_state: also return the state after each row's last event, or at its first if `reverse`.

    Returns:
        (T, H, P) in the dtype of `x`; summed in fp32, or in fp64 if `x` is. With `return_final_state` also
        (B, H, P, N) in the dtype of the sums; a row without events keeps its initial state.

    Raises:
        JaggedLayoutError: a tensor of events does not hold the events of `layout`.
        ShapeError: shapes do not fit each other, `A` is above 0 (looked at on the CPU only: on CUDA it is trusted), or
            a head's state is larger than the kernels hold, 64 x 128 on CUDA.
        DtypeError: on CUDA, tensors are neither fp64 nor of a dtype that kernels take, or not on one device.

    Deterministic; other rows change a row's result by rounding at most. Takes the definition if `x` is fp64; else has
    no second derivative.
    """
    check_scan(x, dt, A, B, C, layout, dt_bias, D, z, initial_state)
    if x.dtype == torch.float64:
        scan = ssd_scan_definition
    elif x.is_cuda:
        others = {"dt": dt, "A": A, "B": B, "C": C, "dt_bias": dt_bias, "D": D, "z": z, "initial_state": initial_state}
        check_tensors("ssd_scan", x, others)
        scan = ssd_scan_triton
    else:
        scan = ssd_scan_chunked
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
