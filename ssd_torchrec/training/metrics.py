"""Ranking quality, from the rank of the wanted item.

Sums, not means, so that chunks and ranks add up: (1 + 3·cutoffs,) fp64 holds the number of queries and, for each cutoff
K, the summed hit rate, discounted gain and reciprocal rank. Each query wants exactly one item, so recall@K equals hr@K,
and the ideal gain is 1.
"""

import torch
from torch import Tensor

from ssd_torchrec.data.schema import CUTOFFS

SELECTION_METRIC = "ndcg@10"  # what early stopping and "best" look at


def ranking_sums(rank: Tensor) -> Tensor:
    """Sum up (M,) ranks from 1: (1 + 3·cutoffs,) fp64, ready to be added to other sums or all-reduced."""
    rank = rank.double()
    sums = [rank.new_tensor(float(rank.numel()))]
    for k in CUTOFFS:
        inside = rank <= k
        sums.append(inside.double().sum())
        sums.append(torch.where(inside, 1 / torch.log2(rank + 1), 0.0).sum())
        sums.append(torch.where(inside, 1 / rank, 0.0).sum())
    return torch.stack(sums)


def means(sums: Tensor) -> dict[str, float]:
    """Name the means of summed rankings: hr, ndcg and mrr at each cutoff; all 0 where nothing was ranked."""
    count, *rest = sums.tolist()
    names = [f"{metric}@{k}" for k in CUTOFFS for metric in ("hr", "ndcg", "mrr")]
    return {name: total / count if count else 0.0 for name, total in zip(names, rest, strict=True)}
