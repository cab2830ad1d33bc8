"""The chunked path of the state-space dual recurrence, and its gradient, in plain PyTorch.

Within a chunk of Q events, with `a` the log decays and i >= j:

    y[i] = sum_j (C[i] . B[j]) exp(a[j+1] + ... + a[i]) u[j]  +  exp(a[1] + ... + a[i]) S C[i]
    S'   = exp(a[1] + ... + a[Q]) S + sum_j exp(a[j+1] + ... + a[Q]) u[j] B[j]^T

S is the state before the chunk, S' the one after it, and u = delta x.

Shapes: n chunks, Q slots, H heads, P channels of a head, N state per channel, G groups; B and C are (n, G, Q, N).
Source: Dao & Gu 2024, arXiv:2405.21060, section 6.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_torchrec.ops.chunks import ChunkTable
from ssd_torchrec.ops.precision import as_given
from ssd_torchrec.ops.registry import refuse_double_backward


class _Decays(NamedTuple):
    """What is left of something after some events of a chunk, from 0 to 1."""

    between: Tensor  # (n, H, Q, Q) from event j to event i; 0 where i is before j
    entering: Tensor  # (n, H, Q) from before the chunk to event i
    leaving: Tensor  # (n, H, Q) from event j to the chunk's end; 0 at padding
    whole: Tensor  # (n, H) from before the chunk to its end


class _Chunks(NamedTuple):
    """The scan's inputs, cut into chunks."""

    u: Tensor  # (n, H, Q, P)
    B: Tensor  # (n, G, Q, N)
    C: Tensor  # (n, G, Q, N)
    decays: _Decays


class _Gradients(NamedTuple):
    """Gradients of `_Chunks`, and of log decays by what spans them: no small one is a difference of two large sums."""

    u: Tensor
    B: Tensor
    C: Tensor
    up_to: Tensor  # (n, H, Q) what reaches event i from before it, or ends there; counts for the decays up to i
    beyond: Tensor  # (n, H, Q) what goes from event j to the chunk's end; counts for the decays after j
    whole: Tensor  # (n, H) what crosses the chunk; counts for all its decays

    def log_decay(self) -> Tensor:
        ones = self.up_to.new_ones(self.up_to.shape[-1], self.up_to.shape[-1])
        return self.up_to @ ones.tril() + self.beyond @ ones.triu(1) + self.whole[..., None]


def _decays(log_decay: Tensor, padding: Tensor) -> _Decays:
    """Of (n, H, Q) log decays, 0 at padding. Sums of them meet as differences, so those are taken in fp64."""
    dtype, slots = log_decay.dtype, log_decay.shape[-1]
    ones = log_decay.new_ones(slots, slots, dtype=torch.float64)
    total = log_decay.double() @ ones.triu()  # deterministic, as cumsum on CUDA is not
    last = total[..., -1:]
    spans = log_decay.new_empty(*total.shape, slots)
    between = _exp(torch.sub(total[..., None], total[..., None, :], out=spans)).tril_()
    entering = _exp(total.to(dtype))
    leaving = _exp((last - total).to(dtype)).masked_fill_(padding[:, None], 0)
    return _Decays(between, entering, leaving, _exp(last[..., 0].to(dtype)))


def _exp(log_decay: Tensor) -> Tensor:
    """exp of at most 0, as rounded sums can rise; 0 where it would come near denormals, which are slow."""
    smallest = 4 * torch.finfo(log_decay.dtype).smallest_normal
    return torch.threshold_(log_decay.clamp(math.log(smallest), 0).exp_(), 2 * smallest, 0)


def _per_head(of_group: Tensor, of_head: Tensor) -> Tensor:
    """Each head times its group: (n, G, ...) and (n, H, ...) to (n, H, ...)."""
    return (of_group[:, :, None] * of_head.unflatten(1, (of_group.shape[1], -1))).flatten(1, 2)


def _per_group(of_head: Tensor, groups: int) -> Tensor:
    """Sum of the heads of each group: (n, H, ...) to (n, G, ...)."""
    return of_head.unflatten(1, (groups, -1)).sum(2)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place; matrices in the last two of four dimensions, `total` contiguous."""
    n, heads, *matrix = total.shape
    total.view(n * heads, *matrix).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))


def _brought(chunks: _Chunks, at: Tensor) -> Tensor:
    """What the chunks `at` add to the state after them: (len(at), H, P, N)."""
    leaving = chunks.decays.leaving[at, ..., None]
    return chunks.u[at].mT @ _per_head(chunks.B[at], leaving)


def _states(chunks: _Chunks, initial: Tensor | None, table: ChunkTable) -> Tensor:
    """The state before each of the last m chunks, which are all that have one: (m, H, P, N).

    Args:
        initial: (rows of rank 0, H, P, N) state before each row's first chunk, rows in the table's order; None for 0.
    """
    carried = _brought(chunks, table.before)
    if initial is not None:
        carried = torch.cat([initial, carried])
    without = len(chunks.u) - len(carried)
    whole = chunks.decays.whole[..., None, None]
    for going, coming in table.steps():
        if going.start >= without:
            carried[_shifted(coming, without)].addcmul_(carried[_shifted(going, without)], whole[going])
    return carried


def _final(chunks: _Chunks, carried: Tensor, initial: Tensor | None, table: ChunkTable) -> Tensor:
    """The state after each row, in the table's order: (B, H, P, N)."""
    without = len(chunks.u) - len(carried)
    after = _brought(chunks, table.last)
    from_state = (table.last >= without).nonzero()[:, 0]
    last = table.last[from_state]
    after.index_add_(0, from_state, carried[last - without] * chunks.decays.whole[last, ..., None, None])
    rows = len(table.row_order) - len(after)
    idle = after.new_zeros(rows, *after.shape[1:]) if initial is None else initial[len(after) :]
    return torch.cat([after, idle])


def _shifted(at: slice, without: int) -> slice:
    return slice(at.start - without, at.stop - without)


def _within(chunks: _Chunks, mixing: Tensor, dy: Tensor) -> _Gradients:
    """Gradients through the events of the same chunk."""
    dmixing = dy @ chunks.u.mT  # (n, H, Q, Q)
    spans = (dmixing * mixing).double()  # summed so that what spans both ends of a decay cancels to nothing
    dproduct = _per_group(dmixing.mul_(chunks.decays.between), chunks.B.shape[1])
    up_to = spans.sum(-1) - spans.sum(-2)
    return _Gradients(
        u=mixing.mT @ dy,
        B=dproduct.mT @ chunks.C,
        C=dproduct @ chunks.B,
        up_to=up_to,
        beyond=torch.zeros_like(up_to),
        whole=torch.zeros_like(up_to[..., 0]),
    )


def _through_entering(chunks: _Chunks, carried: Tensor, dy: Tensor, grads: _Gradients) -> Tensor:
    """Adds the gradients of what states bring to the outputs of chunks; returns the gradient of those states."""
    entered = slice(len(chunks.u) - len(carried), None)
    C, entering, dy = chunks.C[entered], chunks.decays.entering[entered, ..., None], dy[entered]
    dC = (dy @ carried).mul_(entering)
    grads.C[entered].add_(_per_group(dC, C.shape[1]))
    grads.up_to[entered].add_(_per_head(C, dC).sum(-1))
    return dy.mT @ _per_head(C, entering)


def _through_leaving(chunks: _Chunks, at: Tensor, dafter: Tensor, grads: _Gradients) -> None:
    """Adds the gradients of what the chunks `at` add to the state after them, given that state's."""
    B, leaving = chunks.B[at], chunks.decays.leaving[at, ..., None]
    grads.u.index_add_(0, at, _per_head(B, leaving) @ dafter.mT)
    dB = (chunks.u[at] @ dafter).mul_(leaving)
    grads.B.index_add_(0, at, _per_group(dB, B.shape[1]))
    grads.beyond.index_add_(0, at, _per_head(B, dB).sum(-1).to(grads.beyond.dtype))


def _across(
    chunks: _Chunks, carried: Tensor, dy: Tensor, dfinal: Tensor | None, table: ChunkTable, grads: _Gradients
) -> Tensor:
    """Adds the gradients through states; returns that of `carried`, all paths included.

    Args:
        dfinal: (B, H, P, N) gradient of the state after each row, rows in the table's order; None if there is none.
    """
    without = len(chunks.u) - len(carried)
    whole = chunks.decays.whole[..., None, None]
    dcarried = _through_entering(chunks, carried, dy, grads)
    if dfinal is not None:
        dafter = dfinal[: len(table.last)]
        _through_leaving(chunks, table.last, dafter, grads)
        from_state = (table.last >= without).nonzero()[:, 0]
        last = table.last[from_state]
        dkept = dafter[from_state] * whole[last]
        grads.whole[last] = (dkept * carried[last - without]).sum((-1, -2)).to(grads.whole.dtype)
        dcarried.index_add_(0, last - without, dkept)
    for going, coming in reversed([*table.steps()]):
        if going.start >= without:
            before = _shifted(going, without)
            dkept = dcarried[_shifted(coming, without)] * whole[going]
            dcarried[before] += dkept
            grads.whole[going] = dkept.mul_(carried[before]).sum((-1, -2))
    _through_leaving(chunks, table.before, dcarried[len(dcarried) - len(table.before) :], grads)
    return dcarried


def _of_initial(dcarried: Tensor, dfinal: Tensor | None, table: ChunkTable) -> Tensor:
    """The gradient of the initial states: what enters the first chunks, and, of rows without events, what leaves."""
    rows = sum(table.rows_of_rank[:1])
    idle = dcarried.new_zeros(len(table.row_order) - rows, *dcarried.shape[1:]) if dfinal is None else dfinal[rows:]
    return torch.cat([dcarried[:rows], idle])[table.place_of_row]


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        initial: Tensor | None,
        table: ChunkTable,
        keep_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        step = table.cut(delta).masked_fill_(table.is_padding[:, None], 0)  # (n, H, Q)
        decays = _decays(step * A[:, None], table.is_padding)
        chunks = _Chunks(table.cut(x * delta[..., None]), table.cut(B), table.cut(C), decays)
        with as_given(x):
            mixing = _per_head(chunks.C @ chunks.B.mT, decays.between)  # (n, H, Q, Q)
            y = mixing @ chunks.u
            first = None if initial is None else initial[table.row_order]
            carried = _states(chunks, None if first is None else first[: len(table.last)], table)
            entered = slice(len(y) - len(carried), None)
            reading = _per_head(chunks.C[entered], decays.entering[entered, ..., None])
            _add_product(y[entered], reading, carried.mT)
            final = _final(chunks, carried, first, table)[table.place_of_row] if keep_final else None
        ctx.table, ctx.has_initial, ctx.has_final = table, initial is not None, keep_final
        ctx.save_for_backward(x, delta, A, step, mixing, carried, *chunks[:3], *decays)
        return table.join(y), final

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("ssd_scan")
        dy, dfinal = grad_outputs
        table: ChunkTable = ctx.table
        x, delta, A, step, mixing, carried, u, B, C, *decays = ctx.saved_tensors
        chunks = _Chunks(u, B, C, _Decays(*decays))
        with as_given(x):
            dy = table.cut(dy).masked_fill_(table.is_padding[:, None, :, None], 0)
            grads = _within(chunks, mixing, dy)
            dfinal = dfinal[table.row_order] if ctx.has_final else None
            dcarried = _across(chunks, carried, dy, dfinal, table, grads)
        dlog_decay, du = grads.log_decay(), table.join(grads.u)
        ddelta = table.join(dlog_decay * A[:, None]).to(x.dtype) + (du * x).sum(-1)
        dA = (dlog_decay * step).sum((0, 2)).to(x.dtype)
        dinitial = _of_initial(dcarried, dfinal, table) if ctx.has_initial else None
        return du * delta[..., None], ddelta, dA, table.join(grads.B), table.join(grads.C), dinitial, None, None


def chunked_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    table: ChunkTable,
    *,
    initial_state: Tensor | None = None,
    keep_final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence alone, all tensors of one dtype, chunk by chunk.

    Args:
        x: (T, H, P).
        delta: (T, H) steps, positive.
        A: (H,) below 0.
        B: (T, G, N).
        C: (T, G, N).
        initial_state: (B, H, P, N) before each row's first event, 0 where None.

    Returns:
        (T, H, P) `S C`, and with `keep_final` the (B, H, P, N) state after each row, else None.
    """
    return _ChunkedScan.apply(x, delta, A, B, C, initial_state, table, keep_final)
