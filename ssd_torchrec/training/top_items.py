"""The k best items of each query while the catalogue passes by in chunks: exact, and of equal scores the first item.

Score and item are one int64 key, so that the greatest keys are the best items and no two are equal:

    # bits 63..32   the score's fp32 bits, turned so that they are ordered as integers are
    # bits 31..0    2**32 - 1 - item
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ssd_torchrec.training.catalogue import QUERIES_PER_BLOCK, Seen, with_first_item

NOTHING = -2_139_095_041 << 32  # a key of score -inf, as what was dropped has
_LOW = 2**32 - 1
_ALL_BUT_SIGN = 2**31 - 1


def top_items(queries: Tensor, seen: Seen, chunks: Iterable[Tensor], k: int, first_item: int = 0) -> Tensor:
    """Keys of the best items of each query, best first; `scores_of` and `items_of` take them apart.

    Args:
        queries: (M, D) fp32.
        seen: what each query is not to get; empty where it may get everything.
        chunks: item vectors (C, D) fp32 in order from item `first_item`; drawn to the end even if there is no query.
        k: at least 1.

    Returns:
        (M, min(k, V)) int64 of V items. What was dropped as seen has score -inf, and so stands last.
    """
    blocks = queries.split(QUERIES_PER_BLOCK)
    starts = [number * QUERIES_PER_BLOCK for number in range(len(blocks))]
    dropped = [seen.of_queries(start, start + len(block)) for start, block in zip(starts, blocks, strict=True)]
    best = [torch.empty(len(block), 0, dtype=torch.int64, device=queries.device) for block in blocks]
    for first, vectors in with_first_item(chunks, first_item):
        for number, block in enumerate(blocks):
            scores = block @ vectors.T
            dropped[number].drop_from(scores, first)
            keys = torch.cat([best[number], _best_keys(scores, first, k)], dim=1)
            best[number] = keys.topk(min(k, keys.shape[1]), dim=1).values
    return torch.cat(best)


def items_of(keys: Tensor) -> Tensor:
    """Items of keys, counted from 0 at the first real item: int64, of the same shape."""
    return _LOW - (keys & _LOW)


def scores_of(keys: Tensor) -> Tensor:
    """Scores of keys: fp32, of the same shape, to the last bit but for -0, which became 0."""
    ordered = (keys >> 32).to(torch.int32)
    return _turned(ordered).view(torch.float32)


def _best_keys(scores: Tensor, first_item: int, k: int) -> Tensor:
    """(M, min(k, C)) keys of the best of (M, C) scores, in no order."""
    items = torch.arange(first_item, first_item + scores.shape[1], device=scores.device).expand_as(scores)
    if k >= scores.shape[1]:
        return _keys(scores, items)
    # floats are searched several times faster than keys; they leave open which of equal scores are in
    found = scores.topk(k + 1, dim=1)
    keys = _keys(found.values[:, :k], first_item + found.indices[:, :k])
    last, next_one = found.values[:, k - 1], found.values[:, k]
    open_rows = ((last == next_one) & (last > -torch.inf)).nonzero()[:, 0]
    if len(open_rows):
        keys[open_rows] = _keys(scores[open_rows], items[open_rows]).topk(k, dim=1).values
    return keys


def _keys(scores: Tensor, items: Tensor) -> Tensor:
    ordered = _turned((scores + 0.0).view(torch.int32))  # 0 and -0 are a tie
    return (ordered.long() << 32) | (_LOW - items)


def _turned(bits: Tensor) -> Tensor:
    """Negative floats ascend as their bits descend; its own inverse."""
    return torch.where(bits < 0, bits ^ _ALL_BUT_SIGN, bits)
