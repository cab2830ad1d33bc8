"""Cross-entropy of queries against a set of candidates, without the (M, K) table of logits.

    logit[i, k] = queries[i] . candidates[k] - log_q[k]                 log_q: log of the chance that k is a candidate
    loss[i]     = log sum_k exp(logit[i, k]) - logit[i, target[i]]      in nats; 0 where target[i] is -1

Shapes: M queries, D width; this file's K are candidates. Logits live a tile at a time and are computed again backwards.
Source: Bengio & Senécal 2008, Adaptive importance sampling, for log_q.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.precision import as_given, sum_dtype
from ssd_torchrec.ops.registry import refuse_double_backward

TILE = {"cpu": (512, 1024), "cuda": (4096, 8192)}
"""Queries and candidates whose logits are held at a time: what a core's cache holds, and what fills a GPU."""


def item_softmax_definition(
    queries: Tensor, candidates: Tensor, target: Tensor, *, log_q: Tensor | None = None
) -> Tensor:
    """The definition, all logits at once: any device, differentiable; in fp64 the truth."""
    queries = queries.masked_fill((target == -1)[:, None], 0)  # one that is not asked may be anything, even NaN
    logits = (queries @ candidates.T).to(sum_dtype(queries))
    logits = logits if log_q is None else logits - log_q
    chosen = logits.gather(1, target.clamp(min=0)[:, None])[:, 0] if len(candidates) else logits.sum(1)
    return torch.where(target == -1, 0, logits.logsumexp(1) - chosen)


def _tiles(queries: Tensor, candidates: Tensor) -> Iterator[tuple[slice, slice]]:
    rows, columns = TILE["cuda" if queries.is_cuda else "cpu"]
    for i in range(0, len(queries), rows):
        for k in range(0, len(candidates), columns):
            yield slice(i, i + rows), slice(k, k + columns)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed in fp32 or better; fp32 holds the product of two bf16 numbers exactly."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(sum_dtype(left)) @ right.to(sum_dtype(right))


def _logits(queries: Tensor, candidates: Tensor, log_q: Tensor | None) -> Tensor:
    logits = _product(queries, candidates.T)
    return logits if log_q is None else logits.sub_(log_q)


class _ItemSoftmax(torch.autograd.Function):
    """Queries without a target must be finite: a weight of 0 is all that keeps them out of the gradient."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, candidates: Tensor, target: Tensor, log_q: Tensor | None) -> Tensor:
        normaliser = queries.new_full((len(queries),), -torch.inf, dtype=torch.float64)  # many tiles round it once
        chosen = torch.full_like(normaliser, torch.nan)  # a target that no tile holds shows
        with as_given(queries):
            for rows, columns in _tiles(queries, candidates):
                logits = _logits(queries[rows], candidates[columns], None if log_q is None else log_q[columns])
                normaliser[rows] = torch.logaddexp(normaliser[rows], logits.logsumexp(1).double())
                column, inside = _column(target[rows], columns.start, logits.shape[1])
                chosen[rows] = torch.where(inside, logits.gather(1, column)[:, 0].double(), chosen[rows])
        dtype = sum_dtype(queries)
        ctx.save_for_backward(queries, candidates, target, log_q, normaliser.to(dtype))
        return torch.where(target == -1, 0, normaliser - chosen).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("item_softmax")
        (dloss,) = grad_outputs
        queries, candidates, target, log_q, normaliser = ctx.saved_tensors
        weight = dloss.masked_fill(target == -1, 0)
        weighted = (queries * weight[:, None]).to(queries.dtype)
        dqueries, dcandidates = (torch.zeros_like(t, dtype=sum_dtype(t)) for t in (queries, candidates))
        dlog_q = None if log_q is None else torch.zeros_like(log_q)
        with as_given(queries):
            for rows, columns in _tiles(queries, candidates):
                logits = _logits(queries[rows], candidates[columns], None if log_q is None else log_q[columns])
                dlogits = logits.sub_(normaliser[rows, None]).exp_()
                column, inside = _column(target[rows], columns.start, logits.shape[1])
                dlogits.scatter_add_(1, column, -inside[:, None].to(dlogits.dtype))
                if dlog_q is not None:
                    dlog_q[columns] -= weight[rows] @ dlogits
                dlogits = dlogits.to(queries.dtype)
                dqueries[rows] += _product(dlogits, candidates[columns])
                dcandidates[columns] += _product(dlogits.T, weighted[rows])
        dqueries *= weight[:, None]
        return dqueries.to(queries.dtype), dcandidates.to(candidates.dtype), None, dlog_q


def _column(target: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """(M, 1) column of each target in a tile, any column for those outside; and (M,) which are inside."""
    column = target - first
    return column.clamp(0, columns - 1)[:, None], (column >= 0) & (column < columns)


def item_softmax_tiled(queries: Tensor, candidates: Tensor, target: Tensor, *, log_q: Tensor | None = None) -> Tensor:
    """Tile by tile; under autocast the products take operands of its dtype."""
    device = queries.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
    asking = queries.masked_fill((target == -1)[:, None], 0)
    log_q = None if log_q is None else log_q.to(sum_dtype(queries))
    return _ItemSoftmax.apply(asking.to(dtype), candidates.to(dtype), target, log_q)


def item_softmax(queries: Tensor, candidates: Tensor, target: Tensor, *, log_q: Tensor | None = None) -> Tensor:
    """Cross-entropy of each query against all candidates; the (M, K) logits are never held.

    Args:
        queries: (M, D).
        candidates: (K, D).
        target: (M,) int64 row of `candidates` that is right, or -1 where nothing is asked.
        log_q: (K,) natural log of the chance that a candidate was drawn, subtracted from its logits; none if None.

    Returns:
        (M,) loss in nats, fp32, or fp64 if `queries` is; 0, without gradient, where `target` is -1. Under autocast the
        products take operands of its dtype; they are summed in fp32.

    Raises:
        ShapeError: shapes do not fit each other, or a target is below -1 or above K-1. Targets are looked at on the CPU
            only: on CUDA a wrong one makes its loss NaN.

    Deterministic. Takes the definition, logits and all, if `queries` is fp64; else it has no second derivative.
    """
    if queries.ndim != 2 or target.dtype != torch.int64:
        raise ShapeError(
            f"queries must be (M, D) and target int64, got {tuple(queries.shape)} and {target.dtype}; "
            "flatten what is in front of D"
        )
    check_shape("candidates", candidates, (len(candidates), queries.shape[1]), "look both up in one table")
    check_shape("target", target, (len(queries),), "give each query one target")
    check_shape("log_q", log_q, (len(candidates),), "give each candidate one value")
    if target.device.type == "cpu" and bool(((target < -1) | (target >= len(candidates))).any()):
        raise ShapeError(
            f"target must lie in -1..{len(candidates) - 1}, got {int(target.min())}..{int(target.max())}; "
            "a target is a row of candidates, not an item id"
        )
    softmax = item_softmax_definition if queries.dtype == torch.float64 else item_softmax_tiled
    return softmax(queries, candidates, target, log_q=log_q)
