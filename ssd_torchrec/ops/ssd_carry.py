"""The states that the chunks of a row hand on, and the gradients that they hand back.

    S' = whole S + sum_j leaving(j) delta[j] x[j] B[j]^T             the state, in the order of the scan
    R' = whole R + sum_i entering(i) dy[i] C[i]^T                    its gradient, against that order

Both are one recurrence over chunks: S is what comes into a chunk from the one before it, R what comes into it from the
one after. Rows of many chunks are cut into pieces of a fixed length, which go side by side: each from 0 first, then
the pieces of a row are scanned, then each from what the scan says comes into it.

Shapes: B rows, T events in all, H heads, P channels of a head, N state per channel, G groups. States are (H, P, N).
Source: Dao & Gu 2024, arXiv:2405.21060, section 6, with chunks that never span two rows.
"""

# Checkers read a kernel as Python: loads return nothing, ranges of the compiler are no iterators.
# pyright: reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_torchrec.ops.launch import dot_precision
from ssd_torchrec.ops.ssd_chunk import locate, log_decays, num_slots, reach_of, softplus
from ssd_torchrec.ops.ssd_sizes import Sizes, block

PIECES_AT_ONCE = 16
STATE_BLOCK = 64


@triton.jit(do_not_specialize=["rows"])
def _carry_kernel(
    events_ptr,
    keys_ptr,
    dt_ptr,
    A_ptr,
    dt_bias_ptr,
    offsets_ptr,
    first_ptr,
    states_ptr,
    last_ptr,
    decay_ptr,
    rows,
    events_stride,
    keys_stride,
    dt_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PER_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a row, or a piece of one, and HEADS heads of one group, whose channels lie side by side."""
    BLOCKS: tl.constexpr = H // HEADS
    BACKWARDS: tl.constexpr = REVERSE != GRADIENT
    unit = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = (tl.program_id(0) % BLOCKS) * HEADS
    if PIECE:
        row, piece = locate(offsets_ptr, rows, unit, PIECE)
        begin = tl.load(offsets_ptr + row)
        length = tl.minimum(tl.load(offsets_ptr + row + 1) - begin - piece * PIECE, PIECE).to(tl.int32)
        if length <= 0:
            return
        chunk_slot = begin // CHUNK + row + piece * (PIECE // CHUNK)
        begin += piece * PIECE
    else:
        begin = tl.load(offsets_ptr + unit)
        length = (tl.load(offsets_ptr + unit + 1) - begin).to(tl.int32)
        chunk_slot = begin // CHUNK + unit
    events_ptr += begin * events_stride + head * P
    keys_ptr += begin * keys_stride + (head // PER_GROUP) * N
    dt_ptr += begin * dt_stride + head

    q = tl.arange(0, CHUNK)
    heads = tl.arange(0, HEADS)
    column = tl.arange(0, HEADS * BLOCK_P)
    channel = column % BLOCK_P
    channel_at = (column // BLOCK_P) * P + channel
    n = tl.arange(0, BLOCK_N)
    state_at = channel_at[:, None] * N + n[None, :]
    in_state = (channel < P)[:, None] & (n < N)[None, :]
    A = tl.load(A_ptr + head + heads).to(tl.float32)
    bias = tl.zeros([HEADS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias_ptr + head + heads).to(tl.float32)
    state = tl.zeros([HEADS * BLOCK_P, BLOCK_N], tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + (unit * H + head) * (P * N) + state_at, mask=in_state, other=0.0).to(tl.float32)
    log_decay = tl.zeros([HEADS], tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    steps = chunks
    if not HAS_LAST:
        steps = chunks - 1  # what the last chunk hands on is not asked for
    if KEEP and HAS_FIRST:
        first_chunk = chunk_slot
        if BACKWARDS:
            first_chunk += chunks - 1
        kept_at = (first_chunk * H + head) * (P * N)
        tl.store(states_ptr + kept_at + state_at, state.to(states_ptr.dtype.element_ty), mask=in_state & (chunks > 0))
    for step in range(0, steps):
        if BACKWARDS:
            chunk = chunks - 1 - step
            following = chunk - 1
        else:
            chunk = step
            following = chunk + 1
        t = unit * 0 + chunk * CHUNK
        here = q < (length - t).to(tl.int32)
        in_events = here[:, None] & (channel < P)[None, :]
        events_at = events_ptr + t * events_stride + q[:, None] * events_stride + channel_at[None, :]
        events = tl.load(events_at, mask=in_events, other=0.0)  # (Q, HEADS * P)
        in_keys = here[:, None] & (n < N)[None, :]
        keys = tl.load(keys_ptr + t * keys_stride + q[:, None] * keys_stride + n[None, :], mask=in_keys, other=0.0)
        dt_at = dt_ptr + t * dt_stride + q[:, None] * dt_stride + heads[None, :]
        raw = tl.load(dt_at, mask=here[:, None], other=0.0).to(tl.float32)
        delta = tl.where(here[:, None], softplus(raw + bias[None, :], PRECISE), 0.0)  # (Q, HEADS)
        decay = log_decays(delta, A[None, :], PRECISE)
        _, _, entering, leaving, whole = reach_of(decay, REVERSE, PRECISE)
        weight = entering if GRADIENT else leaving * delta
        weight = tl.reshape(tl.broadcast_to(weight[:, :, None], [CHUNK, HEADS, BLOCK_P]), [CHUNK, HEADS * BLOCK_P])
        whole = tl.reshape(tl.broadcast_to(whole[:, None], [HEADS, BLOCK_P]), [HEADS * BLOCK_P])
        weighted = (events * weight).to(events.dtype)
        state = state * whole[:, None] + tl.dot(tl.trans(weighted), keys, input_precision=PRECISION)
        log_decay += tl.sum(decay, 0).to(tl.float32)
        if KEEP:
            if step + 1 < chunks:
                kept_at = ((chunk_slot + following) * H + head) * (P * N)
                tl.store(states_ptr + kept_at + state_at, state.to(states_ptr.dtype.element_ty), mask=in_state)
    if HAS_LAST:
        tl.store(last_ptr + (unit * H + head) * (P * N) + state_at, state, mask=in_state)
    if PIECE and HAS_LAST:
        tl.store(decay_ptr + unit * H + head + heads, log_decay)


@triton.jit
def _then(decay, state, decay_after, state_after):
    """Two pieces as one, in the order of the scan."""
    return decay * decay_after, state * decay_after + state_after


@triton.jit
def _pieces_kernel(
    through_ptr,
    decay_ptr,
    offsets_ptr,
    first_ptr,
    into_ptr,
    last_ptr,
    H: tl.constexpr,
    STATE: tl.constexpr,
    PIECE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKWARDS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr,
):
    """One program a row, a head and BLOCK numbers of its state; AT_ONCE pieces at a time."""
    BLOCKS: tl.constexpr = (STATE + BLOCK - 1) // BLOCK
    at = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // BLOCKS % H
    row = (tl.program_id(0) // (BLOCKS * H)).to(tl.int64)
    begin = tl.load(offsets_ptr + row)
    pieces = tl.cdiv(tl.load(offsets_ptr + row + 1) - begin, PIECE)
    slot = begin // PIECE + row
    inside = at < STATE
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + (row * H + head) * STATE + at, mask=inside, other=0.0).to(tl.float32)
    if pieces > 0:
        begins = slot
        if BACKWARDS:
            begins += pieces - 1
        tl.store(into_ptr + (begins * H + head) * STATE + at, state, mask=inside)
    k = tl.arange(0, AT_ONCE)
    for done in range(0, pieces, AT_ONCE):
        rank = done + k
        if BACKWARDS:
            piece = slot + (pieces - 1) - rank
            following = piece - 1
        else:
            piece = slot + rank
            following = piece + 1
        there = (rank < pieces)[:, None] & inside[None, :]
        through = tl.load(through_ptr + (piece * H + head)[:, None] * STATE + at[None, :], mask=there, other=0.0)
        decay = tl.exp2(tl.load(decay_ptr + piece * H + head, mask=rank < pieces, other=0.0))
        decay = tl.broadcast_to(decay[:, None], [AT_ONCE, BLOCK])
        decays, states = tl.associative_scan((decay, through), 0, _then)
        states += decays * state[None, :]  # after each piece; those past the last leave it as it is
        goes_on = (rank < pieces - 1)[:, None] & inside[None, :]
        tl.store(into_ptr + (following * H + head)[:, None] * STATE + at[None, :], states, mask=goes_on)
        state = tl.sum(tl.where((k == AT_ONCE - 1)[:, None], states, 0.0), 0)
    if HAS_LAST:
        tl.store(last_ptr + (row * H + head) * STATE + at, state, mask=inside)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One direction of a scan over jagged rows, as kernels see it."""

    dt: Tensor
    """(T, H) raw steps, perhaps a slice of several directions' beside each other."""

    A: Tensor
    """(H,) at most 0."""

    dt_bias: Tensor | None
    """(H,)"""

    offsets: Tensor
    """(B+1,) int64"""

    reverse: bool
    """Whether the scan runs from each row's last event to its first."""


def carry(
    scan: Scan,
    events: Tensor,
    keys: Tensor,
    sizes: Sizes,
    *,
    gradient: bool = False,
    first: Tensor | None = None,
    keep: bool = True,
    keep_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """What comes into each chunk.

    Args:
        events: (T, H, P) x, or with `gradient` dy.
        keys: (T, G, N) B, or with `gradient` C.
        gradient: carry gradients of states, against the order of the scan.
        first: (B, H, P, N) what comes into a row's first chunk in the order of travel; 0 where None.
        keep: whether chunks are asked for.
        keep_last: whether what leaves a row's last chunk is asked for.

    Returns:
        (slots, H, P, N) in the dtype of `events`, unwritten for a row's first chunk unless `first` is given; and
        (B, H, P, N) fp32, empty unless `keep_last`.
    """
    (_, H, P), N, rows = events.shape, keys.shape[2], scan.offsets.numel() - 1
    slots = num_slots(len(events), rows, sizes.chunk) if keep else 0
    into = events.new_empty(slots, H, P, N)
    last = events.new_empty(rows if keep_last else 0, H, P, N, dtype=torch.float32)
    if not sizes.piece:
        _launch_carry(scan, events, keys, sizes, gradient, rows, first, into, last, None)
        return into, last
    pieces = num_slots(len(events), rows, sizes.piece)
    through, comes_in = (events.new_empty(pieces, H, P, N, dtype=torch.float32) for _ in range(2))
    decay = events.new_empty(pieces, H, dtype=torch.float32)
    _launch_carry(scan, events, keys, sizes, gradient, pieces, None, into[:0], through, decay)
    width = min(STATE_BLOCK, triton.next_power_of_2(P * N))
    constants: dict[str, Any] = {
        "H": H,
        "STATE": P * N,
        "PIECE": sizes.piece,
        "AT_ONCE": PIECES_AT_ONCE,
        "BLOCK": width,
        "BACKWARDS": scan.reverse != gradient,
        "HAS_FIRST": first is not None,
        "HAS_LAST": keep_last,
        "num_warps": 1,
        "num_stages": 1,
    }
    _pieces_kernel[(rows * H * triton.cdiv(P * N, width),)](
        through,
        decay,
        scan.offsets,
        first,
        comes_in,
        last,
        **constants,
    )
    if keep:
        _launch_carry(scan, events, keys, sizes, gradient, pieces, comes_in, into, last[:0], None)
    return into, last


def _launch_carry(
    scan: Scan,
    events: Tensor,
    keys: Tensor,
    sizes: Sizes,
    gradient: bool,
    units: int,
    first: Tensor | None,
    into: Tensor,
    last: Tensor,
    decay: Tensor | None,
) -> None:
    _, H, P = events.shape
    _, G, N = keys.shape
    constants: dict[str, Any] = {
        "H": H,
        "P": P,
        "N": N,
        "PER_GROUP": H // G,
        "HEADS": sizes.carry_heads,
        "CHUNK": sizes.chunk,
        "PIECE": sizes.piece,
        "BLOCK_P": block(P),
        "BLOCK_N": block(N),
        "REVERSE": scan.reverse,
        "GRADIENT": gradient,
        "HAS_BIAS": scan.dt_bias is not None,
        "HAS_FIRST": first is not None,
        "HAS_LAST": len(last) > 0,
        "KEEP": len(into) > 0,
        "PRECISE": events.dtype == torch.float32,
        "PRECISION": dot_precision(events.dtype),
        "num_warps": sizes.carry_warps,
        "num_stages": 1,
    }
    _carry_kernel[(units * (H // sizes.carry_heads),)](
        events,
        keys,
        scan.dt,
        scan.A,
        scan.dt_bias,
        scan.offsets,
        first,
        into,
        last,
        decay,
        scan.offsets.numel() - 1,
        events.stride(0),
        keys.stride(0),
        scan.dt.stride(0),
        **constants,
    )
