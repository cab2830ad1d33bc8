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
from ssd_torchrec.training.metrics import means, ranking_sums

QUERIES_PER_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Questions:
    """M users of this rank and the one item each should be recommended; items count from 0 at the first real item."""

    queries: Tensor  # (M, D) fp32
    wanted: Tensor  # (M,) int64
    seen_query: Tensor  # (S,) int64 which query has seen...
    seen_item: Tensor  # (S,) int64 ...which item; both empty where seen items stay in the ranking


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

            def catalogue() -> Iterator[Tensor]:
                return _catalogue(model, questions.queries.device, candidates_per_chunk)

            ranks = rank_wanted(questions, catalogue)
            counts = item_counts.to(questions.queries)[:, None]  # (V, 1): popularity is a catalogue of width 1
            blind = replace(questions, queries=torch.ones_like(questions.queries[:, :1]))
            popular = rank_wanted(blind, lambda: iter(counts.split(candidates_per_chunk)))
            return means(reduce_sum(ranking_sums(ranks))), means(reduce_sum(ranking_sums(popular)))
    finally:
        model.train(was_training)


def rank_wanted(questions: Questions, catalogue: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Rank of each wanted item, 1 the best, ties against it.

    Args:
        catalogue: each call gives the item vectors (chunk, D) again, in order from item 0.

    Returns:
        (M,) int64.
    """
    wanted_score = torch.full_like(questions.queries[:, 0], -torch.inf)
    for first, vectors in _with_offsets(catalogue()):
        for block in _blocks(questions):
            inside = (block.wanted >= first) & (block.wanted < first + len(vectors))
            scores = block.queries @ vectors.T
            column = torch.where(inside, block.wanted - first, 0)
            found = scores.gather(1, column[:, None])[:, 0]
            at = slice(block.start, block.start + len(block.queries))
            wanted_score[at] = torch.where(inside, found, wanted_score[at])
    rank = torch.zeros_like(questions.wanted)
    for first, vectors in _with_offsets(catalogue()):
        for block in _blocks(questions):
            scores = block.queries @ vectors.T
            at = slice(block.start, block.start + len(block.queries))
            _drop_seen(scores, questions, block, first)
            rank[at] += (scores >= wanted_score[at, None]).sum(1)
    return rank


@dataclass(frozen=True, eq=False)
class _Block:
    start: int
    queries: Tensor
    wanted: Tensor


def _blocks(questions: Questions) -> Iterator[_Block]:
    for start in range(0, len(questions.queries), QUERIES_PER_BLOCK):
        at = slice(start, start + QUERIES_PER_BLOCK)
        yield _Block(start, questions.queries[at], questions.wanted[at])


def _drop_seen(scores: Tensor, questions: Questions, block: _Block, first: int) -> None:
    """Score what a user has seen below everything, in place; what is wanted stays, seen or not."""
    row, column = questions.seen_query - block.start, questions.seen_item - first
    here = (row >= 0) & (row < len(scores)) & (column >= 0) & (column < scores.shape[1])
    row, column = row[here], column[here]
    keep = column + first != block.wanted[row]
    scores[row[keep], column[keep]] = -torch.inf


def _ask(model: NextItemModel, batches: Iterable[Batch], filter_seen: bool) -> Questions:
    device = next(model.tower.parameters()).device
    parts = [
        Questions(
            torch.empty(0, model.tower.encoder.width, device=device),
            *(torch.empty(0, dtype=torch.int64, device=device) for _ in range(3)),
        )
    ]
    asked = 0
    for batch in batches:
        queries = model.last_queries(batch)
        last = batch.layout.last_event
        wanted = torch.full_like(last, -1)
        wanted[last >= 0] = batch.target[last[last >= 0]]
        rows = (wanted >= 0).nonzero()[:, 0]
        seen_query, seen_item = rows[:0], rows[:0]
        if filter_seen:
            query_of_row = torch.full_like(last, -1).index_copy(0, rows, torch.arange(len(rows), device=rows.device))
            query_of_event = query_of_row[batch.layout.row_of_event]
            item = batch.features["item"].values() - model.tables.first_item
            counted = (query_of_event >= 0) & (item >= 0)
            seen_query, seen_item = query_of_event[counted] + asked, item[counted]
        parts.append(Questions(queries[rows], wanted[rows], seen_query, seen_item))
        asked += len(rows)
    fields = zip(*((p.queries, p.wanted, p.seen_query, p.seen_item) for p in parts), strict=True)
    return Questions(*(torch.cat(field) for field in fields))


def _catalogue(model: NextItemModel, device: torch.device, chunk: int) -> Iterator[Tensor]:
    first, stop = model.tables.first_item, model.tables.num_item_rows
    for start in range(first, stop, chunk):
        yield model.item_vectors(torch.arange(start, min(start + chunk, stop), device=device)).float()


def _with_offsets(chunks: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
    first = 0
    for chunk in chunks:
        yield first, chunk
        first += len(chunk)
