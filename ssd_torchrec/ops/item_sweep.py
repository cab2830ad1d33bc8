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


class _Operands(NamedTuple):
    queries: Tensor  # (M, D), all of them with a target
    candidates: Tensor  # (K, D)
    target: Tensor  # (M,)
    log_q: Tensor | None  # (K,)
    item_of_candidate: Tensor | None  # (K,)


class _Gradients(NamedTuple):
    queries: Tensor  # (M, D)
    candidates: Tensor  # (D, K), turned, as the products give it
    log_q: Tensor | None  # (K,)


def _slices(of: _Operands) -> Iterator[slice]:
    height = max(HELD // max(len(of.candidates), 1), FEWEST_QUERIES)
    return (slice(at, at + height) for at in range(0, len(of.queries), height))


def _logits(of: _Operands, rows: slice) -> Tensor:
    logits = product(of.queries[rows], of.candidates)
    if of.log_q is not None:
        logits.sub_(of.log_q)
    if of.item_of_candidate is not None:
        column = of.target[rows, None]
        hits = of.item_of_candidate[column] == of.item_of_candidate
        logits.masked_fill_(hits.scatter_(1, column, False), -torch.inf)
    return logits


def _add_gradients(grads: _Gradients, of: _Operands, p: Tensor, rows: slice, weight: Tensor | None) -> None:
    """Adds what some queries bring, given their softmax `p`, which is used up."""
    dlogits = p.scatter_add_(1, of.target[rows, None], p.new_full((len(p), 1), -1))
    if weight is not None:
        dlogits *= weight[rows, None]
    grads.queries[rows] = product(dlogits, of.candidates.T)
    grads.candidates.add_(over_events(of.queries[rows], dlogits))
    if grads.log_q is not None:
        grads.log_q.sub_(dlogits.sum(0))


def _no_gradients(of: _Operands) -> _Gradients:
    turned = of.candidates.new_zeros(of.candidates.shape[1], len(of.candidates))
    return _Gradients(torch.empty_like(of.queries), turned, None if of.log_q is None else torch.zeros_like(of.log_q))


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, with_gradients: bool, *operands: Any) -> Tensor:
        of = _Operands(*operands)
        grads = _no_gradients(of) if with_gradients else None
        loss = of.queries.new_empty(len(of.queries))
        with as_given(of.queries):
            for rows in _slices(of):
                logits = _logits(of, rows)
                highest, chosen = logits.amax(1).double(), logits.gather(1, of.target[rows, None])[:, 0].double()
                p = logits.softmax(1)
                loss[rows] = highest - p.amax(1).log() - chosen  # in fp64: rounded once
                if grads is not None:
                    _add_gradients(grads, of, p, rows, None)
        if grads is not None:
            ctx.save_for_backward(*of, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("item_softmax")
        (weight,) = grad_outputs
        of, grads = _Operands(*ctx.saved_tensors[:5]), _Gradients(*ctx.saved_tensors[5:])
        if not len(weight) or bool((weight == weight[0]).all()):
            scale = weight[0] if len(weight) else 0
            dqueries, dcandidates, dlog_q = (None if t is None else t * scale for t in grads)
        else:
            dqueries, dcandidates, dlog_q = _weighted(of, weight)
        assert dcandidates is not None
        return None, dqueries, dcandidates.T.contiguous(), None, dlog_q, None


def _weighted(of: _Operands, weight: Tensor) -> _Gradients:
    grads = _no_gradients(of)
    with as_given(of.queries):
        for rows in _slices(of):
            _add_gradients(grads, of, _logits(of, rows).softmax(1), rows, weight)
    return grads


def item_softmax_sweep(
    queries: Tensor,
    candidates: Tensor,
    target: Tensor,
    *,
    log_q: Tensor | None = None,
    item_of_candidate: Tensor | None = None,
) -> Tensor:
    """Loss of the queries that have a target; only those are looked at."""
    dtype = sum_dtype(queries)
    asked = (target >= 0).nonzero()[:, 0]
    all_ask = len(asked) == len(target)
    loss = _Sweep.apply(
        torch.is_grad_enabled(),
        (queries if all_ask else queries[asked]).to(dtype),
        candidates.to(dtype),
        target[asked],
        None if log_q is None else log_q.to(dtype),
        item_of_candidate,
    )
    return loss if all_ask else loss.new_zeros(len(target)).index_copy(0, asked, loss)
