"""Rank the full catalogue for each user: first all users' queries, then the rank of what each wanted.

Every rank encodes its own users' histories. A table split by rows is ranked in place, any other as it passes by in
chunks, looked up by all ranks together.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ssd_torchrec.data.batch import Batch
from ssd_torchrec.distributed.vocab_parallel import CatalogueShard
from ssd_torchrec.models.next_item import NextItemModel
from ssd_torchrec.training.catalogue import Seen, catalogue
from ssd_torchrec.training.in_place import rank_in_place
from ssd_torchrec.training.metrics import means, ranking_sums
from ssd_torchrec.training.ranking import Questions, rank_wanted


def evaluate(
    model: NextItemModel,
    shard: CatalogueShard | None,
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
        shard: this rank's rows of the item table, if that is split by rows.
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

            ranks = rank_in_place(questions, shard, candidates_per_chunk) if shard else rank_wanted(questions, items)
            counts = item_counts.to(questions.queries)[:, None]  # (V, 1): popularity is a catalogue of width 1
            blind = replace(questions, queries=torch.ones_like(questions.queries[:, :1]))
            popular = rank_wanted(blind, lambda: iter(counts.split(candidates_per_chunk)))
            return means(reduce_sum(ranking_sums(ranks))), means(reduce_sum(ranking_sums(popular)))
    finally:
        model.train(was_training)


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
