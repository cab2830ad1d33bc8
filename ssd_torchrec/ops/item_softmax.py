"""Cross-entropy of queries against a set of candidates, without the (M, K) table of logits.

    logit[i, k] = queries[i] . candidates[k] - log_q[k]                 log_q: log of the chance that k is a candidate
    loss[i]     = log sum_k exp(logit[i, k]) - logit[i, target[i]]      in nats; 0 where target[i] is -1

Shapes: M queries, D width; this file's K are candidates. On CUDA logits live a tile at a time and are computed again
backwards; `item_sweep.py` has the CPU's way.
Source: Bengio & Senécal 2008, Adaptive importance sampling, for log_q.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.item_sweep import item_softmax_sweep
from ssd_torchrec.ops.precision import as_given, sum_dtype
from ssd_torchrec.ops.registry import refuse_double_backward

TILE = (4096, 8192)
"""Queries and candidates whose logits are held at a time on CUDA: what fills a GPU."""


def item_softmax_definition(
    queries: Tensor, candidates: Tensor, target: Tensor, *, log_q: Tensor | None = None
) -> Tensor:
    """The definition, all logits at once: any device, differentiable; in fp64 the truth."""
    queries = queries.masked_fill((target == -1)[:, None], 0)  # one that is not asked may be anything, even NaN
    logits = (queries @ candidates.T).to(sum_dtype(queries))
    logits = logits if log_q is None else logits - log_q
    chosen = logits.gather(1, target.clamp(min=0)[:, None])[:, 0] if len(candidates) else logits.sum(1)
    return torch.where(target == -1, 0, logits.logsumexp(1) - chosen)


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    logits: Tensor  # of these rows and columns; the next tile takes their memory
    column: Tensor  # (rows, 1) of each row's target in the tile, any if it is not there
    inside: Tensor  # (rows,) whether it is there


def _tiles(queries: Tensor, candidates: Tensor, target: Tensor, log_q: Tensor | None) -> Iterator[_Tile]:
    M, K = len(queries), len(candidates)
    height, width = TILE
    memory = queries.new_empty(min(height, M) * min(width, K), dtype=sum_dtype(queries))
    for i in range(0, M, height):
        for k in range(0, K, width):
            rows, columns = slice(i, min(i + height, M)), slice(k, min(k + width, K))
            shape = (rows.stop - i, columns.stop - k)
            logits = memory[: shape[0] * shape[1]].view(shape)
            _product(queries[rows], candidates[columns].T, out=logits)
            if log_q is not None:
                logits -= log_q[columns]
            column = target[rows] - k
            inside = (column >= 0) & (column < shape[1])
            yield _Tile(rows, columns, logits, column.clamp(0, shape[1] - 1)[:, None], inside)


def _product(left: Tensor, right: Tensor, out: Tensor, beta: float = 0) -> None:
    """out = beta out + left @ right, summed in the dtype of `out`."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=beta)
    else:
        product = torch.mm(left, right, out_dtype=out.dtype)  # CUDA alone has it
        out.copy_(product.add_(out, alpha=beta) if beta else product)


class _ItemSoftmax(torch.autograd.Function):
    """Queries without a target must be finite: a weight of 0 is all that keeps them out of the gradient."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, candidates: Tensor, target: Tensor, log_q: Tensor | None) -> Tensor:
        normaliser = queries.new_full((len(queries),), -torch.inf, dtype=torch.float64)  # many tiles round it once
        chosen = torch.full_like(normaliser, torch.nan)  # a target that no tile holds shows
        with as_given(queries):
            for rows, _, logits, column, inside in _tiles(queries, candidates, target, log_q):
                chosen[rows] = torch.where(inside, logits.gather(1, column)[:, 0].double(), chosen[rows])
                highest = logits.amax(1)
                total = logits.sub_(highest[:, None]).exp_().sum(1)
                normaliser[rows] = torch.logaddexp(normaliser[rows], total.log().double() + highest)
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
            for rows, columns, logits, column, inside in _tiles(queries, candidates, target, log_q):
                dlogits = logits.sub_(normaliser[rows, None]).exp_()
                dlogits.scatter_add_(1, column, -inside[:, None].to(dlogits.dtype))
                if dlog_q is not None:
                    dlog_q[columns] -= weight[rows] @ dlogits
                dlogits = dlogits.to(queries.dtype)
                _product(dlogits, candidates[columns], out=dqueries[rows], beta=1)
                _product(dlogits.T, weighted[rows], out=dcandidates[columns], beta=1)
        dqueries *= weight[:, None]
        return dqueries.to(queries.dtype), dcandidates.to(candidates.dtype), None, dlog_q


def item_softmax_tiled(queries: Tensor, candidates: Tensor, target: Tensor, *, log_q: Tensor | None = None) -> Tensor:
    """Tile by tile; under autocast the products take operands of its dtype."""
    device = queries.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
    products = dtype if queries.is_cuda and dtype == torch.bfloat16 else sum_dtype(queries)  # both hold them exactly
    queries = queries.masked_fill((target == -1)[:, None], 0)
    operands = (t.to(dtype).to(products) for t in (queries, candidates))
    return _ItemSoftmax.apply(*operands, target, None if log_q is None else log_q.to(sum_dtype(queries)))


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

    Deterministic. Takes the definition, all logits at once, if `queries` is fp64; else it has no second
    derivative.
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
    if queries.dtype == torch.float64:
        softmax = item_softmax_definition
    elif queries.device.type == "cpu":
        softmax = item_softmax_sweep
    else:
        softmax = item_softmax_tiled
    return softmax(queries, candidates, target, log_q=log_q)
