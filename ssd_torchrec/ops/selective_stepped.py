"""The CPU path of the selective scan, and its gradient: one event of every row at once, in plain PyTorch.

    S[t]  = a[t] S[t-1] + u[t] B[t]^T          y[t] = S[t] C[t]               a = exp(delta A), u = delta x
    G[t]  = R[t] + dy[t] C[t]^T                R[t-1] = a[t] G[t]             R after a row's last event: dfinal
    dC[t] = S[t]^T dy[t]     dB[t] = G[t]^T u[t]     du[t] = G[t] B[t]
    dA    = sum_t delta[t] (R[t-1] S[t-1])     ddelta[t] = (R[t-1] S[t-1] A) summed over N + x[t] du[t]

Events are laid out rank by rank, rows of most events first, so that a step takes a slice of every tensor. Only states
before every k-th step are kept, k the root of the longest row's length; the gradient makes those in between again, and
divides by nothing, so that no decay is too fast for it.

Shapes: B rows, T events in all, E channels, N state per channel. States are (rows, N, E), since most sums are over N.
Source: Gu & Dao 2023, arXiv:2312.00752, section 3.3.2, recomputation.
"""

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_torchrec.ops.chunks import ChunkTable
from ssd_torchrec.ops.precision import as_given
from ssd_torchrec.ops.registry import refuse_double_backward


class _Ranks(NamedTuple):
    """The scan's inputs, rank by rank."""

    x: Tensor  # (T, E)
    delta: Tensor  # (T, E)
    u: Tensor  # (T, E)
    B: Tensor  # (T, N)
    C: Tensor  # (T, N)
    A: Tensor  # (N, E)


def _by_rank(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, table: ChunkTable) -> _Ranks:
    order = table.event_of_slot[:, 0]
    x, delta, B, C = (events.index_select(0, order) for events in (x, delta, B, C))
    return _Ranks(x, delta, delta * x, B, C, A.T.contiguous())


def _spans(table: ChunkTable) -> list[slice]:
    """Where the events of each rank lie."""
    return [slice(*span) for span in pairwise(accumulate(table.rows_of_rank, initial=0))]


def _blocks(table: ChunkTable) -> Iterator[list[slice]]:
    """Ranks, k at a time; the state before each block is kept."""
    spans = _spans(table)
    size = max(1, math.isqrt(len(spans)))
    return (spans[first : first + size] for first in range(0, len(spans), size))


def _decay(ranks: _Ranks, at: slice, scratch: Tensor) -> Tensor:
    """(rows, N, E) in `scratch`."""
    return torch.mul(ranks.delta[at, None], ranks.A, out=scratch[: at.stop - at.start]).exp_()


def _advance(state: Tensor, ranks: _Ranks, at: slice, scratch: Tensor) -> Tensor:
    """The states of the first rows after one step, in place."""
    state = state[: at.stop - at.start]
    return state.mul_(_decay(ranks, at, scratch)).addcmul_(ranks.u[at, None], ranks.B[at, :, None])


def _read(state: Tensor, direction: Tensor) -> Tensor:
    """(rows, N, E) summed over N by (rows, N): (rows, E)."""
    return torch.bmm(direction[:, None], state)[:, 0]


def _gather(state: Tensor, of_channels: Tensor, scratch: Tensor) -> Tensor:
    """(rows, N, E) summed over E by (rows, E): (rows, N)."""
    return torch.mul(state, of_channels[:, None], out=scratch[: len(state)]).sum(-1)


class _SteppedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, table: ChunkTable
    ) -> tuple[Tensor, Tensor]:
        ranks = _by_rank(x, delta, A, B, C, table)
        rows = len(table.row_order)
        if initial is None:
            state = x.new_zeros(rows, *ranks.A.shape)
        else:
            state = initial.index_select(0, table.row_order).mT.contiguous()
        y, kept, scratch = torch.empty_like(x), [], torch.empty_like(state)
        with as_given(x):
            for block in _blocks(table):
                kept.append(state[: block[0].stop - block[0].start].clone())
                for at in block:
                    y[at] = _read(_advance(state, ranks, at, scratch), ranks.C[at])
        ctx.table, ctx.has_initial = table, initial is not None
        ctx.save_for_backward(x, delta, A, B, C, *kept)
        return y.index_select(0, table.slot_of_event), state.index_select(0, table.place_of_row).mT.contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("selective_scan")
        dy, dfinal = grad_outputs
        table: ChunkTable = ctx.table
        x, delta, A, B, C, *kept = ctx.saved_tensors
        ranks = _by_rank(x, delta, A, B, C, table)
        dy = dy.index_select(0, table.event_of_slot[:, 0])
        dstate = dfinal.index_select(0, table.row_order).mT.contiguous()  # R: what the following step hands back
        du, ddelta, dB, dC = (torch.empty_like(t) for t in (ranks.x, ranks.delta, ranks.B, ranks.C))
        dA = torch.zeros_like(ranks.A, dtype=torch.float64)
        decay, scratch = torch.empty_like(dstate), torch.empty_like(dstate)
        with as_given(dy):
            for block, before in reversed(list(zip(_blocks(table), kept, strict=True))):
                states = [before]
                for at in block:
                    states.append(_advance(states[-1][: at.stop - at.start].clone(), ranks, at, scratch))
                for at in reversed(block):
                    after, past = states.pop(), states[-1][: at.stop - at.start]
                    grad = dstate[: len(after)].addcmul_(dy[at, None], ranks.C[at, :, None])
                    dC[at] = _gather(after, dy[at], scratch)
                    dB[at] = _gather(grad, ranks.u[at], scratch)
                    du[at] = _read(grad, ranks.B[at])
                    dlog_decay = torch.mul(grad.mul_(_decay(ranks, at, decay)), past, out=after)
                    ddelta[at] = torch.mul(dlog_decay, ranks.A, out=scratch[: len(after)]).sum(1)
                    dA += dlog_decay.mul_(ranks.delta[at, None]).sum(0)
        ddelta += du * ranks.x
        dx = du * ranks.delta
        dx, ddelta, dB, dC = (events.index_select(0, table.slot_of_event) for events in (dx, ddelta, dB, dC))
        dinitial = dstate.index_select(0, table.place_of_row).mT if ctx.has_initial else None
        return dx, ddelta, dA.T.to(A.dtype), dB, dC, dinitial, None


def stepped_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, table: ChunkTable, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence alone, all tensors of one dtype.

    Args:
        x: (T, E).
        delta: (T, E) steps, positive.
        A: (E, N) below 0.
        B: (T, N).
        C: (T, N).
        table: of chunks of one event.
        initial_state: (B, E, N) before each row's first event, 0 where None.

    Returns:
        (T, E) `S C`, and the (B, E, N) state after each row.
    """
    return _SteppedScan.apply(x, delta, A, B, C, initial_state, table)
