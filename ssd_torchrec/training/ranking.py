"""Ranks of wanted items among all, while the catalogue passes by in chunks, without a (users, items) score matrix.

It passes twice: once to score the wanted items, once to count how many items score at least as much. Both passes score
with the same matrix products, so a tie is a tie to the last bit, and ties count against the model.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_torchrec.training.catalogue import QUERIES_PER_BLOCK, Seen, SeenInBlock, with_first_item


@dataclass(frozen=True, eq=False)
class Questions:
    """M users of this rank and the one item each should be recommended; items count from 0 at the first real item."""

    queries: Tensor  # (M, D) fp32
    wanted: Tensor  # (M,) int64
    seen: Seen  # empty where seen items stay in the ranking


def rank_wanted(questions: Questions, items: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Rank of each wanted item, 1 the best, ties against it.

    Args:
        items: each call gives the item vectors (chunk, D) again, in order from item 0.

    Returns:
        (M,) int64.
    """
    return count_at_least(questions, wanted_scores(questions, items()), items())


def wanted_scores(questions: Questions, items: Iterable[Tensor], first_item: int = 0) -> Tensor:
    """(M,) scores of the wanted items, -inf of those that are not among `items`, which begin at `first_item`."""
    blocks = list(_blocks(questions))
    wanted_score = torch.full_like(questions.queries[:, 0], -torch.inf)
    for first, vectors in with_first_item(items, first_item):
        for block in blocks:
            inside = (block.wanted >= first) & (block.wanted < first + len(vectors))
            scores = block.queries @ vectors.T
            column = torch.where(inside, block.wanted - first, 0)
            found = scores.gather(1, column[:, None])[:, 0]
            wanted_score[block.at] = torch.where(inside, found, wanted_score[block.at])
    return wanted_score


def count_at_least(questions: Questions, wanted_score: Tensor, items: Iterable[Tensor], first_item: int = 0) -> Tensor:
    """(M,) int64 how many of `items` score at least as much, the wanted one counted; seen ones are left out."""
    blocks = list(_blocks(questions))
    count = torch.zeros_like(questions.wanted)
    for first, vectors in with_first_item(items, first_item):
        for block in blocks:
            scores = block.queries @ vectors.T
            block.seen.drop_from(scores, first, block.wanted)
            count[block.at] += (scores >= wanted_score[block.at, None]).sum(1)
    return count


@dataclass(frozen=True, eq=False)
class _Block:
    at: slice
    queries: Tensor
    wanted: Tensor
    seen: SeenInBlock


def _blocks(questions: Questions) -> Iterator[_Block]:
    for start in range(0, len(questions.queries), QUERIES_PER_BLOCK):
        at = slice(start, start + QUERIES_PER_BLOCK)
        seen = questions.seen.of_queries(at.start, at.stop)
        yield _Block(at, questions.queries[at], questions.wanted[at], seen)
