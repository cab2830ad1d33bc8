"""Short depthwise convolution along each row of a jagged batch.

    y[t] = act(bias + sum_k weight[K-1-k] x[t-k])          k = 0 .. K-1
    y[t] = act(bias + sum_k weight[K-1-k] x[t+k])          with reverse

Shapes: B rows, T events in all; this file's C are channels, K taps. Tap K-1 meets the event itself. What lies before a
row's first event is its tail, the last K-1 inputs before it, oldest first: 0 if not given. After its last event lie 0s.
Source: Dao & Gu 2024, arXiv:2405.21060, section 7.1, with the padding of each row its own.
"""

from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.errors import ConfigError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.launch import check_tensors
from ssd_torchrec.ops.precision import as_given, sum_dtype
from ssd_torchrec.ops.registry import refuse_double_backward
from ssd_torchrec.ops.short_conv_triton import short_conv_triton

Activation = Literal["silu", "hardswish", "none"]
_ACTIVATIONS = {"silu": F.silu, "hardswish": F.hardswish, "none": lambda x: x}


def short_conv_definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: JaggedLayout,
    *,
    activation: Activation,
    reverse: bool = False,
    tail: Tensor | None = None,
    return_tail: bool = False,
) -> Any:
    """The definition, one event at a time: any device, any dtype, differentiable; in fp64 the truth."""
    taps = weight.shape[1]
    nothing = torch.stack([t[:0].sum() for t in (x, weight, tail) if t is not None]).sum()  # 0, and in every graph
    pasts = x.new_zeros(layout.num_rows, taps - 1, x.shape[1]) if tail is None else tail.to(x.dtype)
    y, tails = [], []
    for past, row in zip(pasts.unbind(), x.split(layout.offsets.diff().tolist()), strict=True):
        inputs = torch.cat([past, row.flip(0) if reverse else row])
        outputs = [(weight.T * inputs[t : t + taps]).sum(0) for t in range(len(row))]
        y += reversed(outputs) if reverse else outputs
        tails.append(inputs[len(row) :] + nothing)
    out = torch.stack(y) if y else x + nothing
    out = _ACTIVATIONS[activation](out if bias is None else out + bias).to(x.dtype)
    if not return_tail:
        return out
    return out, torch.stack(tails) if tails else pasts + nothing


@dataclass(frozen=True, eq=False)
class _Stream:
    """All rows end to end, with room for K-1 inputs before each, or after it with reverse, and for K at the end.

    # rows of 3 and 2 events, K = 3, r is room      r r a b c r r d e r r r
    # reverse                                       a b c r r d e r r r r r
    """

    event_of_slot: Tensor  # (S,) int64, any event for room
    room: Tensor  # (S - T,) int64 slots, those of the rows first
    slot_of_event: Tensor  # (T,) int64
    window: Tensor  # (T,) int64 first of the K slots that an event's output is made of
    lead: int  # slots of its window before the event: K-1, or 0 with reverse


_STREAMS: WeakKeyDictionary[JaggedLayout, dict[tuple[int, bool], _Stream]] = WeakKeyDictionary()


def _stream(layout: JaggedLayout, taps: int, reverse: bool) -> _Stream:
    """Built at first use and kept as long as the layout lives."""
    streams = _STREAMS.setdefault(layout, {})
    if (taps, reverse) not in streams:
        device, room = layout.offsets.device, taps - 1
        window = torch.arange(layout.num_events, device=device) + room * layout.row_of_event
        lead = 0 if reverse else room
        rows = torch.arange(layout.num_rows, device=device)
        beside = (layout.offsets[1:] if reverse else layout.offsets[:-1]) + room * rows
        end = layout.num_events + room * layout.num_rows
        of_rows = (beside[:, None] + torch.arange(room, device=device)).flatten()
        event_of_slot = window.new_zeros(end + taps)
        event_of_slot[window + lead] = torch.arange(layout.num_events, device=device)
        room_slots = torch.cat([of_rows, torch.arange(end, end + taps, device=device)])
        streams[taps, reverse] = _Stream(event_of_slot, room_slots, window + lead, window, lead)
    return streams[taps, reverse]


class _Lay(torch.autograd.Function):
    """(T, C) events to the (S, C) slots of a stream, zeros in the room. Gathered: to scatter takes thrice as long."""

    @staticmethod
    def forward(ctx: Any, events: Tensor, stream: _Stream) -> Tensor:
        ctx.stream = stream
        return _laid(events, stream)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        refuse_double_backward("short_conv")
        return grad_outputs[0].index_select(0, ctx.stream.slot_of_event), None


def _laid(events: Tensor, stream: _Stream) -> Tensor:
    if not len(events):
        return events.new_zeros(len(stream.event_of_slot), events.shape[1])
    return events.index_select(0, stream.event_of_slot).index_fill_(0, stream.room, 0)


class _Windows(torch.autograd.Function):
    """Products of the window of each event, (S, C) to (T, C). PyTorch is slow at the gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, weight: Tensor, bias: Tensor | None, stream: _Stream) -> Tensor:
        ctx.save_for_backward(slots, weight)
        ctx.stream, ctx.has_bias = stream, bias is not None
        return _correlate(slots, weight, bias).index_select(0, stream.window)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("short_conv")
        (dy,) = grad_outputs
        slots, weight = ctx.saved_tensors
        taps, lead = weight.shape[1], ctx.stream.lead
        laid = _laid(dy, ctx.stream)  # each dy `lead` slots after its window begins
        windows = laid[lead : lead + len(slots) - taps + 1]
        product = torch.empty_like(windows)
        dweight = [torch.mul(windows, slots[k : k + len(windows)], out=product).sum(0) for k in range(taps)]
        dbias = dy.sum(0) if ctx.has_bias else None
        dslots = _correlate(laid, weight.flip(1), None, padding=taps - 1)[lead : lead + len(slots)]
        return dslots, torch.stack(dweight, dim=1), dbias, None


def _correlate(slots: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    image = slots[None, None].permute(0, 3, 1, 2)  # (1, C, 1, S), channels last in memory as they are
    with as_given(slots):
        out = F.conv2d(image, weight[:, None, None, :], bias, padding=(0, padding), groups=len(weight))
    return out[0, :, 0].T


def short_conv_stream(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: JaggedLayout,
    *,
    activation: Activation,
    reverse: bool = False,
    tail: Tensor | None = None,
    return_tail: bool = False,
) -> Any:
    """All rows at once, as one stream with room for a tail between them: no window reaches into another row."""
    dtype = sum_dtype(x)
    stream = _stream(layout, weight.shape[1], reverse)
    slots: Tensor = _Lay.apply(x.to(dtype), stream)
    if tail is not None:
        slots = slots.index_copy(0, stream.room[: -weight.shape[1]], tail.to(dtype).flatten(0, 1))
    taps_in_order = (weight.flip(1) if reverse else weight).to(dtype)
    y = _Windows.apply(slots, taps_in_order, None if bias is None else bias.to(dtype), stream)
    y = _ACTIVATIONS[activation](y).to(x.dtype)
    if not return_tail:
        return y
    room = weight.shape[1] - 1
    newest = (layout.offsets[1:] + room * torch.arange(layout.num_rows, device=x.device))[:, None]
    return y, slots[newest + torch.arange(room, device=x.device)].to(x.dtype)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: JaggedLayout,
    *,
    activation: Activation,
    reverse: bool = False,
    tail: Tensor | None = None,
    return_tail: bool = False,
) -> Any:
    """Short depthwise convolution within each row, then an activation.

    Args:
        x: (T, C) events.
        weight: (C, K) taps of each channel, at least one; the last meets the event itself.
        bias: (C,) or None.
        activation: "silu", "hardswish" or "none".
        reverse: look at the following events instead of the past ones.
        tail: (B, K-1, C) inputs before each row's first event, oldest first; 0 if None.
        return_tail: also return the tail that the next events of each row will need.

    Returns:
        (T, C) in the dtype of `x`; summed in fp32, or in fp64 if `x` is. With `return_tail` also (B, K-1, C) in that
        dtype: the last K-1 of old tail and row together, so a row shorter than that keeps the rest of its old tail.

    Raises:
        JaggedLayoutError: `x` does not hold the events of `layout`.
        ShapeError: shapes do not fit each other, or on a GPU there are more than 8 taps.
        DtypeError: `x` is none of fp64, fp32, bf16 and fp16, or another tensor is no floating point one or elsewhere.
        ConfigError: the activation is none of the three, or `reverse` came with a tail: what follows a row's last event
            is not known when the row is, so backwards there is no stream to resume.

    Deterministic; other rows change a row's result by rounding at most. Takes the definition if `x` is fp64; else has
    no second derivative.
    """
    layout.check(x)
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"activation must be silu, hardswish or none, got {activation!r}; choose one of the three")
    if reverse and (tail is not None or return_tail):
        raise ConfigError(
            "reverse must come without a tail, got both; backwards a row has no past, resume forwards only"
        )
    if x.ndim != 2 or weight.ndim != 2 or not weight.shape[1]:
        raise ShapeError(
            f"x must be (T, C) and weight (C, K), got {tuple(x.shape)} and {tuple(weight.shape)}; "
            "drop the middle dimension of a Conv1d weight"
        )
    channels, taps = x.shape[1], weight.shape[1]
    check_shape("weight", weight, (channels, taps), "give each channel of x its taps")
    check_shape("bias", bias, (channels,), "give each channel of x one value")
    check_shape("tail", tail, (layout.num_rows, taps - 1, channels), "give each row of the layout its last K-1 inputs")
    options = {"activation": activation, "reverse": reverse, "tail": tail, "return_tail": return_tail}
    if x.dtype == torch.float64:
        return short_conv_definition(x, weight, bias, layout, **options)
    check_tensors("short_conv", x, {"weight": weight, "bias": bias, "tail": tail})
    conv = short_conv_triton if x.is_cuda else short_conv_stream
    return conv(x, weight, bias, layout, **options)
