"""Cross-entropy of queries against a set of candidates, without the (M, K) table of logits.

    logit[i, k] = queries[i] . candidates[k] - log_q[k]                 log_q: log of the chance that k is a candidate
    loss[i]     = log sum_k exp(logit[i, k]) - logit[i, target[i]]      in nats; 0 where target[i] is -1

With candidates drawn by chance, some may be the item that is right: an accidental hit, told by item_of_candidate. The
sum of query i leaves out each k that is the item of target[i] and is not target[i] itself.

Shapes: M queries, D width; this file's K are candidates. The CPU's way is in `item_sweep.py`, the kernels in
`item_softmax_triton.py`.
Source: Bengio & Senécal 2008, Adaptive importance sampling, for log_q; TensorFlow's `sampled_softmax_loss` with
`remove_accidental_hits` for what is left out.
"""

import torch
from torch import Tensor

from ssd_torchrec.errors import DtypeError, ShapeError
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.item_softmax_triton import item_softmax_triton
from ssd_torchrec.ops.item_sweep import item_softmax_sweep
from ssd_torchrec.ops.launch import check_tensors
from ssd_torchrec.ops.precision import sum_dtype


def item_softmax_definition(
    queries: Tensor,
    candidates: Tensor,
    target: Tensor,
    *,
    log_q: Tensor | None = None,
    item_of_candidate: Tensor | None = None,
) -> Tensor:
    """The definition, all logits at once: any device, differentiable; in fp64 the truth."""
    queries = queries.masked_fill((target == -1)[:, None], 0)  # one that is not asked may be anything, even NaN
    logits = (queries @ candidates.T).to(sum_dtype(queries))
    logits = logits if log_q is None else logits - log_q
    if not len(candidates):
        return logits.sum(1)
    column = target.clamp(min=0)[:, None]
    chosen = logits.gather(1, column)[:, 0]
    if item_of_candidate is not None:
        hits = item_of_candidate[column] == item_of_candidate  # (M, K)
        logits = logits.masked_fill(hits.scatter(1, column, False), -torch.inf)
    return torch.where(target == -1, 0, logits.logsumexp(1) - chosen)


def item_softmax(
    queries: Tensor,
    candidates: Tensor,
    target: Tensor,
    *,
    log_q: Tensor | None = None,
    item_of_candidate: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each query against all candidates; the (M, K) logits are never held.

    Args:
        queries: (M, D).
        candidates: (K, D).
        target: (M,) int64 row of `candidates` that is right, or -1 where nothing is asked; such a query may be NaN.
        log_q: (K,) natural log of the chance that a candidate was drawn, subtracted from its logits; none if None.
        item_of_candidate: (K,) int64 item that each candidate is. A candidate other than the target that is the same
            item as the target does not count for its query. None counts all.

    Returns:
        (M,) loss in nats, fp32, or fp64 if `queries` is; 0, without gradient, where `target` is -1, or where all
        candidates but the target are left out. Under autocast the products take operands of its dtype; they are
        summed in fp32.

    Raises:
        ShapeError: shapes do not fit each other, a target is below -1 or above K-1, or on CUDA D is above 256. Targets
            are looked at on the CPU only: on CUDA a wrong one makes its loss NaN, without gradient.
        DtypeError: tensors are of dtypes that no product takes, or on several devices.

    Deterministic; how many queries and candidates there are changes a result by rounding at most. Takes the definition,
    all logits at once, if `queries` is fp64; else it has no second derivative.
    """
    _check(queries, candidates, target, log_q, item_of_candidate)
    options = {"log_q": log_q, "item_of_candidate": item_of_candidate}
    if queries.dtype == torch.float64:
        return item_softmax_definition(queries, candidates, target, **options)
    check_tensors("item_softmax", queries, {"candidates": candidates, "log_q": log_q})
    dtype = _operand_dtype(queries)
    softmax = item_softmax_triton if queries.is_cuda else item_softmax_sweep
    return softmax(queries.to(dtype), candidates.to(dtype), target, **options)


def _operand_dtype(queries: Tensor) -> torch.dtype:
    device = queries.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype


def _check(
    queries: Tensor, candidates: Tensor, target: Tensor, log_q: Tensor | None, item_of_candidate: Tensor | None
) -> None:
    if queries.ndim != 2 or target.dtype != torch.int64:
        raise ShapeError(
            f"queries must be (M, D) and target int64, got {tuple(queries.shape)} and {target.dtype}; "
            "flatten what is in front of D"
        )
    (M, D), K = queries.shape, candidates.shape[0]
    check_shape("candidates", candidates, (K, D), "look both up in one table")
    check_shape("target", target, (M,), "give each query one target")
    check_shape("log_q", log_q, (K,), "give each candidate one value")
    check_shape("item_of_candidate", item_of_candidate, (K,), "give each candidate one item")
    if item_of_candidate is not None and item_of_candidate.dtype != torch.int64:
        raise DtypeError(f"item_of_candidate must be int64, got {item_of_candidate.dtype}; convert it")
    if target.device.type == "cpu" and bool(((target < -1) | (target >= K)).any()):
        raise ShapeError(
            f"target must lie in -1..{K - 1}, got {int(target.min())}..{int(target.max())}; "
            "a target is a row of candidates, not an item id"
        )
