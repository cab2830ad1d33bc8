"""Rank the full catalogue for each user, without ever holding a (users, items) score matrix.

    1. every rank encodes its users' histories: (M, D) queries, each with one wanted item
    2. the catalogue passes by in chunks, looked up in the sharded table by all ranks together, twice:
       once to score the wanted items, once to count how many items score at least as much

Both passes score with the same matrix products, so a tie is a tie to the last bit, and ties count against the model.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssd_torchrec.data.batch import Batch
from ssd_torchrec.models.next_item import NextItemModel
from ssd_torchrec.training.catalogue import QUERIES_PER_BLOCK, Seen, SeenInBlock, catalogue, with_first_item
from ssd_torchrec.training.metrics import means, ranking_sums


@dataclass(frozen=True, eq=False)
class Questions:
    """M users of this rank and the one item each should be recommended; items count from 0 at the first real item."""

    queries: Tensor  # (M, D) fp32
    wanted: Tensor  # (M,) int64
    seen: Seen  # empty where seen items stay in the ranking


def evaluate(
    model: NextItemModel,
    batches: Iterable[Batch],
    item_counts: Tensor,
    reduce_sum: Callable[[Tensor], Tensor],
    *,
    filter_seen: bool,
    candidates_per_chunk: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Quality of the model and of the most-popular baseline on the same users.

    Collective when the tables are sharded: all ranks call it, with equally many batches.

    Args:
        model: the model itself, not its data-parallel wrapper; put into eval mode and back.
        batches: histories on the model's device, each with its target at the last event.
        item_counts: (V,) int64 training events of each item.
        reduce_sum: adds an fp64 vector up over the ranks.
        filter_seen: leave out items of the history, except the wanted one.
        candidates_per_chunk: items scored at a time.

    Returns:
        Means by name (hr, ndcg, mrr at 10, 20, 50): of the model, of the baseline.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # inference mode hides the keys under which FBGEMM registers its CPU lookups
            questions = _ask(model, batches, filter_seen)

            def items() -> Iterator[Tensor]:
                return catalogue(model, questions.queries.device, candidates_per_chunk)

            ranks = rank_wanted(questions, items)
            counts = item_counts.to(questions.queries)[:, None]  # (V, 1): popularity is a catalogue of width 1
            blind = replace(questions, queries=torch.ones_like(questions.queries[:, :1]))
            popular = rank_wanted(blind, lambda: iter(counts.split(candidates_per_chunk)))
            return means(reduce_sum(ranking_sums(ranks))), means(reduce_sum(ranking_sums(popular)))
    finally:
        model.train(was_training)


def rank_wanted(questions: Questions, items: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Rank of each wanted item, 1 the best, ties against it.

    Args:
        items: each call gives the item vectors (chunk, D) again, in order from item 0.

    Returns:
        (M,) int64.
    """
    blocks = list(_blocks(questions))
    wanted_score = torch.full_like(questions.queries[:, 0], -torch.inf)
    for first, vectors in with_first_item(items()):
        for block in blocks:
            inside = (block.wanted >= first) & (block.wanted < first + len(vectors))
            scores = block.queries @ vectors.T
            column = torch.where(inside, block.wanted - first, 0)
            found = scores.gather(1, column[:, None])[:, 0]
            wanted_score[block.at] = torch.where(inside, found, wanted_score[block.at])
    rank = torch.zeros_like(questions.wanted)
    for first, vectors in with_first_item(items()):
        for block in blocks:
            scores = block.queries @ vectors.T
            block.seen.drop_from(scores, first, block.wanted)
            rank[block.at] += (scores >= wanted_score[block.at, None]).sum(1)
    return rank


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


def _ask(model: NextItemModel, batches: Iterable[Batch], filter_seen: bool) -> Questions:
    device = next(model.tower.parameters()).device
    nobody = torch.empty(0, dtype=torch.int64, device=device)
    parts = [Questions(torch.empty(0, model.tower.encoder.width, device=device), nobody, Seen.none(device))]
    asked = 0
    for batch in batches:
        queries = model.last_queries(batch)
        last = batch.layout.last_event
        wanted = torch.full_like(last, -1)
        wanted[last >= 0] = batch.target[last[last >= 0]]
        rows = (wanted >= 0).nonzero()[:, 0]
        seen = Seen.none(device)
        if filter_seen:
            numbers = torch.arange(asked, asked + len(rows), device=device)
            query_of_row = torch.full_like(last, -1).index_copy(0, rows, numbers)
            seen = Seen.of(batch, query_of_row, model.tables.first_item)
        parts.append(Questions(queries[rows], wanted[rows], seen))
        asked += len(rows)
    queries, wanted = (torch.cat(field) for field in zip(*((p.queries, p.wanted) for p in parts), strict=True))
    return Questions(queries, wanted, Seen.joined(p.seen for p in parts))
