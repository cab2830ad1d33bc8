"""The short convolution in Triton: every event is read once on the way there, and once on the way back.

    pre[s] = bias + sum_k w[k] x[s-k]          w[k] = weight[K-1-k], over the k with s-k in the row of s
    y[s]   = act(pre[s])
    g[s]   = dy[s] act'(pre[s])                pre made anew, nothing of it is kept
    dx[s]  = sum_k w[k] g[s+k]
    dw[k]  = sum_s g[s] x[s-k]                 dbias = sum_s g[s]

A program has a block of channels and LANES lanes. A lane walks over a run of adjacent events and keeps the last K-1
inputs, on the way back also the K-1 unfinished dx, in registers. s counts the steps of that walk; with `reverse` it
goes from the last event to the first, and the following events are the past ones. Two events k steps apart are of one
row exactly if the one later in memory has a position of at least k.

Backwards a bounded number of programs sum their shares of dw and dbias in registers, and the shares are added at the
end: no atomics, so the same sum each time. Tails, one a row, have kernels of their own.
"""

# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false
# Kernels do not know (*a, b), and tl.static_range is typed as one that cannot be iterated over.

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.launch import inner_contiguous
from ssd_torchrec.ops.registry import refuse_double_backward, register

MOST_TAPS = 8
"""What fits the registers on the way back."""

LANES = 8
"""Of a program: with 64 channels and four warps a thread has four values of an event, 8 bytes in bf16."""

WIDEST_BLOCK = 64
"""Channels of a program at most."""

AHEAD_BYTES = 8
"""Of a channel, that a lane reads together: four events of 16 bits, two of 32. More would cost programs at a time."""

RUN = 16
"""Events of a lane; steps of a lane on the way back, at least."""

BACKWARD_PROGRAMS = 3 * 132
"""Programs on the way back, at most: three on each processor of a Hopper, as many as its registers hold with four taps.
The order of the sums depends on it."""


@triton.jit
def _block(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which lanes a program has, its channels (1, BLOCK_C), and which of those there are."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    return (tl.program_id(0) // blocks).to(tl.int64), c, c < C


@triton.jit
def _at(first, s, REVERSE: tl.constexpr):
    """The event that a lane meets at step s."""
    return first - s if REVERSE else first + s


@triton.jit
def _load(ptr, t, c, STRIDE: tl.constexpr, mask):
    return tl.load(ptr + t[:, None] * STRIDE + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_parameters(weight_ptr, bias_ptr, c, has_c, K: tl.constexpr):
    """(1, BLOCK_C) each: w[0] to w[K-1], and the bias."""
    w = ()
    for k in tl.static_range(K):
        w = w + (tl.load(weight_ptr + c * K + (K - 1 - k), mask=has_c, other=0.0).to(tl.float32),)
    bias = tl.zeros(c.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=has_c, other=0.0).to(tl.float32)
    return w, bias


@triton.jit
def _add_where(mask, a, b, sum):
    """sum + a b where the mask holds: one FMA, executed or not; a masked product takes two instructions."""
    return tl.where(mask[:, None], tl.fma(a, b, sum), sum)


@triton.jit
def _preactivation(inputs, meets, w, bias, K: tl.constexpr):
    pre = tl.fma(inputs[0], w[0], bias)
    for k in tl.static_range(1, K):
        pre = _add_where(meets[k], inputs[k], w[k], pre)
    return pre


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -1.4426950408889634))  # tl.sigmoid takes four instructions more


@triton.jit
def _activated(pre, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return pre * _sigmoid(pre)
    elif ACTIVATION == "hardswish":
        return pre * tl.minimum(tl.maximum(pre * (1 / 6) + 0.5, 0.0), 1.0)
    else:
        return pre


@triton.jit
def _through_activation(dy, pre, ACTIVATION: tl.constexpr):
    """g, the gradient of what was activated."""
    if ACTIVATION == "silu":
        share = _sigmoid(pre)
        return dy * share * (1 + pre * (1 - share))
    elif ACTIVATION == "hardswish":
        return dy * tl.where(pre <= -3, 0.0, tl.where(pre < 3, pre * (1 / 3) + 0.5, 1.0))
    else:
        return dy


@triton.jit
def _before_the_run(
    x_ptr, position_ptr, first, T, c, has_c, X_STRIDE: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr
):
    """x[-1] to x[1-K] of each lane, and their positions."""
    inputs, positions = (), ()
    for k in tl.static_range(1, K):
        t = _at(first, -k, REVERSE)
        there = (t >= 0) & (t < T)
        inputs = inputs + (_load(x_ptr, t, c, X_STRIDE, there[:, None] & has_c),)
        positions = positions + (tl.load(position_ptr + t, mask=there, other=0).to(tl.int32),)
    return inputs, positions


@triton.jit
def _in_row(positions, K: tl.constexpr, REVERSE: tl.constexpr):
    """Whether step s-k is in the row of step s, for k from 0."""
    here = ()
    for k in tl.static_range(K):
        here = here + ((positions[k] if REVERSE else positions[0]) >= k,)
    return here


@triton.jit
def _with_tail(inputs, here, tail_ptr, row_ptr, position, t, T, c, has_c, C: tl.constexpr, K: tl.constexpr):
    """The inputs, those before the row from its tail; without one as they are, and not to be met."""
    if tail_ptr is None:
        return inputs, here
    else:
        row = tl.load(row_ptr + t, mask=t < T, other=0)
        met, meets = (inputs[0],), (here[0],)
        for k in tl.static_range(1, K):
            at = row * (K - 1) + position + (K - 1 - k)
            tail = _load(tail_ptr, at, c, C, ((t < T) & ~here[k])[:, None] & has_c)
            met, meets = met + (tl.where(here[k][:, None], inputs[k], tail),), meets + (here[0],)
        return met, meets


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    tail_ptr,
    position_ptr,
    row_ptr,
    y_ptr,
    T,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr,
    RUN: tl.constexpr,
):
    lanes, c, has_c = _block(C, BLOCK_C)
    first = (lanes * LANES + tl.arange(0, LANES)) * RUN + (RUN - 1 if REVERSE else 0)
    w, bias = _load_parameters(weight_ptr, bias_ptr, c, has_c, K)
    inputs, positions = _before_the_run(x_ptr, position_ptr, first, T, c, has_c, X_STRIDE, K, REVERSE)
    for s in range(0, RUN, AHEAD):
        next_inputs, next_positions = (), ()
        for i in tl.static_range(AHEAD):
            t = _at(first, s + i, REVERSE)
            next_inputs = next_inputs + (_load(x_ptr, t, c, X_STRIDE, (t < T)[:, None] & has_c),)
            next_positions = next_positions + (tl.load(position_ptr + t, mask=t < T, other=0).to(tl.int32),)
        for i in tl.static_range(AHEAD):
            t = _at(first, s + i, REVERSE)
            inputs, positions = (next_inputs[i],) + inputs, (next_positions[i],) + positions
            here = _in_row(positions, K, REVERSE)
            met, meets = _with_tail(inputs, here, tail_ptr, row_ptr, positions[0], t, T, c, has_c, C, K)
            y = _activated(_preactivation(met, meets, w, bias, K), ACTIVATION)
            tl.store(y_ptr + t[:, None] * C + c, y, mask=(t < T)[:, None] & has_c)
            inputs, positions = inputs[: K - 1], positions[: K - 1]


@triton.jit(do_not_specialize=["T", "steps"])
def _backward_kernel(
    dy_ptr,
    dnew_tail_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    tail_ptr,
    position_ptr,
    row_ptr,
    offsets_ptr,
    dx_ptr,
    share_ptr,
    T,
    steps,
    SHARE: tl.constexpr,
    DY_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The last K-1 of `steps` are the first of another lane, which sums their dw: here they only finish dx."""
    lanes, c, has_c = _block(C, BLOCK_C)
    run = steps - (K - 1)
    first = (lanes * LANES + tl.arange(0, LANES)) * run + (run - 1 if REVERSE else 0)
    w, bias = _load_parameters(weight_ptr, bias_ptr, c, has_c, K)
    inputs, positions = _before_the_run(x_ptr, position_ptr, first, T, c, has_c, X_STRIDE, K, REVERSE)
    zeros = tl.zeros([LANES, BLOCK_C], tl.float32)
    dw, unfinished = (), ()
    for k in tl.static_range(K):
        dw = dw + (zeros,)
        if k > 0:
            unfinished = unfinished + (zeros,)  # dx[s-k]
    dbias = zeros
    for s in range(0, steps, AHEAD):
        next_inputs, next_positions, next_dy = (), (), ()
        for i in tl.static_range(AHEAD):
            t = _at(first, s + i, REVERSE)
            there = (t >= 0) & (t < T)
            next_inputs = next_inputs + (_load(x_ptr, t, c, X_STRIDE, there[:, None] & has_c),)
            next_dy = next_dy + (_load(dy_ptr, t, c, DY_STRIDE, there[:, None] & has_c),)
            next_positions = next_positions + (tl.load(position_ptr + t, mask=there, other=0).to(tl.int32),)
        for i in tl.static_range(AHEAD):
            t = _at(first, s + i, REVERSE)
            inputs, positions = (next_inputs[i],) + inputs, (next_positions[i],) + positions
            here = _in_row(positions, K, REVERSE)
            met, meets = _with_tail(inputs, here, tail_ptr, row_ptr, positions[0], t, T, c, has_c, C, K)
            g = _through_activation(next_dy[i], _preactivation(met, meets, w, bias, K), ACTIVATION)
            own = tl.where(s + i < run, g, 0.0)
            dbias += own
            dw_so_far, dw, dx = dw, (tl.fma(own, met[0], dw[0]),), (g * w[0],)
            for k in tl.static_range(1, K):
                dw = dw + (_add_where(meets[k], own, met[k], dw_so_far[k]),)
                dx = dx + (_add_where(here[k], g, w[k], unfinished[k - 1]),)
            t = _at(first, s + i - (K - 1), REVERSE)
            there = (t >= 0) & (t < T) & (s + i >= K - 1)
            finished = dx[K - 1]
            if dnew_tail_ptr is not None:
                row = tl.load(row_ptr + t, mask=there, other=0)
                back = tl.load(offsets_ptr + row + 1, mask=there, other=0) - t  # 1 at the last event of a row
                kept = (there & (back < K))[:, None] & has_c
                finished += _load(dnew_tail_ptr, row * (K - 1) + (K - 1) - back, c, C, kept)
            tl.store(dx_ptr + t[:, None] * C + c, finished, mask=there[:, None] & has_c)
            inputs, positions, unfinished = inputs[: K - 1], positions[: K - 1], dx[: K - 1]
    for k in tl.static_range(K):
        at = share_ptr + lanes * SHARE + c * K + (K - 1 - k)
        tl.store(at, tl.sum(dw[k], axis=0, keep_dims=True), mask=has_c)
    if bias_ptr is not None:
        tl.store(share_ptr + lanes * SHARE + C * K + c, tl.sum(dbias, axis=0, keep_dims=True), mask=has_c)


@triton.jit(do_not_specialize=["B"])
def _tail_kernel(
    x_ptr,
    tail_ptr,
    offsets_ptr,
    new_tail_ptr,
    B,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A lane is a row."""
    lanes, c, has_c = _block(C, BLOCK_C)
    row = lanes * LANES + tl.arange(0, LANES)
    start, stop = (
        tl.load(offsets_ptr + row, mask=row < B, other=0),
        tl.load(offsets_ptr + row + 1, mask=row < B, other=0),
    )
    for j in tl.static_range(K - 1):
        t = stop - (K - 1) + j
        value = _load(x_ptr, t, c, X_STRIDE, ((row < B) & (t >= start))[:, None] & has_c)
        if tail_ptr is not None:
            at = row * (K - 1) + (stop - start) + j
            value += _load(tail_ptr, at, c, C, ((row < B) & (t < start))[:, None] & has_c)
        tl.store(new_tail_ptr + (row * (K - 1) + j)[:, None] * C + c, value, mask=(row < B)[:, None] & has_c)


@triton.jit(do_not_specialize=["B"])
def _tail_backward_kernel(
    dy_ptr,
    dnew_tail_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    tail_ptr,
    offsets_ptr,
    dtail_ptr,
    B,
    DY_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A lane is a row: g of its first K-1 events again, and what a row too short for them left of its old tail."""
    lanes, c, has_c = _block(C, BLOCK_C)
    row = lanes * LANES + tl.arange(0, LANES)
    start, stop = (
        tl.load(offsets_ptr + row, mask=row < B, other=0),
        tl.load(offsets_ptr + row + 1, mask=row < B, other=0),
    )
    w, bias = _load_parameters(weight_ptr, bias_ptr, c, has_c, K)
    inputs = ()
    for j in tl.static_range(K - 1):
        inputs = (_load(tail_ptr, row * (K - 1) + j, c, C, (row < B)[:, None] & has_c),) + inputs
    gs = ()
    for p in tl.static_range(K - 1):
        t = start + p
        there = (t < stop)[:, None] & has_c
        inputs = (_load(x_ptr, t, c, X_STRIDE, there),) + inputs
        dy = _load(dy_ptr, t, c, DY_STRIDE, there)
        pre = tl.fma(inputs[0], w[0], bias)
        for k in tl.static_range(1, K):
            pre = tl.fma(inputs[k], w[k], pre)
        g = _through_activation(dy, pre, ACTIVATION)
        gs = gs + (tl.where(there, g, 0.0),)
        inputs = inputs[: K - 1]
    for j in tl.static_range(K - 1):
        at = row * (K - 1) + j
        dtail = tl.zeros([LANES, BLOCK_C], tl.float32)
        if dnew_tail_ptr is not None:
            kept = (row < B) & (stop - start <= j)
            dtail += _load(dnew_tail_ptr, at - (stop - start), c, C, kept[:, None] & has_c)
        for p in tl.static_range(j + 1):
            dtail += gs[p] * w[K - 1 + p - j]
        tl.store(dtail_ptr + at[:, None] * C + c, dtail, mask=(row < B)[:, None] & has_c)


def _tile(channels: int) -> dict[str, Any]:
    return {"C": channels, "LANES": LANES, "BLOCK_C": min(WIDEST_BLOCK, triton.next_power_of_2(channels))}


def _grid(lanes: int, channels: int) -> tuple[int]:
    return (math.ceil(lanes / LANES) * math.ceil(channels / _tile(channels)["BLOCK_C"]),)


def _ahead(x: Tensor) -> int:
    return AHEAD_BYTES // x.element_size()


def _steps(x: Tensor, taps: int) -> int:
    """Of a lane on the way back: so many that the programs suffice, but not fewer than RUN."""
    events, channels = x.shape
    lanes = LANES * max(1, BACKWARD_PROGRAMS // _grid(1, channels)[0])
    steps = max(RUN, math.ceil(events / lanes) + taps - 1)
    return math.ceil(steps / _ahead(x)) * _ahead(x)


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    position: Tensor,
    row_of_event: Tensor,
    activation: str,
    reverse: bool,
) -> Tensor:
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    events, channels = x.shape
    x, weight, bias, tail = inner_contiguous(x), weight.contiguous(), _whole(bias), _whole(tail)
    grid = _grid(math.ceil(events / RUN), channels)
    options: dict[str, Any] = {"X_STRIDE": x.stride(0), "K": weight.shape[1], "ACTIVATION": activation}
    options |= {"REVERSE": reverse, "RUN": RUN, "AHEAD": _ahead(x), **_tile(channels)}
    with torch.cuda.device_of(x):
        _forward_kernel[grid](x, weight, bias, tail, position, row_of_event, y, events, **options)
    return y


def _launch_backward(
    dy: Tensor,
    dnew_tail: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    position: Tensor,
    row_of_event: Tensor,
    offsets: Tensor,
    activation: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    (events, channels), taps = x.shape, weight.shape[1]
    dx, width = x.new_empty(x.shape), channels * (taps + (bias is not None))
    if not dx.numel():
        return dx, x.new_zeros(width, dtype=torch.float32)
    dy, dnew_tail, x = inner_contiguous(dy), _whole(dnew_tail), inner_contiguous(x)
    weight, bias, tail = weight.contiguous(), _whole(bias), _whole(tail)
    steps = _steps(x, taps)
    lanes = math.ceil(events / (steps - (taps - 1)))
    shares = x.new_empty(math.ceil(lanes / LANES), width, dtype=torch.float32)
    options: dict[str, Any] = {"X_STRIDE": x.stride(0), "DY_STRIDE": dy.stride(0), "K": taps, "ACTIVATION": activation}
    options |= {"REVERSE": reverse, "SHARE": width, "AHEAD": _ahead(x), **_tile(channels)}
    with torch.cuda.device_of(x):
        _backward_kernel[_grid(lanes, channels)](
            dy, dnew_tail, x, weight, bias, tail, position, row_of_event, offsets, dx, shares, events, steps, **options
        )
    return dx, shares.sum(0)


def _launch_tail(x: Tensor, tail: Tensor | None, offsets: Tensor, room: int) -> Tensor:
    rows, channels = len(offsets) - 1, x.shape[1]
    new_tail = x.new_empty(rows, room, channels)
    if not new_tail.numel():
        return new_tail
    x, tail = inner_contiguous(x), _whole(tail)
    options: dict[str, Any] = {"X_STRIDE": x.stride(0), "K": room + 1, **_tile(channels)}
    with torch.cuda.device_of(x):
        _tail_kernel[_grid(rows, channels)](x, tail, offsets, new_tail, rows, **options)
    return new_tail


def _launch_tail_backward(
    dy: Tensor,
    dnew_tail: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    offsets: Tensor,
    activation: str,
) -> Tensor:
    dtail = tail.new_empty(tail.shape)
    if not dtail.numel():
        return dtail
    rows, room, channels = tail.shape
    dy, dnew_tail, x = inner_contiguous(dy), _whole(dnew_tail), inner_contiguous(x)
    weight, bias, tail = weight.contiguous(), _whole(bias), tail.contiguous()
    options: dict[str, Any] = {"X_STRIDE": x.stride(0), "DY_STRIDE": dy.stride(0), "K": room + 1}
    options |= {"ACTIVATION": activation, **_tile(channels)}
    with torch.cuda.device_of(x):
        _tail_backward_kernel[_grid(rows, channels)](
            dy, dnew_tail, x, weight, bias, tail, offsets, dtail, rows, **options
        )
    return dtail


register(
    "short_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? tail, Tensor position, Tensor row_of_event, "
    "str activation, bool reverse) -> Tensor",
    _launch_forward,
    fake=lambda x, *_: x.new_empty(x.shape),
)
register(
    "short_conv_backward(Tensor dy, Tensor? dnew_tail, Tensor x, Tensor weight, Tensor? bias, Tensor? tail, "
    "Tensor position, Tensor row_of_event, Tensor offsets, str activation, bool reverse) -> (Tensor, Tensor)",
    _launch_backward,
    fake=lambda dy, dnew_tail, x, weight, bias, *_: (
        x.new_empty(x.shape),
        x.new_empty(weight.numel() + (0 if bias is None else bias.numel()), dtype=torch.float32),
    ),
)
register(
    "short_conv_tail(Tensor x, Tensor? tail, Tensor offsets, int room) -> Tensor",
    _launch_tail,
    fake=lambda x, tail, offsets, room: x.new_empty(offsets.shape[0] - 1, room, x.shape[1]),
)
register(
    "short_conv_tail_backward(Tensor dy, Tensor? dnew_tail, Tensor x, Tensor weight, Tensor? bias, Tensor tail, "
    "Tensor offsets, str activation) -> Tensor",
    _launch_tail_backward,
    fake=lambda dy, dnew_tail, x, weight, bias, tail, *_: tail.new_empty(tail.shape),
)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tail: Tensor | None,
        position: Tensor,
        row_of_event: Tensor,
        offsets: Tensor,
        activation: str,
        reverse: bool,
        return_tail: bool,
    ) -> Any:
        y = torch.ops.ssd_torchrec.short_conv(x, weight, bias, tail, position, row_of_event, activation, reverse)
        ctx.save_for_backward(x, weight, bias, tail, position, row_of_event, offsets)
        ctx.activation, ctx.reverse = activation, reverse
        if not return_tail:
            return y
        return y, torch.ops.ssd_torchrec.short_conv_tail(x, tail, offsets, weight.shape[1] - 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("short_conv")
        dy, dnew_tail = grad_outputs if len(grad_outputs) == 2 else (*grad_outputs, None)
        x, weight, bias, tail, position, row_of_event, offsets = ctx.saved_tensors
        inputs = (dy, dnew_tail, x, weight, bias, tail)
        dx, dparameters = torch.ops.ssd_torchrec.short_conv_backward(
            *inputs, position, row_of_event, offsets, ctx.activation, ctx.reverse
        )
        dweight = dparameters[: weight.numel()].view(weight.shape).to(weight.dtype)
        dbias = None if bias is None else dparameters[weight.numel() :].to(bias.dtype)
        dtail = None
        if tail is not None and ctx.needs_input_grad[3]:
            dtail = torch.ops.ssd_torchrec.short_conv_tail_backward(*inputs, offsets, ctx.activation)
        return dx, dweight, dbias, dtail, *(None,) * 6


def short_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: JaggedLayout,
    *,
    activation: str,
    reverse: bool = False,
    tail: Tensor | None = None,
    return_tail: bool = False,
) -> Any:
    """The kernels: windows in registers, sums in fp32.

    Raises:
        ShapeError: more taps than the kernels have registers for.
    """
    if weight.shape[1] > MOST_TAPS:
        raise ShapeError(f"weight must have at most {MOST_TAPS} taps on the GPU, got {weight.shape[1]}; use fewer")
    tail = None if tail is None else tail.to(x.dtype)
    rows = (layout.position, layout.row_of_event, layout.offsets)
    return _ShortConv.apply(x, weight, bias, tail, *rows, activation, reverse, return_tail)
