"""The outputs of the state-space scan, chunk by chunk, given the states that come into the chunks.

    y[i] = sum_j (C[i] . B[j]) between(i, j) delta[j] x[j]  +  entering(i) S C[i]  +  D x[i]        and times silu(z[i])

One way sums over j up to i, the other over j from i on. Both at once are one matrix of weights, so that x, B and C are
read once and multiplied once.

Shapes: B rows, T events in all, H heads, P channels of a head, N state per channel, G groups. S is (H, P, N) a slot.
Source: Dao & Gu 2024, arXiv:2405.21060, section 6.
"""

# Checkers read a kernel as Python: loads return nothing, ranges of the compiler are no iterators.
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_torchrec.ops.launch import dot_precision
from ssd_torchrec.ops.ssd_chunk import between, chunk_of_slot, num_slots, reach_of, steps_of
from ssd_torchrec.ops.ssd_sizes import Sizes, block


@triton.jit
def _one_way(
    y,
    C,
    dt_ptr,
    A_ptr,
    dt_bias_ptr,
    state_ptr,
    carried,
    here,
    dt_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head in one direction: `y` with what its state brings, and the weights of B and C's products."""
    q = tl.arange(0, CHUNK)
    _, delta, log_decay = steps_of(dt_ptr, A_ptr, dt_bias_ptr, q, dt_stride, here, HAS_BIAS, PRECISE)
    high, low, entering, _, _ = reach_of(log_decay, REVERSE, PRECISE)
    kept = q[:, None] <= q[None, :] if REVERSE else q[:, None] >= q[None, :]
    weights = between(high[:, None], low[:, None], high[None, :], low[None, :], kept, PRECISE) * delta[None, :]
    if not WHOLE:
        if carried:
            n = tl.arange(0, BLOCK_N)[:, None]
            p = tl.arange(0, BLOCK_P)[None, :]
            state = tl.load(state_ptr + p * N + n, mask=(n < N) & (p < P), other=0.0)  # (N, P)
            y += tl.dot(C, state, input_precision=PRECISION) * entering[:, None]
    return y, weights


@triton.jit(do_not_specialize=["rows"])
def _output_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    dt_bias_ptr,
    D_ptr,
    z_ptr,
    forward_ptr,
    backward_ptr,
    offsets_ptr,
    y_ptr,
    ungated_ptr,
    rows,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PER_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    KEEP_UNGATED: tl.constexpr,
    PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a chunk and HEADS heads of one group, one after the other. WHOLE: each row is one chunk."""
    BLOCKS: tl.constexpr = H // HEADS
    slot = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first_head = (tl.program_id(0) % BLOCKS) * HEADS
    begin, left, chunk = chunk_of_slot(offsets_ptr, rows, slot, CHUNK, WHOLE)
    if left <= 0:
        return
    has_past = (chunk > 0) | HAS_FIRST
    has_future = (left > CHUNK) | HAS_FIRST
    q = tl.arange(0, CHUNK)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    here = q < left.to(tl.int32)
    in_keys = here[:, None] & (n < N)[None, :]
    in_x = here[:, None] & (p < P)[None, :]
    group = first_head // PER_GROUP
    B = tl.load(B_ptr + begin * B_stride + group * N + q[:, None] * B_stride + n[None, :], mask=in_keys, other=0.0)
    C = tl.load(C_ptr + begin * C_stride + group * N + q[:, None] * C_stride + n[None, :], mask=in_keys, other=0.0)
    product = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # (i, j)
    x_ptr += begin * x_stride
    dt_ptr += begin * dt_stride
    for number in range(0, HEADS):
        head = first_head + number
        x = tl.load(x_ptr + q[:, None] * x_stride + head * P + p[None, :], mask=in_x, other=0.0)
        y = tl.zeros([CHUNK, BLOCK_P], tl.float32)
        weights = tl.zeros([CHUNK, CHUNK], tl.float32)
        state_at = (slot * H + head) * (P * N)
        if FORWARD:
            y, some = _one_way(
                y,
                C,
                dt_ptr + head,
                A_ptr + head,
                dt_bias_ptr + head if HAS_BIAS else None,
                forward_ptr + state_at,
                has_past,
                here,
                dt_stride,
                P=P,
                N=N,
                CHUNK=CHUNK,
                BLOCK_P=BLOCK_P,
                BLOCK_N=BLOCK_N,
                REVERSE=False,
                WHOLE=WHOLE,
                HAS_BIAS=HAS_BIAS,
                PRECISE=PRECISE,
                PRECISION=PRECISION,
            )
            weights += some
        if BACKWARD:
            of_head = head + FORWARD * H
            y, some = _one_way(
                y,
                C,
                dt_ptr + of_head,
                A_ptr + of_head,
                dt_bias_ptr + of_head if HAS_BIAS else None,
                backward_ptr + state_at,
                has_future,
                here,
                dt_stride,
                P=P,
                N=N,
                CHUNK=CHUNK,
                BLOCK_P=BLOCK_P,
                BLOCK_N=BLOCK_N,
                REVERSE=True,
                WHOLE=WHOLE,
                HAS_BIAS=HAS_BIAS,
                PRECISE=PRECISE,
                PRECISION=PRECISION,
            )
            weights += some
        y += tl.dot((product * weights).to(x.dtype), x, input_precision=PRECISION)
        if HAS_D:
            y += x.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
        out_at = begin * (H * P) + q[:, None] * (H * P) + head * P + p[None, :]
        if KEEP_UNGATED:
            tl.store(ungated_ptr + out_at, y.to(ungated_ptr.dtype.element_ty), mask=in_x)
        if HAS_Z:
            z_at = begin * z_stride + q[:, None] * z_stride + head * P + p[None, :]
            z = tl.load(z_ptr + z_at, mask=in_x, other=0.0).to(tl.float32)
            y *= z * tl.sigmoid(z)
        tl.store(y_ptr + out_at, y.to(y_ptr.dtype.element_ty), mask=in_x)


class Inputs(NamedTuple):
    """Tensors of a scan in one direction or in both, as kernels see them: in events, numbers side by side."""

    x: Tensor  # (T, H, P)
    dt: Tensor  # (T, directions * H)
    A: Tensor  # (directions * H,) fp32
    B: Tensor  # (T, G, N) in the dtype of x
    C: Tensor  # (T, G, N) in the dtype of x
    offsets: Tensor  # (B+1,) int64
    dt_bias: Tensor | None  # (directions * H,)
    D: Tensor | None  # (H,)
    forward: bool  # whether a scan runs from each row's first event to its last
    backward: bool  # whether one runs from its last to its first


def outputs(
    inputs: Inputs,
    z: Tensor | None,
    states: tuple[Tensor, Tensor],
    sizes: Sizes,
    *,
    has_first: bool,
    keep_ungated: bool,
) -> tuple[Tensor, Tensor]:
    """All chunks.

    Args:
        z: (T, H, P) gate before its SiLU.
        states: (slots, H, P, N) that come into the chunks forward and backward; unused where there is no such scan, and
            where `sizes.whole`.
        has_first: whether a row's first chunk has a state.
        keep_ungated: whether outputs before the gate are asked for.

    Returns:
        (T, H, P) in the dtype of `x`; and the same before the gate, empty unless `keep_ungated`.
    """
    x, B, rows = inputs.x, inputs.B, inputs.offsets.numel() - 1
    (T, H, P), (_, G, N) = x.shape, B.shape
    y = x.new_empty(T, H, P)
    ungated = x.new_empty(T if keep_ungated else 0, H, P)
    slots = rows if sizes.whole else num_slots(T, rows, sizes.chunk)
    constants: dict[str, Any] = {
        "H": H,
        "P": P,
        "N": N,
        "PER_GROUP": H // G,
        "HEADS": sizes.heads,
        "CHUNK": sizes.chunk,
        "BLOCK_P": block(P),
        "BLOCK_N": block(N),
        "FORWARD": inputs.forward,
        "BACKWARD": inputs.backward,
        "WHOLE": sizes.whole,
        "HAS_BIAS": inputs.dt_bias is not None,
        "HAS_D": inputs.D is not None,
        "HAS_Z": z is not None,
        "HAS_FIRST": has_first,
        "KEEP_UNGATED": keep_ungated,
        "PRECISE": x.dtype == torch.float32,
        "PRECISION": dot_precision(x.dtype),
        "num_warps": sizes.warps,
        "num_stages": 1,
    }
    _output_kernel[(slots * (H // sizes.heads),)](
        x,
        inputs.dt,
        inputs.A,
        B,
        inputs.C,
        inputs.dt_bias,
        inputs.D,
        z,
        *states,
        inputs.offsets,
        y,
        ungated,
        rows,
        x.stride(0),
        inputs.dt.stride(0),
        B.stride(0),
        inputs.C.stride(0),
        0 if z is None else z.stride(0),
        **constants,
    )
    return y, ungated
