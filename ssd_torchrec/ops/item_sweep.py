"""The item softmax on the CPU, gradients in the same sweep over the queries as the loss.

    p[i, k]        = softmax of the logits of query i
    loss[i]        = highest[i] - log max_k p[i, k] - logit[i, target[i]]      max p = exp(0) / sum exp(logit - highest)
    dqueries[i]    = w[i] sum_k (p[i, k] - [k = target[i]]) candidates[k]
    dcandidates[k] = sum_i w[i] (p[i, k] - [k = target[i]]) queries[i]           w: gradient of the loss

All logits of some queries are held at a time, so three products do where tiles over candidates take four. Both
gradients are made for w = 1 and scaled when w is known, which asks for one w for all; else they are made anew.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_torchrec.ops.linear import over_events, product
from ssd_torchrec.ops.precision import as_given, sum_dtype
from ssd_torchrec.ops.registry import refuse_double_backward

HELD = 2**20
"""Logits held at a time, twice: what stays in a core's cache."""

FEWEST_QUERIES = 32
"""Held at a time however many candidates there are, whose gradient is read and written once for them."""


class _Gradients(NamedTuple):
    queries: Tensor  # (M, D)
    candidates: Tensor  # (D, K), turned, as the products give it
    log_q: Tensor | None  # (K,)


def _slices(queries: Tensor, candidates: Tensor) -> Iterator[slice]:
    height = max(HELD // max(len(candidates), 1), FEWEST_QUERIES)
    return (slice(at, at + height) for at in range(0, len(queries), height))


def _logits(queries: Tensor, candidates: Tensor, log_q: Tensor | None) -> Tensor:
    logits = product(queries, candidates)
    return logits if log_q is None else logits.sub_(log_q)


def _add_gradients(
    grads: _Gradients,
    p: Tensor,
    rows: slice,
    queries: Tensor,
    candidates: Tensor,
    target: Tensor,
    weight: Tensor | None,
) -> None:
    """Adds what some queries bring, given their softmax `p`, which is used up."""
    dlogits = p.scatter_add_(1, target[rows, None], p.new_full((len(p), 1), -1))
    if weight is not None:
        dlogits *= weight[rows, None]
    grads.queries[rows] = product(dlogits, candidates.T)
    grads.candidates.add_(over_events(queries[rows], dlogits))
    if grads.log_q is not None:
        grads.log_q.sub_(dlogits.sum(0))


def _no_gradients(queries: Tensor, candidates: Tensor, log_q: Tensor | None) -> _Gradients:
    turned = candidates.new_zeros(candidates.shape[1], len(candidates))
    return _Gradients(torch.empty_like(queries), turned, None if log_q is None else torch.zeros_like(log_q))


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, candidates: Tensor, target: Tensor, log_q: Tensor | None, with_gradients: bool
    ) -> Tensor:
        grads = _no_gradients(queries, candidates, log_q) if with_gradients else None
        loss = queries.new_empty(len(queries))
        with as_given(queries):
            for rows in _slices(queries, candidates):
                logits = _logits(queries[rows], candidates, log_q)
                highest, chosen = logits.amax(1).double(), logits.gather(1, target[rows, None])[:, 0].double()
                p = logits.softmax(1)
                loss[rows] = highest - p.amax(1).log() - chosen  # in fp64: rounded once
                if grads is not None:
                    _add_gradients(grads, p, rows, queries, candidates, target, None)
        if grads is not None:
            ctx.save_for_backward(queries, candidates, target, log_q, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("item_softmax")
        (weight,) = grad_outputs
        queries, candidates, target, log_q, *grads = ctx.saved_tensors
        if not len(weight) or bool((weight == weight[0]).all()):
            scale = weight[0] if len(weight) else 0
            dqueries, dcandidates, dlog_q = (None if t is None else t * scale for t in grads)
        else:
            dqueries, dcandidates, dlog_q = _weighted(queries, candidates, target, log_q, weight)
        assert dcandidates is not None
        return dqueries, dcandidates.T.contiguous(), None, dlog_q, None


def _weighted(queries: Tensor, candidates: Tensor, target: Tensor, log_q: Tensor | None, weight: Tensor) -> _Gradients:
    grads = _no_gradients(queries, candidates, log_q)
    with as_given(queries):
        for rows in _slices(queries, candidates):
            p = _logits(queries[rows], candidates, log_q).softmax(1)
            _add_gradients(grads, p, rows, queries, candidates, target, weight)
    return grads


def item_softmax_sweep(queries: Tensor, candidates: Tensor, target: Tensor, *, log_q: Tensor | None = None) -> Tensor:
    """Loss of the queries that have a target; only those are looked at. Under autocast operands are of its dtype."""
    dtype, device = sum_dtype(queries), queries.device.type
    operands = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
    asked = (target >= 0).nonzero()[:, 0]
    all_ask = len(asked) == len(target)
    loss = _Sweep.apply(
        (queries if all_ask else queries[asked]).to(operands).to(dtype),
        candidates.to(operands).to(dtype),
        target[asked],
        None if log_q is None else log_q.to(dtype),
        torch.is_grad_enabled(),
    )
    return loss if all_ask else loss.new_zeros(len(target)).index_copy(0, asked, loss)
