"""What the kernels of the state-space scan share: where a chunk lies, its steps, and what its decays leave.

Rows are cut into chunks of Q events from their first event on, whichever way the scan runs. Row r owns the slots from
offsets[r] // Q + r on, one a chunk and at times one more, which stays unused: T // Q + B in all. So a program finds its
chunk from the offsets alone, and nothing waits for the device.

Within a chunk, with `a` the log2 decays, `reach` of an event is their sum from the chunk's beginning in the order of
the scan up to and with that event. Then, whichever way the scan runs:

    between(i, j) = 2^(reach[i] - reach[j])      from event j to event i
    entering(i)   = 2^reach[i]                   from before the chunk to event i
    leaving(j)    = 2^(total - reach[j])         from event j to the chunk's end
    whole         = 2^total

Shapes: B rows, T events in all, Q events of a chunk, H heads.
Source: Dao & Gu 2024, arXiv:2405.21060, section 6.
"""

# Checkers read a kernel as Python, where another kernel returns nothing.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


def num_slots(num_events: int, num_rows: int, span: int) -> int:
    """Slots of all chunks, or pieces, of `span` events."""
    return num_events // span + num_rows


@triton.jit
def locate(offsets_ptr, rows, slot, SPAN: tl.constexpr):
    """The row that owns a slot, by bisection, and the slot's place among those of the row."""
    low = slot * 0
    high = low + rows
    while high - low > 1:
        middle = (low + high) // 2
        owns = tl.load(offsets_ptr + middle) // SPAN + middle <= slot
        low = tl.where(owns, middle, low)
        high = tl.where(owns, high, middle)
    return low, slot - (tl.load(offsets_ptr + low) // SPAN + low)


@triton.jit
def chunk_of_slot(offsets_ptr, rows, slot, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """First event of a slot's chunk, the row's events from there on, at most 0 if it is unused, and its place.

    WHOLE: each row is one chunk, and its slot.
    """
    if WHOLE:
        row = slot
        chunk = slot * 0
    else:
        row, chunk = locate(offsets_ptr, rows, slot, CHUNK)
    begin = tl.load(offsets_ptr + row) + chunk * CHUNK
    return begin, tl.load(offsets_ptr + row + 1) - begin, chunk


@triton.jit
def softplus(v, PRECISE: tl.constexpr):
    """log(1 + e^v) in fp32, v itself above 20.

    Accurate where e^v is small and log(1 + e^v) alone would not be. A step's relative error is multiplied by its log
    decay, and the GPU's exp of fp32 has several units of the last digit: PRECISE takes both from fp64.
    """
    power = tl.minimum(v, 20.0)
    power = tl.exp(power.to(tl.float64) if PRECISE else power)
    above_one = 1.0 + power
    log = tl.where(above_one == 1.0, power, tl.log(above_one) * (power / tl.maximum(above_one - 1.0, 1e-30)))
    return tl.where(v > 20.0, v, log.to(tl.float32))


@triton.jit
def reach_of(log_decay, REVERSE: tl.constexpr, PRECISE: tl.constexpr):
    """Reach of each event, down axis 0, in two fp32 parts, and what enters, leaves and crosses the chunk.

    Differences of reaches are what decays are made of: in fp32 they lose what the sums have gained, so log decays are
    fp64 where PRECISE, and what fp32 cannot hold of their sums is handed on as a second part.
    """
    reach = tl.cumsum(log_decay, 0)
    total = tl.sum(log_decay, 0)
    if REVERSE:
        reach = total[None] - reach + log_decay
    high = reach.to(tl.float32)
    low = high
    if PRECISE:
        low = (reach - high).to(tl.float32)
    entering = tl.exp2(tl.minimum(high, 0.0))
    leaving = tl.exp2(tl.minimum((total[None] - reach).to(tl.float32), 0.0))
    return high, low, entering, leaving, tl.exp2(total.to(tl.float32))


@triton.jit
def between(high_to, low_to, high_from, low_from, kept, PRECISE: tl.constexpr):
    """Decays from events to events, each given along its own axis; 0 where not `kept`."""
    exponent = high_to - high_from
    if PRECISE:
        exponent += low_to - low_from
    return tl.where(kept, tl.exp2(tl.minimum(exponent, 0.0)), 0.0)


@triton.jit
def log_decays(delta, A, PRECISE: tl.constexpr):
    """log2 of the decay of each step."""
    return delta.to(tl.float64) * A.to(tl.float64) * LOG2_E if PRECISE else delta * (A * LOG2_E)


@triton.jit
def steps_of(dt_ptr, A_ptr, dt_bias_ptr, q, dt_stride, here, HAS_BIAS: tl.constexpr, PRECISE: tl.constexpr):
    """Raw steps of the events `q` of one head, bias included, their softplus, 0 where not `here`, and log2 decays."""
    raw = tl.load(dt_ptr + q * dt_stride, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias_ptr).to(tl.float32)
    delta = tl.where(here, softplus(raw, PRECISE), 0.0)
    return raw, delta, log_decays(delta, tl.load(A_ptr).to(tl.float32), PRECISE)
