"""The gradients of the state-space scan, chunk by chunk, given what comes into the chunks from both of their sides.

With S the state that comes into a chunk, R the gradient of the one that leaves it, and w = between(i, j) delta[j]:

    dx[j]     = sum_i (C[i] . B[j]) w dy[i]  +  leaving(j) delta[j] R B[j]  +  D dy[j]
    dB[j]     = sum_i (x[j] . dy[i]) w C[i]  +  leaving(j) delta[j] x[j]^T R          summed over a group's heads
    dC[i]     = sum_j (x[j] . dy[i]) w B[j]  +  entering(i) dy[i]^T S                     likewise
    ddelta[j] = sum_i (C[i] . B[j]) (x[j] . dy[i]) between(i, j)  +  leaving(j) x[j]^T R B[j]  +  A da[j]

The gradient `da` of a log decay is the sum of all that spans it: from event to event, into an event, out of one, across
the chunk. An event's own product spans none and is left out, so that no small sum is a difference of large ones. All
matrices stand source by target: no product of the tensor cores is turned before it enters another one.

Shapes: B rows, T events in all, H heads, P channels of a head, N state per channel, G groups. S and R are (H, P, N).
"""

# Checkers read a kernel as Python: loads return nothing, ranges of the compiler are no iterators.
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_torchrec.ops.launch import dot_precision
from ssd_torchrec.ops.ssd_chunk import between, chunk_of_slot, log_decays, num_slots, reach_of, softplus
from ssd_torchrec.ops.ssd_output import Inputs
from ssd_torchrec.ops.ssd_sizes import Sizes, block


@triton.jit
def _lay_out_steps(
    steps_ptr,
    dt_ptr,
    A_ptr,
    dt_bias_ptr,
    here,
    dt_stride,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Steps and reaches of all heads of a program at once, kept for each in turn; raw steps and steps as well."""
    q = tl.arange(0, CHUNK)[:, None]
    h = tl.arange(0, BLOCK_HEADS)
    inside = here[:, None] & (h < HEADS)[None, :]
    raw = tl.load(dt_ptr + q * dt_stride + h[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias_ptr + h, mask=h < HEADS, other=0.0).to(tl.float32)[None, :]
    delta = tl.where(inside, softplus(raw, PRECISE), 0.0)
    A = tl.load(A_ptr + h, mask=h < HEADS, other=0.0).to(tl.float32)
    high, low, _, _, _ = reach_of(log_decays(delta, A[None, :], PRECISE), REVERSE, PRECISE)
    kept_at = steps_ptr + h[None, :] * CHUNK + q
    within = (h < HEADS)[None, :] & (q < CHUNK)
    tl.store(kept_at, delta, mask=within)
    if PRECISE:
        tl.store(kept_at + H * CHUNK, high.to(tl.float64) + low, mask=within)
    else:
        tl.store(kept_at + H * CHUNK, high, mask=within)
    return raw, delta


@triton.jit
def _one_way_gradients(
    x,
    dy,
    B,
    C,
    pairs,
    dx,
    dB,
    dC,
    steps_ptr,
    across_ptr,
    state_ptr,
    dstate_ptr,
    has_state,
    has_dstate,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head in one direction: adds to dx, dB and dC, returns the weights w, source by target, and leaves sums.

    In place of steps and reaches it leaves, for each event, the gradient of its step but for its decay's, and what
    spans decays as a target, less as a source, and as one that goes on beyond the chunk.
    """
    q = tl.arange(0, CHUNK)
    delta = tl.load(steps_ptr + q).to(tl.float32)
    reach = tl.load(steps_ptr + H * CHUNK + q)
    high = reach.to(tl.float32)
    low = (reach - high).to(tl.float32)
    kept = q[:, None] >= q[None, :] if REVERSE else q[:, None] <= q[None, :]
    decays = between(high[None, :], low[None, :], high[:, None], low[:, None], kept, PRECISE)
    spans = pairs * decays
    ddelta = tl.sum(spans, 1)
    spans = tl.where(q[:, None] != q[None, :], spans * delta[:, None], 0.0)
    if PRECISE:
        spans = spans.to(tl.float64)  # the two sums below meet as a difference
    as_target = tl.sum(spans, 0)
    as_source = -tl.sum(spans, 1)
    if not WHOLE:
        beyond = tl.zeros([CHUNK], tl.float32)
        across = 0.0
        if has_state | has_dstate:
            last: tl.constexpr = 0 if REVERSE else CHUNK - 1
            total = tl.load(steps_ptr + H * CHUNK + last)
            entering = tl.exp2(tl.minimum(high, 0.0))
            leaving = tl.exp2(tl.minimum((total - reach).to(tl.float32), 0.0))
            n = tl.arange(0, BLOCK_N)[None, :]
            p = tl.arange(0, BLOCK_P)[:, None]
            in_state = (n < N) & (p < P)
            state = tl.load(state_ptr + p * N + n, mask=in_state & has_state, other=0.0)  # (P, N)
            dstate = tl.load(dstate_ptr + p * N + n, mask=in_state & has_dstate, other=0.0)
            dy_state = tl.dot(dy, state, input_precision=PRECISION)  # (Q, N)
            dC += dy_state * entering[:, None]
            as_source += tl.sum(dy_state * C, 1) * entering
            x_dstate = tl.dot(x, dstate, input_precision=PRECISION)  # (Q, N)
            part = tl.sum(x_dstate * B, 1) * leaving
            ddelta += part
            beyond = part * delta
            departing = delta * leaving
            dB += x_dstate * departing[:, None]
            dx += tl.dot(B, tl.trans(dstate), input_precision=PRECISION) * departing[:, None]
            products = tl.dot(state, tl.trans(dstate), input_precision=PRECISION)  # (P, P), of which its diagonal
            products = tl.where(p == tl.arange(0, BLOCK_P)[None, :], products, 0.0)
            across = tl.exp2(total.to(tl.float32)) * tl.sum(tl.sum(products, 1), 0)
        tl.store(steps_ptr + 3 * H * CHUNK + q, beyond)
        tl.store(across_ptr, across)
    weights = decays * delta[:, None]
    tl.store(steps_ptr + q, ddelta)
    tl.store(steps_ptr + H * CHUNK + q, as_target)
    tl.store(steps_ptr + 2 * H * CHUNK + q, as_source)
    return weights, dx, dB, dC


@triton.jit
def _gather_sums(
    raw,
    delta,
    steps_ptr,
    across_ptr,
    A_ptr,
    ddt_ptr,
    dA_ptr,
    dt_bias_partial_ptr,
    here,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    DDT_STRIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Of all heads of a program at once: gradients of raw steps, and this chunk's part of those of A and dt_bias."""
    q = tl.arange(0, CHUNK)[:, None]
    h = tl.arange(0, BLOCK_HEADS)
    left_at = steps_ptr + h[None, :] * CHUNK + q
    within = (h < HEADS)[None, :] & (q < CHUNK)
    ddelta = tl.load(left_at, mask=within, other=0.0).to(tl.float32)
    up_to = tl.load(left_at + H * CHUNK, mask=within, other=0.0)
    up_to += tl.load(left_at + 2 * H * CHUNK, mask=within, other=0.0)
    dlog_decay = tl.cumsum(up_to, 0)
    if not REVERSE:
        dlog_decay = tl.sum(up_to, 0)[None, :] - dlog_decay + up_to
    if not WHOLE:
        beyond = tl.load(left_at + 3 * H * CHUNK, mask=within, other=0.0)
        before = tl.cumsum(beyond, 0)
        if REVERSE:
            dlog_decay += tl.sum(beyond, 0)[None, :] - before
        else:
            dlog_decay += before - beyond
        dlog_decay += tl.load(across_ptr + h, mask=h < HEADS, other=0.0)[None, :]
    A = tl.load(A_ptr + h, mask=h < HEADS, other=0.0).to(tl.float32)
    ddelta += dlog_decay.to(tl.float32) * A[None, :]
    ddt = tl.where(here[:, None], ddelta * tl.sigmoid(raw), 0.0)
    tl.store(ddt_ptr + q * DDT_STRIDE + h[None, :], ddt.to(ddt_ptr.dtype.element_ty), mask=within & here[:, None])
    tl.store(dA_ptr + h, tl.sum(dlog_decay * delta, 0), mask=h < HEADS)
    of_bias = tl.sum(ddt.to(dt_bias_partial_ptr.dtype.element_ty), 0)
    tl.store(dt_bias_partial_ptr + h, of_bias, mask=h < HEADS)


@triton.jit(do_not_specialize=["rows", "T"])
def _gradients_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    dt_bias_ptr,
    D_ptr,
    dy_ptr,
    forward_ptr,
    backward_ptr,
    dforward_ptr,
    dbackward_ptr,
    offsets_ptr,
    dx_ptr,
    ddt_ptr,
    dB_ptr,
    dC_ptr,
    partial_ptr,
    steps_ptr,
    across_ptr,
    rows,
    T,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PER_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr,
    PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a chunk and HEADS heads of one group, one after the other. WHOLE: each row is one chunk."""
    BLOCKS: tl.constexpr = H // HEADS
    GROUPS: tl.constexpr = H // PER_GROUP
    DIRECTIONS: tl.constexpr = FORWARD + BACKWARD
    slot = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first_head = (tl.program_id(0) % BLOCKS) * HEADS
    partial_ptr += slot * ((2 * DIRECTIONS + 1) * H) + first_head  # of dA and dt_bias in each direction, then D
    begin, left, chunk = chunk_of_slot(offsets_ptr, rows, slot, CHUNK, WHOLE)
    if left <= 0:
        h = tl.arange(0, BLOCK_HEADS)
        for kind in tl.static_range(2 * DIRECTIONS + 1):
            tl.store(partial_ptr + kind * H + h, tl.zeros([BLOCK_HEADS], tl.float32), mask=h < HEADS)
        return
    has_before = chunk > 0
    has_after = left > CHUNK
    q = tl.arange(0, CHUNK)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    here = q < left.to(tl.int32)
    in_keys = here[:, None] & (n < N)[None, :]
    in_x = here[:, None] & (p < P)[None, :]
    group = first_head // PER_GROUP
    B = tl.load(B_ptr + begin * B_stride + group * N + q[:, None] * B_stride + n[None, :], mask=in_keys, other=0.0)
    C = tl.load(C_ptr + begin * C_stride + group * N + q[:, None] * C_stride + n[None, :], mask=in_keys, other=0.0)
    product = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # (j, i)
    dproduct = tl.zeros([CHUNK, CHUNK], tl.float32)
    dB = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    dC = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    x_ptr += begin * x_stride
    dt_ptr += begin * dt_stride
    dy_ptr += begin * (H * P)
    dx_ptr += begin * (H * P)
    ddt_ptr += begin * (DIRECTIONS * H)
    steps_ptr += (slot * (DIRECTIONS * 4 * H) + first_head) * CHUNK
    across_ptr += slot * (DIRECTIONS * H) + first_head
    dt_ptr += first_head
    ddt_ptr += first_head
    A_ptr += first_head
    if HAS_BIAS:
        dt_bias_ptr += first_head
    if FORWARD:
        raw, delta = _lay_out_steps(
            steps_ptr,
            dt_ptr,
            A_ptr,
            dt_bias_ptr,
            here,
            dt_stride,
            H=H,
            HEADS=HEADS,
            BLOCK_HEADS=BLOCK_HEADS,
            CHUNK=CHUNK,
            REVERSE=False,
            HAS_BIAS=HAS_BIAS,
            PRECISE=PRECISE,
        )
    if BACKWARD:
        back: tl.constexpr = FORWARD * H
        back_steps_ptr = steps_ptr + back * (4 * CHUNK)
        back_raw, back_delta = _lay_out_steps(
            back_steps_ptr,
            dt_ptr + back,
            A_ptr + back,
            dt_bias_ptr + back if HAS_BIAS else None,
            here,
            dt_stride,
            H=H,
            HEADS=HEADS,
            BLOCK_HEADS=BLOCK_HEADS,
            CHUNK=CHUNK,
            REVERSE=True,
            HAS_BIAS=HAS_BIAS,
            PRECISE=PRECISE,
        )
    tl.debug_barrier()  # each head reads what other threads have stored
    for number in range(0, HEADS):
        head = first_head + number
        state_at = (slot * H + head) * (P * N)
        packed = q[:, None] * (H * P) + head * P + p[None, :]
        x = tl.load(x_ptr + q[:, None] * x_stride + head * P + p[None, :], mask=in_x, other=0.0)
        dy = tl.load(dy_ptr + packed, mask=in_x, other=0.0)
        shared = tl.dot(x, tl.trans(dy), input_precision=PRECISION)  # (j, i)
        pairs = shared * product
        dx = tl.zeros([CHUNK, BLOCK_P], tl.float32)
        if FORWARD:
            weights, dx, dB, dC = _one_way_gradients(
                x,
                dy,
                B,
                C,
                pairs,
                dx,
                dB,
                dC,
                steps_ptr + number * CHUNK,
                across_ptr + number,
                forward_ptr + state_at,
                dforward_ptr + state_at,
                has_before | HAS_FIRST,
                has_after | HAS_LAST,
                H=H,
                P=P,
                N=N,
                CHUNK=CHUNK,
                BLOCK_P=BLOCK_P,
                BLOCK_N=BLOCK_N,
                REVERSE=False,
                WHOLE=WHOLE,
                PRECISE=PRECISE,
                PRECISION=PRECISION,
            )
        if BACKWARD:
            some, dx, dB, dC = _one_way_gradients(
                x,
                dy,
                B,
                C,
                pairs,
                dx,
                dB,
                dC,
                back_steps_ptr + number * CHUNK,
                across_ptr + back + number,
                backward_ptr + state_at,
                dbackward_ptr + state_at,
                has_after | HAS_FIRST,
                has_before | HAS_LAST,
                H=H,
                P=P,
                N=N,
                CHUNK=CHUNK,
                BLOCK_P=BLOCK_P,
                BLOCK_N=BLOCK_N,
                REVERSE=True,
                WHOLE=WHOLE,
                PRECISE=PRECISE,
                PRECISION=PRECISION,
            )
            weights = weights + some if FORWARD else some
        dproduct += shared * weights
        dx += tl.dot((product * weights).to(dy.dtype), dy, input_precision=PRECISION)
        if HAS_D:
            dx += dy.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
            dD = tl.sum(tl.sum(tl.where(q[:, None] == q[None, :], shared, 0.0), 1), 0)
            tl.store(partial_ptr + 2 * DIRECTIONS * H + number, dD)
        tl.store(dx_ptr + packed, dx.to(dx_ptr.dtype.element_ty), mask=in_x)
    tl.debug_barrier()
    if FORWARD:
        _gather_sums(
            raw,
            delta,
            steps_ptr,
            across_ptr,
            A_ptr,
            ddt_ptr,
            partial_ptr,
            partial_ptr + DIRECTIONS * H,
            here,
            H=H,
            HEADS=HEADS,
            BLOCK_HEADS=BLOCK_HEADS,
            CHUNK=CHUNK,
            DDT_STRIDE=DIRECTIONS * H,
            REVERSE=False,
            WHOLE=WHOLE,
            PRECISE=PRECISE,
        )
    if BACKWARD:
        _gather_sums(
            back_raw,
            back_delta,
            back_steps_ptr,
            across_ptr + back,
            A_ptr + back,
            ddt_ptr + back,
            partial_ptr + back,
            partial_ptr + DIRECTIONS * H + back,
            here,
            H=H,
            HEADS=HEADS,
            BLOCK_HEADS=BLOCK_HEADS,
            CHUNK=CHUNK,
            DDT_STRIDE=DIRECTIONS * H,
            REVERSE=True,
            WHOLE=WHOLE,
            PRECISE=PRECISE,
        )
    dproduct = dproduct.to(B.dtype)
    dB += tl.dot(dproduct, C, input_precision=PRECISION)
    dC += tl.trans(tl.dot(tl.trans(B), dproduct, input_precision=PRECISION))
    split = slot * 0 + (first_head % PER_GROUP) // HEADS
    key_at = ((split * T + begin) * GROUPS + group) * N
    key_at += q[:, None] * (GROUPS * N) + n[None, :]
    tl.store(dB_ptr + key_at, dB.to(dB_ptr.dtype.element_ty), mask=in_keys)
    tl.store(dC_ptr + key_at, dC.to(dC_ptr.dtype.element_ty), mask=in_keys)


class Gradients(NamedTuple):
    """Of the tensors of `Inputs`."""

    x: Tensor  # (T, H, P)
    dt: Tensor  # (T, directions * H)
    B: Tensor  # (T, G, N)
    C: Tensor  # (T, G, N)
    of_heads: Tensor  # (2 * directions + 1, H) fp32: of A in each direction, of dt_bias in each, of D


def gradients(
    inputs: Inputs,
    dy: Tensor,
    states: tuple[Tensor, Tensor],
    dstates: tuple[Tensor, Tensor],
    sizes: Sizes,
    *,
    has_first: bool,
    has_last: bool,
) -> Gradients:
    """All chunks.

    Args:
        dy: (T, H, P) of the outputs before the gate, contiguous.
        states: (slots, H, P, N) that come into the chunks forward and backward; unused where there is no such scan, and
            where `sizes.whole`.
        dstates: likewise the gradients of the states that leave the chunks.
        has_first: whether a row's first chunk has a state.
        has_last: whether what leaves a row's last chunk has a gradient.
    """
    x, B, rows = inputs.x, inputs.B, inputs.offsets.numel() - 1
    (T, H, P), (_, G, N) = x.shape, B.shape
    directions = inputs.forward + inputs.backward
    splits = H // G // sizes.heads
    dx = x.new_empty(T, H, P)
    ddt = torch.empty_like(inputs.dt, memory_format=torch.contiguous_format)
    dB, dC = (B.new_empty(splits, T, G, N, dtype=B.dtype if splits == 1 else torch.float32) for _ in range(2))
    slots = rows if sizes.whole else num_slots(T, rows, sizes.chunk)
    sums = torch.float64 if x.dtype == torch.float32 else torch.float32
    partial = x.new_empty(slots, 2 * directions + 1, H, dtype=sums)
    precise = x.dtype == torch.float32
    steps = x.new_empty(slots, directions, 4, H, sizes.chunk, dtype=sums)
    across = x.new_empty(slots, directions, H, dtype=torch.float32)
    constants: dict[str, Any] = {
        "H": H,
        "P": P,
        "N": N,
        "PER_GROUP": H // G,
        "HEADS": sizes.heads,
        "CHUNK": sizes.chunk,
        "BLOCK_HEADS": triton.next_power_of_2(sizes.heads),
        "BLOCK_P": block(P),
        "BLOCK_N": block(N),
        "FORWARD": inputs.forward,
        "BACKWARD": inputs.backward,
        "WHOLE": sizes.whole,
        "HAS_BIAS": inputs.dt_bias is not None,
        "HAS_D": inputs.D is not None,
        "HAS_FIRST": has_first,
        "HAS_LAST": has_last,
        "PRECISE": precise,
        "PRECISION": dot_precision(x.dtype),
        "num_warps": sizes.warps,
        "num_stages": 2,  # the next head's events are under way
    }
    _gradients_kernel[(slots * (H // sizes.heads),)](
        x,
        inputs.dt,
        inputs.A,
        B,
        inputs.C,
        inputs.dt_bias,
        inputs.D,
        dy,
        *states,
        *dstates,
        inputs.offsets,
        dx,
        ddt,
        dB,
        dC,
        partial,
        steps,
        across,
        rows,
        T,
        x.stride(0),
        inputs.dt.stride(0),
        B.stride(0),
        inputs.C.stride(0),
        **constants,
    )
    dB, dC = ((t[0] if splits == 1 else t.sum(0).to(B.dtype)) for t in (dB, dC))
    return Gradients(dx, ddt, dB, dC, partial.sum(0).float())
