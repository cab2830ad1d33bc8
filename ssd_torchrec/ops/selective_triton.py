"""The selective scan in Triton: a warp walks along a row, or a piece of one, some channels' states in its registers.

    S[t]  = a[t] S[t-1] + u[t] B[t]^T          v[t] = S[t] C[t] + D x[t]      y[t] = v[t] silu(z[t])
    G[t]  = R[t] + dv[t] C[t]^T                R[t-1] = a[t] G[t]             R after a row's last event: dfinal
    dC[t] = S[t]^T dv[t]     dB[t] = G[t]^T u[t]     du[t] = G[t] B[t]        a = exp(delta A), u = delta x
    dA    = sum_t delta[t] (R[t-1] S[t-1])     ddelta[t] = (R[t-1] S[t-1] A) summed over N + x[t] du[t]

Every number of a state has a decay of its own, so there is no matrix product to be had, and the exponentials are what
limits the scan. States reach memory only where the gradient comes to a chunk of CHUNK events: from the state before it
those within are made again, in registers, and no decay is divided by.

Rows much longer than their share of the device are cut into pieces, which go side by side: each from 0 first, then the
pieces of a row are linked, then each from what the links say comes into it. Row r owns the slots from
offsets[r] // PIECE + r on, one a piece and at times one more, so a program finds its events from the offsets alone; the
slots of chunks likewise. What is summed over channels or rows leaves a program as an fp32 share, and shares are added
at the end: no atomics, so the same sum each time.

Shapes: B rows, T events in all, E channels, N state per channel. A tile of states is (RN, RE, LN, LE): RN * RE numbers
in each of LN * LE = 32 lanes; RN and LN make up N, RE and LE the channels of a block.
Source: Gu & Dao 2023, arXiv:2312.00752, section 3.3.2.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.launch import check_tensors, inner_contiguous
from ssd_torchrec.ops.registry import refuse_double_backward, register
from ssd_torchrec.ops.ssd_chunk import LOG2_E, locate, num_slots

LARGEST_STATE = 128
"""Numbers N of a channel's state that a warp takes."""

CHUNK = 6
"""Events whose states the gradient holds in registers at once; the state before each chunk passes through memory."""

PIECE = 42 * CHUNK
"""Events of a piece of a long row: whole chunks."""

WARPS = 16 * 132
"""Warps that keep a Hopper busy, 16 on each processor."""

ALONE = 8
"""How much faster a warp walks when it is nearly alone: a row may be as many times its share before it is cut."""

LINKED_AT_ONCE = 8
"""Pieces whose states are loaded together when pieces are linked."""

LINK_BLOCK = 128
"""Numbers of a state that a program links."""

BYTES_OF_FP32 = 4

GRADIENT_BYTES = 2**30
"""What the blocks of channels whose gradients are computed at once may leave in memory beside them; one block is always
taken. All blocks at once would leave over 30 KiB an event at 512 channels of state 64, thirty times the event."""


@triton.jit
def _span(offsets_ptr, rows, unit, PIECE: tl.constexpr):
    """Row, first event and length of a row, or of a piece; of length 0 where a slot has no piece."""
    row, before = unit, unit * 0
    if PIECE:
        located = locate(offsets_ptr, rows, unit, PIECE)
        row, before = located[0], located[1] * PIECE
    begin = tl.load(offsets_ptr + row) + before
    length = tl.maximum(tl.load(offsets_ptr + row + 1) - begin, 0)
    if PIECE:
        length = tl.minimum(length, PIECE)
    return row, begin, length.to(tl.int32)


@triton.jit
def _tile(block, RN: tl.constexpr, RE: tl.constexpr, LN: tl.constexpr, LE: tl.constexpr):
    """Numbers n of a state, (RN, 1, LN, 1), and channels e, (1, RE, LN, LE), in every lane that works on them.

    What a lane holds lies side by side in memory: loads then come in just this layout, and nothing has to change lanes.
    """
    n = tl.arange(0, LN)[None, None, :, None] * RN + tl.arange(0, RN)[:, None, None, None]
    e = tl.arange(0, LE)[None, None, None, :] * RE + tl.arange(0, RE)[None, :, None, None]
    return n, tl.broadcast_to(block * (RE * LE) + e, [1, RE, LN, LE])


@triton.jit
def _load(ptr, at, here):
    return tl.load(ptr + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _load_given(ptr, at, here):
    """0 if there is no such parameter."""
    values = tl.zeros(at.shape, tl.float32)
    if ptr is not None:
        values = _load(ptr, at, here)
    return values


@triton.jit
def _softplus(v):
    """log(1 + e^v) to a rounding or two, v itself above 20: max(v, 0) + log(1 + p), p = e^-|v|, by a polynomial in p.

    Half the instructions of a logarithm, which every lane needs for every event. The polynomial interpolates
    log(1 + p) / p on 0 .. 1 at Chebyshev's points, and is off by 5e-9 of it. For p, whole powers of 2 are taken from v
    first: log2(e) v would be rounded the more, the smaller p, and with it the whole step, is.
    """
    size = tl.abs(v)
    size = tl.where(size > 110.0, 110.0, size)  # there p is 0, and NaN stays what it is
    whole = tl.floor(size * LOG2_E + 0.5)
    rest = (size - whole * 0.693359375) + whole * 2.12194440e-4  # less ln(2) whole, in two parts, the first exact
    p = tl.exp2(-whole) * tl.exp2(rest * -LOG2_E)
    q = -0.00317605701 * p + 0.0195425272
    q = q * p - 0.0563736127
    q = q * p + 0.105436238
    q = q * p - 0.152696671
    q = q * p + 0.196632743
    q = q * p - 0.249516163
    q = q * p + 0.333297105
    q = q * p - 0.499998926
    q = q * p + 0.999999995
    return tl.maximum(v, 0.0) + p * q


@triton.jit
def _over_states(values):
    """Sum over N, in registers first: (RN, RE, LN, LE) to (1, RE, 1, LE)."""
    return tl.sum(tl.sum(values, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _over_channels(values):
    """Sum over a block's channels, in registers first: (RN, RE, LN, LE) to (RN, 1, LN, 1)."""
    return tl.sum(tl.sum(values, 1, keep_dims=True), 3, keep_dims=True)


@triton.jit
def _forward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    dt_bias_ptr,
    D_ptr,
    z_ptr,
    offsets_ptr,
    first_ptr,
    y_ptr,
    last_ptr,
    rows,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    E: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
    REVERSE: tl.constexpr,
    RN: tl.constexpr,
    RE: tl.constexpr,
    LN: tl.constexpr,
    LE: tl.constexpr,
):
    """y of one row, or piece, and the channels of one block, given the state that comes into it."""
    BLOCKS: tl.constexpr = (E + RE * LE - 1) // (RE * LE)
    turn = -1 if REVERSE else 1
    unit = (tl.program_id(0) // BLOCKS).to(tl.int64)
    tile = _tile(tl.program_id(0) % BLOCKS, RN, RE, LN, LE)
    n, e = tile[0], tile[1]
    in_n, in_e = n < N, e < E
    span = _span(offsets_ptr, rows, unit, PIECE)
    t, length = span[1], span[2]
    if REVERSE:
        t += length - 1
    in_state, in_row = in_e & in_n, n * E + e
    A = _load(A_ptr, in_row, in_state) * LOG2_E
    bias, skip = _load_given(dt_bias_ptr, e, in_e), _load_given(D_ptr, e, in_e)
    once = in_e & (tl.arange(0, LN) == 0)[None, None, :, None]  # of the lanes that hold a channel, the one that stores
    state = tl.zeros([RN, RE, LN, LE], tl.float32)
    if first_ptr is not None:
        state = _load(first_ptr + unit * (E * N), in_row, in_state)
    here = length > 0
    next_B, next_C = _load(B_ptr + t * B_stride, n, in_n & here), _load(C_ptr + t * C_stride, n, in_n & here)
    next_raw = _load(dt_ptr + t * dt_stride, e, in_e & here)
    next_x = _load(x_ptr + t * x_stride, e, in_e & here)
    for i in range(0, length):
        B, C, raw, x = next_B, next_C, next_raw, next_x
        following, here = t + turn, i + 1 < length  # under way while this event is worked on
        next_B = _load(B_ptr + following * B_stride, n, in_n & here)
        next_C = _load(C_ptr + following * C_stride, n, in_n & here)
        next_raw = _load(dt_ptr + following * dt_stride, e, in_e & here)
        next_x = _load(x_ptr + following * x_stride, e, in_e & here)
        delta = _softplus(raw + bias)
        state = tl.exp2(delta * A) * state + (delta * x) * B
        y = _over_states(state * C) + skip * x
        if z_ptr is not None:
            z = _load(z_ptr + t * z_stride, e, in_e)
            y *= z * tl.sigmoid(z)
        tl.store(y_ptr + t * E + e, y, mask=once)
        t = following
    if last_ptr is not None:
        tl.store(last_ptr + unit * (E * N) + in_row, state, mask=in_state)


@triton.jit
def _piece_kernel(
    events_ptr,
    keys_ptr,
    dt_ptr,
    A_ptr,
    dt_bias_ptr,
    z_ptr,
    offsets_ptr,
    state_ptr,
    elapsed_ptr,
    rows,
    events_stride,
    keys_stride,
    dt_stride,
    z_stride,
    E: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
    REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr,
    RN: tl.constexpr,
    RE: tl.constexpr,
    LN: tl.constexpr,
    LE: tl.constexpr,
):
    """What a piece adds to the state after it, or to the gradient of the state before it, and the sum of its steps."""
    BLOCKS: tl.constexpr = (E + RE * LE - 1) // (RE * LE)
    BACKWARDS: tl.constexpr = REVERSE != GRADIENT
    turn = -1 if BACKWARDS else 1
    unit = (tl.program_id(0) // BLOCKS).to(tl.int64)
    tile = _tile(tl.program_id(0) % BLOCKS, RN, RE, LN, LE)
    n, e = tile[0], tile[1]
    in_n, in_e = n < N, e < E
    span = _span(offsets_ptr, rows, unit, PIECE)
    t, length = span[1], span[2]
    if BACKWARDS:
        t += length - 1
    in_state, in_row = in_e & in_n, n * E + e
    A = _load(A_ptr, in_row, in_state) * LOG2_E
    bias = _load_given(dt_bias_ptr, e, in_e)
    state = tl.zeros([RN, RE, LN, LE], tl.float32)
    elapsed = tl.zeros([1, RE, LN, LE], tl.float32)
    here = length > 0
    next_keys = _load(keys_ptr + t * keys_stride, n, in_n & here)
    next_raw = _load(dt_ptr + t * dt_stride, e, in_e & here)
    next_events = _load(events_ptr + t * events_stride, e, in_e & here)
    for i in range(0, length):
        keys, raw, events = next_keys, next_raw, next_events
        following, here = t + turn, i + 1 < length
        next_keys = _load(keys_ptr + following * keys_stride, n, in_n & here)
        next_raw = _load(dt_ptr + following * dt_stride, e, in_e & here)
        next_events = _load(events_ptr + following * events_stride, e, in_e & here)
        delta = _softplus(raw + bias)
        elapsed += delta
        decay = tl.exp2(delta * A)
        if GRADIENT:
            if z_ptr is not None:
                z = _load(z_ptr + t * z_stride, e, in_e)
                events *= z * tl.sigmoid(z)
            state = decay * (state + events * keys)
        else:
            state = decay * state + (delta * events) * keys
        t = following
    tl.store(state_ptr + unit * (E * N) + in_row, state, mask=in_state)
    once = in_e & (tl.arange(0, LN) == 0)[None, None, :, None]
    tl.store(elapsed_ptr + unit * E + e, elapsed, mask=once)


@triton.jit
def _link_kernel(
    state_ptr,
    elapsed_ptr,
    A_ptr,
    offsets_ptr,
    first_ptr,
    into_ptr,
    last_ptr,
    E: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
    BACKWARDS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What comes into each piece of a row, and what the row hands on, from what each piece adds."""
    BLOCKS: tl.constexpr = (E * N + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    at = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    in_state = at < E * N
    begin = tl.load(offsets_ptr + row)
    pieces = tl.cdiv(tl.load(offsets_ptr + row + 1) - begin, PIECE).to(tl.int32)
    slot = begin // PIECE + row
    A = _load(A_ptr, at, in_state) * LOG2_E
    state = tl.zeros([BLOCK], tl.float32)
    if first_ptr is not None:
        state = _load(first_ptr + row * (E * N), at, in_state)
    for group in range(0, tl.cdiv(pieces, AT_ONCE)):
        decays, added = (), ()
        for j in tl.static_range(AT_ONCE):
            place = group * AT_ONCE + j
            here = in_state & (place < pieces)
            piece = pieces - 1 - place if BACKWARDS else place
            elapsed = _load(elapsed_ptr + (slot + piece) * E, at % E, here)
            decay, addition = (tl.exp2(A * elapsed),), (_load(state_ptr + (slot + piece) * (E * N), at, here),)
            decays, added = decays + decay, added + addition
        for j in tl.static_range(AT_ONCE):
            place = group * AT_ONCE + j
            piece = pieces - 1 - place if BACKWARDS else place
            tl.store(into_ptr + (slot + piece) * (E * N) + at, state, mask=in_state & (place < pieces))
            state = decays[j] * state + added[j]
    if last_ptr is not None:
        tl.store(last_ptr + row * (E * N) + at, state, mask=in_state)


@triton.jit(do_not_specialize=["first_block"])
def _gradient_kernel(
    dy_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    dt_bias_ptr,
    D_ptr,
    z_ptr,
    offsets_ptr,
    first_ptr,
    dlast_ptr,
    states_ptr,
    dx_ptr,
    ddt_ptr,
    dz_ptr,
    dfirst_ptr,
    A_share_ptr,
    B_share_ptr,
    C_share_ptr,
    channel_share_ptr,
    first_block,
    rows,
    dy_stride,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    E: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCKS: tl.constexpr,
    REVERSE: tl.constexpr,
    RN: tl.constexpr,
    RE: tl.constexpr,
    LN: tl.constexpr,
    LE: tl.constexpr,
):
    """All gradients of one row, or piece, and the channels of one block, given what comes into it from either side.

    Of all blocks, this launch has `BLOCKS` from `first_block` on, all of them if that is None; states and shares of B
    and C are scratch of theirs.
    """
    block = tl.program_id(0) % BLOCKS
    unit = (tl.program_id(0) // BLOCKS).to(tl.int64)
    tile = _tile(block if first_block is None else first_block + block, RN, RE, LN, LE)
    n, e = tile[0], tile[1]
    in_n, in_e = n < N, e < E
    keys = tl.broadcast_to(n, [RN, 1, LN, LE])  # of B and C: these too in every lane that works on them
    in_keys = keys < N
    in_state, in_row = in_e & in_n, n * E + e
    span = _span(offsets_ptr, rows, unit, PIECE)
    row, begin, length = span[0], span[1], span[2]
    chunks = tl.cdiv(length, CHUNK)
    if first_block is None:
        KEPT: tl.constexpr = E * N
        in_kept = in_row
    else:
        KEPT: tl.constexpr = BLOCKS * RE * LE * N
        in_kept = (block * N + n) * (RE * LE) + e - (first_block + block) * (RE * LE)
    states_ptr += (begin // CHUNK + row) * KEPT
    A = _load(A_ptr, in_row, in_state) * LOG2_E
    bias, skip = _load_given(dt_bias_ptr, e, in_e), _load_given(D_ptr, e, in_e)
    once = in_e & (tl.arange(0, LN) == 0)[None, None, :, None]  # of the lanes that hold a channel, the one that stores

    state = tl.zeros([RN, RE, LN, LE], tl.float32)
    if first_ptr is not None:
        state = _load(first_ptr + unit * (E * N), in_row, in_state)
    for step in range(0, chunks):
        chunk = chunks - 1 - step if REVERSE else step
        tl.store(states_ptr + (begin * 0 + chunk) * KEPT + in_kept, state, mask=in_state)  # in int64
        onwards = tl.where(step + 1 < chunks, CHUNK, 0)  # what the last chunk hands on is not needed
        for j in range(0, onwards):
            i = chunk * CHUNK + (CHUNK - 1 - j if REVERSE else j)
            here, t = i < length, begin + i
            B = _load(B_ptr + t * B_stride, keys, in_keys & here)
            raw = _load(dt_ptr + t * dt_stride, e, in_e & here)
            x = _load(x_ptr + t * x_stride, e, in_e & here)
            delta = tl.where(here, _softplus(raw + bias), 0.0)
            state = tl.exp2(delta * A) * state + (delta * x) * B
    tl.debug_barrier()

    dstate = tl.zeros([RN, RE, LN, LE], tl.float32)
    if dlast_ptr is not None:
        dstate = _load(dlast_ptr + unit * (E * N), in_row, in_state)
    dA = tl.zeros([RN, RE, LN, LE], tl.float32)
    dbias = tl.zeros([1, RE, LN, LE], tl.float32)
    dskip = tl.zeros([1, RE, LN, LE], tl.float32)
    for step in range(0, chunks):
        chunk = step if REVERSE else chunks - 1 - step
        state = _load(states_ptr + (begin * 0 + chunk) * KEPT, in_kept, in_state)
        states = (state,)  # before the chunk, then after each of its events
        for j in tl.static_range(CHUNK):
            i = chunk * CHUNK + (CHUNK - 1 - j if REVERSE else j)
            here, t = i < length, begin + i
            B = _load(B_ptr + t * B_stride, keys, in_keys & here)
            raw = _load(dt_ptr + t * dt_stride, e, in_e & here)
            x = _load(x_ptr + t * x_stride, e, in_e & here)
            delta = tl.where(here, _softplus(raw + bias), 0.0)
            state = tl.exp2(delta * A) * state + (delta * x) * B
            after = (state,)
            states = states + after
        for j in tl.static_range(CHUNK):
            i = chunk * CHUNK + (j if REVERSE else CHUNK - 1 - j)
            here, t = i < length, begin + i
            B = _load(B_ptr + t * B_stride, keys, in_keys & here)
            C = _load(C_ptr + t * C_stride, keys, in_keys & here)
            dv = _load(dy_ptr + t * dy_stride, e, in_e & here)
            x = _load(x_ptr + t * x_stride, e, in_e & here)
            if z_ptr is not None:
                z = _load(z_ptr + t * z_stride, e, in_e & here)
                open_share = tl.sigmoid(z)
                v = _over_states(states[CHUNK - j] * C) + skip * x
                dz = dv * v * (open_share + z * open_share * (1 - open_share))
                tl.store(dz_ptr + t * E + e, dz, mask=once & here)
                dv *= z * open_share
            raw = _load(dt_ptr + t * dt_stride, e, in_e & here) + bias
            delta = tl.where(here, _softplus(raw), 0.0)
            dstate += dv * C
            share_at = (t * BLOCKS + block) * N + n
            tl.store(C_share_ptr + share_at, _over_channels(dv * states[CHUNK - j]), mask=in_n & here)
            tl.store(B_share_ptr + share_at, _over_channels((delta * x) * dstate), mask=in_n & here)
            du = _over_states(dstate * B)
            dstate *= tl.exp2(delta * A)
            dlog_decay = dstate * states[CHUNK - 1 - j]
            dA += delta * dlog_decay
            ddelta = du * x + _over_states(dlog_decay * A) / LOG2_E
            draw = tl.where(here, ddelta * tl.sigmoid(raw), 0.0)
            dbias += draw
            dskip += dv * x
            tl.store(ddt_ptr + t * E + e, draw, mask=once & here)
            tl.store(dx_ptr + t * E + e, du * delta + skip * dv, mask=once & here)
    tl.store(A_share_ptr + unit * (E * N) + in_row, dA, mask=in_state)
    tl.store(channel_share_ptr + unit * (2 * E) + e, dbias, mask=once)
    tl.store(channel_share_ptr + unit * (2 * E) + E + e, dskip, mask=once)
    if dfirst_ptr is not None:
        tl.store(dfirst_ptr + unit * (E * N) + in_row, dstate, mask=in_state)


def _forward_tile(state: int) -> dict[str, int]:
    """A channel in as few lanes as hold its state, 32 numbers each: reading the state takes few ways between lanes."""
    padded = 1 << (state - 1).bit_length()
    in_lane = min(padded, 32)
    return {"RN": in_lane, "RE": 1, "LN": padded // in_lane, "LE": 32 * in_lane // padded}


def _gradient_tile(state: int) -> dict[str, int]:
    """16 numbers in a lane, since it holds the states of a whole chunk; sums go over N and over channels alike."""
    padded = 1 << (state - 1).bit_length()
    in_lane = min(padded, 8)
    return {"RN": in_lane, "RE": min(16 // in_lane, 4), "LN": padded // in_lane, "LE": 32 * in_lane // padded}


def _width(tile: dict[str, int]) -> int:
    """Channels of a block."""
    return tile["RE"] * tile["LE"]


def _blocks(channels: int, tile: dict[str, int]) -> int:
    return math.ceil(channels / _width(tile))


def _portions(blocks: int, bytes_each: int) -> Iterator[range]:
    """Blocks that keep to `GRADIENT_BYTES` together: all, or a power of two, since each number is compiled for."""
    at_once = max(1, GRADIENT_BYTES // bytes_each)
    if at_once < blocks:
        at_once = 1 << (at_once.bit_length() - 1)
    for start in range(0, blocks, at_once):
        yield range(start, min(start + at_once, blocks))


def _piece(events: int, blocks: int, longest: int) -> int:
    """Events of a piece; 0 to leave rows whole, unless the longest would walk on when all others have long arrived."""
    share = events * blocks // WARPS
    return PIECE if longest > max(2 * PIECE, ALONE * share) else 0


def _turned(states: Tensor | None) -> Any:
    """Callers have (..., E, N), kernels (..., N, E): what lies side by side in memory then does so in a warp."""
    return None if states is None else states.mT.contiguous()


class _Given(NamedTuple):
    """What both operators are given, as kernels take it."""

    x: Tensor
    dt: Tensor
    A: Tensor  # (N, E)
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None
    D: Tensor | None
    z: Tensor | None
    offsets: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        D: Tensor | None,
        z: Tensor | None,
        offsets: Tensor,
    ) -> "_Given":
        x, dt, B, C = map(inner_contiguous, (x, dt, B, C))
        dt_bias, D = (None if t is None else t.contiguous() for t in (dt_bias, D))
        return cls(x, dt, A.T.contiguous(), B, C, dt_bias, D, None if z is None else inner_contiguous(z), offsets)

    @property
    def rows(self) -> int:
        return self.offsets.numel() - 1

    def options(self, **others: Any) -> dict[str, Any]:
        """A program is one warp: what lanes hand each other needs no barrier."""
        return {"E": self.x.shape[1], "N": self.B.shape[1], **others, "num_warps": 1, "num_stages": 1}

    @property
    def strides(self) -> tuple[Any, ...]:
        return tuple(_stride(events) for events in (self.x, self.dt, self.B, self.C, self.z))

    def scratch(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)


def _stride(events: Tensor | None) -> Any:
    return 0 if events is None else events.stride(0)


def _link_pieces(
    given: _Given, first: Tensor | None, last: Tensor | None, reverse: bool, dy: Tensor | None = None
) -> Tensor:
    """What comes into each piece, (slots, N, E): states in the order of the scan, or their gradients against it.

    Args:
        first: (B, N, E) what comes into each row; 0 if None.
        last: (B, N, E) takes what each row hands on.
        dy: (T, E) gradient of the output, if gradients are meant.
    """
    events, channels = given.x.shape
    tile = _forward_tile(given.B.shape[1])
    slots = num_slots(events, given.rows, PIECE)
    added, into = given.scratch(2, slots, *given.A.shape)
    elapsed = given.scratch(slots, channels)
    entering, keys, z = (given.x, given.B, None) if dy is None else (dy, given.C, given.z)
    _piece_kernel[slots * _blocks(channels, tile),](
        entering,
        keys,
        given.dt,
        given.A,
        given.dt_bias,
        z,
        given.offsets,
        added,
        elapsed,
        given.rows,
        *map(_stride, (entering, keys, given.dt, z)),
        **given.options(PIECE=PIECE, REVERSE=reverse, GRADIENT=dy is not None, **tile),
    )
    _link_kernel[given.rows * math.ceil(given.A.numel() / LINK_BLOCK),](
        added,
        elapsed,
        given.A,
        given.offsets,
        first,
        into,
        last,
        **given.options(PIECE=PIECE, BACKWARDS=reverse != (dy is not None), AT_ONCE=LINKED_AT_ONCE, BLOCK=LINK_BLOCK),
    )
    return into


def _launch_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    offsets: Tensor,
    initial: Tensor | None,
    longest: int,
    reverse: bool,
    keep_final: bool,
) -> tuple[Tensor, Tensor]:
    given, first = _Given.of(x, dt, A, B, C, dt_bias, D, z, offsets), _turned(initial)
    y, final = x.new_empty(x.shape), given.scratch(given.rows if keep_final else 0, *given.A.shape)
    if not y.numel():
        return y, _turned(final.zero_() if first is None or not keep_final else final.copy_(first))
    tile = _forward_tile(given.B.shape[1])
    blocks = _blocks(x.shape[1], tile)
    piece = _piece(len(x), blocks, longest)
    units, last = given.rows, final if keep_final else None
    with torch.cuda.device_of(x):
        if piece:
            first, last = _link_pieces(given, first, last, reverse), None
            units = len(first)
        _forward_kernel[units * blocks,](
            *given,
            first,
            y,
            last,
            given.rows,
            *given.strides,
            **given.options(PIECE=piece, REVERSE=reverse, **tile),
        )
    return y, _turned(final)


def _launch_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    offsets: Tensor,
    initial: Tensor | None,
    longest: int,
    reverse: bool,
) -> tuple[Tensor, ...]:
    given, dy = _Given.of(x, dt, A, B, C, dt_bias, D, z, offsets), inner_contiguous(dy)
    first, dlast = _turned(initial), _turned(dfinal)
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dz = None if z is None else z.new_empty(z.shape)
    dinitial = None if initial is None else given.scratch(given.rows, *given.A.shape)
    tile = _gradient_tile(given.B.shape[1])
    blocks = _blocks(x.shape[1], tile)
    piece = _piece(len(x), blocks, longest)
    units = num_slots(len(x), given.rows, piece) if piece else given.rows
    A_shares, channel_shares = given.scratch(units, *given.A.shape), given.scratch(units, 2, x.shape[1])
    dB, dC = (torch.zeros(B.shape, dtype=torch.float32, device=x.device) for _ in "BC")
    if x.numel():
        with torch.cuda.device_of(x):
            dfirst = dinitial
            if piece:
                first = _link_pieces(given, first, None, reverse)
                dlast, dfirst = _link_pieces(given, dlast, dfirst, reverse, dy), None
            chunks = num_slots(len(x), given.rows, CHUNK)
            for blocks_here in _portions(blocks, BYTES_OF_FP32 * B.shape[1] * (2 * len(x) + chunks * _width(tile))):
                shares = given.scratch(2, len(x), len(blocks_here), B.shape[1])
                _gradient_kernel[units * len(blocks_here),](
                    dy,
                    *given,
                    first,
                    dlast,
                    given.scratch(chunks, len(blocks_here) * _width(tile), B.shape[1]),
                    dx,
                    ddt,
                    dz,
                    dfirst,
                    A_shares,
                    shares[0],
                    shares[1],
                    channel_shares,
                    None if len(blocks_here) == blocks else blocks_here.start,
                    given.rows,
                    dy.stride(0),
                    *given.strides,
                    **given.options(CHUNK=CHUNK, PIECE=piece, BLOCKS=len(blocks_here), REVERSE=reverse, **tile),
                )
                dB, dC = dB.add_(shares[0].sum(1)), dC.add_(shares[1].sum(1))
    else:
        A_shares, channel_shares = A_shares.zero_(), channel_shares.zero_()
        if dinitial is not None:
            dinitial = dinitial.zero_() if dlast is None else dinitial.copy_(dlast)
    ddt_bias, dD = channel_shares.sum(0)
    return (
        dx,
        ddt,
        _turned(A_shares.sum(0)).to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        _like(dt_bias, ddt_bias, x),
        _like(D, dD, x),
        _like(z, dz, x),
        _like(initial, _turned(dinitial), x),
    )


def _like(given: Tensor | None, grad: Tensor | None, x: Tensor) -> Tensor:
    """The gradient in the dtype of what it is the gradient of; nothing at all if that was not given."""
    return x.new_empty(0) if given is None or grad is None else grad.to(given.dtype, copy=True)


def _fake_forward(x: Tensor, dt: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    offsets, keep_final = others[5], others[-1]
    rows = offsets.shape[0] - 1 if keep_final else 0
    return x.new_empty(x.shape), x.new_empty((rows, *A.shape), dtype=torch.float32)


def _fake_backward(dy: Tensor, dfinal: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    x, dt, A, B, C, dt_bias, D, z, _, initial, *_ = given
    tensors = (x, dt, A, B, C, dt_bias, D, z, initial)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


_GIVEN = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? dt_bias, Tensor? D, Tensor? z, Tensor offsets, "
    "Tensor? initial_state, SymInt longest, bool reverse"
)
register(
    f"selective_scan({_GIVEN}, bool keep_final) -> (Tensor, Tensor)",
    _launch_forward,
    fake=_fake_forward,
)
register(
    f"selective_scan_backward(Tensor dy, Tensor? dfinal, {_GIVEN}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    fake=_fake_backward,
)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        D: Tensor | None,
        z: Tensor | None,
        offsets: Tensor,
        initial: Tensor | None,
        longest: int,
        reverse: bool,
        keep_final: bool,
    ) -> Any:
        tensors = (x, dt, A, B, C, dt_bias, D, z, offsets, initial)
        y, final = torch.ops.ssd_torchrec.selective_scan(*tensors, longest, reverse, keep_final)
        ctx.save_for_backward(*tensors)
        ctx.longest, ctx.reverse = longest, reverse
        return (y, final) if keep_final else y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("selective_scan")
        dy, dfinal = grad_outputs if len(grad_outputs) == 2 else (*grad_outputs, None)
        *tensors, offsets, initial = ctx.saved_tensors
        *grads, dinitial = torch.ops.ssd_torchrec.selective_scan_backward(
            dy, dfinal, *tensors, offsets, initial, ctx.longest, ctx.reverse
        )
        grads = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
        return *grads, None, None if initial is None else dinitial, None, None, None


def selective_scan_triton(
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
    """The kernels: one warp a row, or piece of a row, and block of channels; sums in fp32.

    Raises:
        ShapeError: a channel has more state than a warp takes.
        DtypeError: a tensor is of a dtype that kernels do not take, or on another device.
    """
    if A.shape[1] > LARGEST_STATE:
        raise ShapeError(
            f"N must be at most {LARGEST_STATE} on the GPU, got {A.shape[1]}; give each channel a smaller state"
        )
    others = {"dt": dt, "A": A, "B": B, "C": C, "dt_bias": dt_bias, "D": D, "z": z, "initial_state": initial_state}
    check_tensors("selective_scan", x, others)
    return _SelectiveScan.apply(
        x,
        dt,
        A,
        B,
        C,
        dt_bias,
        D,
        z,
        layout.offsets,
        initial_state,
        layout.longest,
        reverse,
        return_final_state,
    )
