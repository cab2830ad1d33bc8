"""The outputs of the state-space scan in one direction, row by row, the state in registers from chunk to chunk.

    y[i] = sum_j (C[i] . B[j]) between(i, j) delta[j] x[j]  +  entering(i) S C[i]  +  D x[i]        and times silu(z[i])
    S    = whole S + sum_j leaving(j) delta[j] x[j] B[j]^T                                          after each chunk

Each tensor is read once and no state is written, which pays where rows are many and none is long: a row is one program
a head, whatever its length.

Shapes: B rows, T events in all, H heads, P channels of a head, N state per channel, G groups. States are (H, P, N).
Source: Dao & Gu 2024, arXiv:2405.21060, section 6, with chunks that never span two rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_torchrec.ops.launch import dot_precision
from ssd_torchrec.ops.ssd_chunk import between, reach_of, steps_of
from ssd_torchrec.ops.ssd_output import Inputs
from ssd_torchrec.ops.ssd_sizes import Sizes, block


@triton.jit
def _serial_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    dt_bias_ptr,
    D_ptr,
    z_ptr,
    first_ptr,
    offsets_ptr,
    y_ptr,
    ungated_ptr,
    last_ptr,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr,
    KEEP_UNGATED: tl.constexpr,
    PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program = row * H + head."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    begin = tl.load(offsets_ptr + row)
    length = (tl.load(offsets_ptr + row + 1) - begin).to(tl.int32)
    q = tl.arange(0, CHUNK)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    kept = q[:, None] <= q[None, :] if REVERSE else q[:, None] >= q[None, :]
    state_at = (row * H + head) * (P * N) + p[None, :] * N + n[:, None]
    in_state = (n < N)[:, None] & (p < P)[None, :]
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + state_at, mask=in_state, other=0.0).to(tl.float32)
    B_ptr += (head // PER_GROUP) * N
    C_ptr += (head // PER_GROUP) * N
    skip = 0.0
    if HAS_D:
        skip = tl.load(D_ptr + head).to(tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(0, chunks):
        chunk = chunks - 1 - step if REVERSE else step
        t = begin + chunk * CHUNK
        here = q < length - chunk * CHUNK
        in_keys = here[:, None] & (n < N)[None, :]
        in_x = here[:, None] & (p < P)[None, :]
        x_at = x_ptr + t * x_stride + head * P
        x = tl.load(x_at + q[:, None] * x_stride + p[None, :], mask=in_x, other=0.0)
        B = tl.load(B_ptr + t * B_stride + q[:, None] * B_stride + n[None, :], mask=in_keys, other=0.0)
        C = tl.load(C_ptr + t * C_stride + q[:, None] * C_stride + n[None, :], mask=in_keys, other=0.0)
        bias_ptr = dt_bias_ptr + head if HAS_BIAS else None
        _, delta, log_decay = steps_of(
            dt_ptr + t * dt_stride + head, A_ptr + head, bias_ptr, q, dt_stride, here, HAS_BIAS, PRECISE
        )
        high, low, entering, leaving, whole = reach_of(log_decay, REVERSE, PRECISE)
        decays = between(high[:, None], low[:, None], high[None, :], low[None, :], kept, PRECISE)
        products = tl.dot(C, tl.trans(B), input_precision=PRECISION) * decays * delta[None, :]  # (i, j)
        y = tl.dot(products.to(x.dtype), x, input_precision=PRECISION)
        y += tl.dot(C, state.to(x.dtype), input_precision=PRECISION) * entering[:, None]
        departing = (x * (delta * leaving)[:, None]).to(x.dtype)
        state = state * whole + tl.dot(tl.trans(B), departing, input_precision=PRECISION)
        if HAS_D:
            y += x.to(tl.float32) * skip
        out_at = t * (H * P) + q[:, None] * (H * P) + head * P + p[None, :]
        if KEEP_UNGATED:
            tl.store(ungated_ptr + out_at, y.to(ungated_ptr.dtype.element_ty), mask=in_x)
        if HAS_Z:
            z_at = z_ptr + t * z_stride + head * P
            z = tl.load(z_at + q[:, None] * z_stride + p[None, :], mask=in_x, other=0.0).to(tl.float32)
            y *= z * tl.sigmoid(z)
        tl.store(y_ptr + out_at, y.to(y_ptr.dtype.element_ty), mask=in_x)
    if HAS_LAST:
        tl.store(last_ptr + state_at, state, mask=in_state)


def serial_outputs(
    inputs: Inputs,
    z: Tensor | None,
    first: Tensor | None,
    sizes: Sizes,
    *,
    keep_last: bool,
    keep_ungated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, in the one direction that `inputs` name.

    Args:
        z: (T, H, P) gate before its SiLU.
        first: (B, H, P, N) before each row's first event in the order of the scan; 0 where None.
        keep_last: whether the states after the rows are asked for.
        keep_ungated: whether outputs before the gate are asked for.

    Returns:
        (T, H, P) in the dtype of `x`; (B, H, P, N) fp32, empty unless `keep_last`; and the outputs before the gate,
        empty unless `keep_ungated`.
    """
    x, B, rows = inputs.x, inputs.B, inputs.offsets.numel() - 1
    (T, H, P), (_, G, N) = x.shape, B.shape
    y, ungated = x.new_empty(T, H, P), x.new_empty(T if keep_ungated else 0, H, P)
    last = x.new_empty(rows if keep_last else 0, H, P, N, dtype=torch.float32)
    constants: dict[str, Any] = {
        "H": H,
        "P": P,
        "N": N,
        "PER_GROUP": H // G,
        "CHUNK": sizes.chunk,
        "BLOCK_P": block(P),
        "BLOCK_N": block(N),
        "REVERSE": inputs.backward,
        "HAS_BIAS": inputs.dt_bias is not None,
        "HAS_D": inputs.D is not None,
        "HAS_Z": z is not None,
        "HAS_FIRST": first is not None,
        "HAS_LAST": keep_last,
        "KEEP_UNGATED": keep_ungated,
        "PRECISE": x.dtype == torch.float32,
        "PRECISION": dot_precision(x.dtype),
        "num_warps": sizes.warps,
        "num_stages": 1,
    }
    _serial_kernel[(rows * H,)](
        x,
        inputs.dt,
        inputs.A,
        B,
        inputs.C,
        inputs.dt_bias,
        inputs.D,
        z,
        first,
        inputs.offsets,
        y,
        ungated,
        last,
        x.stride(0),
        inputs.dt.stride(0),
        B.stride(0),
        inputs.C.stride(0),
        0 if z is None else z.stride(0),
        **constants,
    )
    return y, last, ungated
