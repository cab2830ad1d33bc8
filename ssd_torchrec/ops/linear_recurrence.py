"""Linear recurrence with a constant complex decay, within each row of a jagged batch.

    h[t]   = decay h[t-1] + x[t]                          before a row's first event: initial_state, or 0
    dx[t]  = conj(decay) dx[t+1] + dh[t]                  the gradient: the same recurrence, backwards
    ddecay = sum_t conj(h[t-1]) dx[t]

Shapes: B rows, T events in all, N channels; all complex. Each channel has one decay for all events.

Rows are cut into chunks of Q events. All chunks advance side by side, one event a step, as if each began a row; then
states pass from chunk to chunk, one rank a step; then each event adds what its chunk began with, decayed. With Q near
the root of the longest row's length L this takes some 2 sqrt(L) steps, passes twice over the events, and holds a few
times (T, N). It divides by nothing, so that no decay is too fast for it.
Source: Orvieto et al. 2023, arXiv:2303.06349, section 3; Yue et al. 2024, LRURec, arXiv:2310.02367.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ssd_torchrec.errors import DtypeError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.chunks import chunk_table
from ssd_torchrec.ops.registry import refuse_double_backward


def linear_recurrence_definition(
    x: Tensor,
    decay: Tensor,
    layout: JaggedLayout,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """The definition, one event at a time: any device, any dtype, differentiable; in complex128 the truth."""
    initial = x.new_zeros(layout.num_rows, x.shape[1]) if initial_state is None else initial_state
    nothing = x[:0].sum() + decay[:0].sum() + initial[:0].sum()  # 0, in the graph of each input
    states, final = [], []
    for state, (start, stop) in zip(initial.unbind(), pairwise(layout.offsets.tolist()), strict=True):
        for t in range(start, stop):
            state = decay * state + x[t]
            states.append(state)
        final.append(state + nothing)
    out = torch.stack(states) if states else x + nothing
    if not return_final_state:
        return out
    return out, torch.stack(final) if final else initial + nothing


def linear_recurrence_chunked(
    x: Tensor,
    decay: Tensor,
    layout: JaggedLayout,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """All chunks of all rows at once, in plain PyTorch on any device."""
    initial = x.new_zeros(layout.num_rows, x.shape[1]) if initial_state is None else initial_state
    out = _Recurrence.apply(x, decay, initial, layout)
    if not return_final_state:
        return out
    rows = torch.arange(layout.num_rows, device=x.device)
    newest = torch.where(layout.last_event >= 0, layout.last_event, layout.num_events + rows)
    return out, torch.cat([out, initial]).index_select(0, newest)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor, initial: Tensor, layout: JaggedLayout) -> Tensor:
        out = _recur(x, decay, initial, layout)
        ctx.save_for_backward(decay, initial, out)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_recurrence")
        decay, initial, out = ctx.saved_tensors
        layout, conjugate = ctx.layout, decay.conj().resolve_conj()
        dx = _recur(grad_outputs[0], conjugate, None, layout, reverse=True)
        is_first = (layout.position == 0)[:, None]
        past = torch.where(is_first, initial.index_select(0, layout.row_of_event), out.roll(1, 0))
        first = torch.where(layout.last_event >= 0, layout.offsets[:-1], layout.num_events)
        dinitial = conjugate * torch.cat([dx, dx.new_zeros(1, dx.shape[1])]).index_select(0, first)
        return dx, (past.conj() * dx).sum(0), dinitial, None


def _recur(x: Tensor, decay: Tensor, initial: Tensor | None, layout: JaggedLayout, *, reverse: bool = False) -> Tensor:
    """(T, N) states after each event, or before it in time with `reverse`; without gradient."""
    if not len(x):
        return x.clone()
    table = chunk_table(layout, _slots(layout), reverse=reverse)
    chunks, slots = table.event_of_slot.shape
    h = x.index_select(0, table.event_of_slot.T.flatten()).view(slots, chunks, -1)
    powers = decay.expand(slots, -1).cumprod(0)  # (Q, N) decay to the 1st, 2nd, ...
    for slot in range(1, slots):
        h[slot].addcmul_(h[slot - 1], decay)
    begins = torch.zeros_like(h[0])  # (n, N) what each chunk begins with
    if initial is not None:
        begins[: table.rows_of_rank[0]] = initial.index_select(0, table.row_order[: table.rows_of_rank[0]])
    for before, after in table.steps():
        torch.addcmul(h[-1, before], begins[before], powers[-1], out=begins[after])
    h.addcmul_(powers[:, None], begins)
    chunk, slot = table.slot_of_event // slots, table.slot_of_event % slots
    return h.flatten(0, 1).index_select(0, slot * chunks + chunk)


def _slots(layout: JaggedLayout) -> int:
    """Events of a chunk: the root of the longest row's, but no more than a row has on average, for little padding."""
    return max(1, min(math.isqrt(layout.longest), layout.num_events // layout.num_rows))


def linear_recurrence(
    x: Tensor,
    decay: Tensor,
    layout: JaggedLayout,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """Linear recurrence within each row; state never crosses a row boundary.

    Args:
        x: (T, N) complex, what each event adds to the state.
        decay: (N,) complex, what a state is multiplied by from event to event; of absolute value 1 at most, or states
            grow.
        initial_state: (B, N) complex, before each row's first event; 0 if None.
        return_final_state: also return the state after each row's last event.

    Returns:
        (T, N) state after each event, in the dtype of `x`. With `return_final_state` also (B, N); a row without events
        keeps its initial state.

    Raises:
        JaggedLayoutError: `x` does not hold the events of `layout`.
        ShapeError: shapes do not fit each other.
        DtypeError: tensors are not complex of one precision.

    Deterministic; other rows change a row's result by rounding at most. Takes the definition if `x` is complex128; else
    has no second derivative. On CUDA it is the same PyTorch code, and waits for the device at a layout's first use.
    """
    layout.check(x)
    if x.ndim != 2:
        raise ShapeError(f"x must be (T, N), got {tuple(x.shape)}; flatten what an event has into one dimension")
    check_shape("decay", decay, (x.shape[1],), "give each channel of x one decay")
    check_shape("initial_state", initial_state, (layout.num_rows, x.shape[1]), "give each row a state")
    dtypes = {t.dtype for t in (x, decay, initial_state) if t is not None}
    if dtypes not in ({torch.complex64}, {torch.complex128}):
        raise DtypeError(
            f"linear_recurrence must be given complex64 or complex128 throughout, got {' and '.join(map(str, dtypes))}"
            "; make pairs of reals complex with torch.view_as_complex"
        )
    recurrence = linear_recurrence_definition if x.dtype == torch.complex128 else linear_recurrence_chunked
    return recurrence(x, decay, layout, initial_state=initial_state, return_final_state=return_final_state)
