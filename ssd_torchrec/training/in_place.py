"""Ranks and best items over a catalogue that is split by rows, each rank scoring its own rows where they lie.

Queries travel to all ranks, a wave at a time, and a number or k keys a query travel back: the rows stay. What comes out
is what `rank_wanted` and `top_items` give over the whole catalogue. Collective.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ssd_torchrec.distributed.collectives import Everyone
from ssd_torchrec.distributed.vocab_parallel import CatalogueShard
from ssd_torchrec.training.catalogue import Seen
from ssd_torchrec.training.ranking import Questions, count_at_least, wanted_scores
from ssd_torchrec.training.top_items import NOTHING, top_items

QUERIES_PER_WAVE = 16384  # of a rank


def rank_in_place(questions: Questions, shard: CatalogueShard, items_per_chunk: int) -> Tensor:
    """Rank of each wanted item of this rank's questions, 1 the best, ties against it: (M,) int64."""
    ranks = [torch.empty_like(questions.wanted[:0])]
    for wave in _waves(len(questions.queries), questions.queries.device):
        queries, seen, everyone = _to_all(questions.queries[wave], questions.seen, wave)
        wanted = everyone.gather(questions.wanted[wave], empty=-1)
        asked = Questions(queries, wanted, seen)
        score = wanted_scores(asked, _chunks(shard, items_per_chunk), shard.first_item)
        dist.all_reduce(score, dist.ReduceOp.MAX)
        count = count_at_least(asked, score, _chunks(shard, items_per_chunk), shard.first_item)
        dist.all_reduce(count)
        ranks.append(everyone.own(count))
    return torch.cat(ranks)


def top_items_in_place(queries: Tensor, seen: Seen, shard: CatalogueShard, k: int, items_per_chunk: int) -> Tensor:
    """Keys of the best items of each of this rank's queries, best first, as `top_items` gives them: (M, min(k, V))."""
    found = []
    for wave in _waves(len(queries), queries.device):
        asked, dropped, everyone = _to_all(queries[wave], seen, wave)
        keys = asked.new_full((len(asked), k), NOTHING, dtype=torch.int64)
        ours = top_items(asked, dropped, _chunks(shard, items_per_chunk), k, shard.first_item)
        keys[:, : ours.shape[1]] = ours
        parts = [torch.empty_like(keys) for _ in range(everyone.world_size)]
        dist.all_gather(parts, keys)
        found.append(torch.cat([everyone.own(part) for part in parts], dim=1).topk(k, dim=1).values)
    num_items = torch.tensor(len(shard.items), device=queries.device)
    dist.all_reduce(num_items)
    return torch.cat([torch.empty(0, k, dtype=torch.int64, device=queries.device), *found])[:, : int(num_items)]


def _chunks(shard: CatalogueShard, items_per_chunk: int) -> Iterator[Tensor]:
    return (rows for _, rows in shard.chunks(items_per_chunk))


def _waves(mine: int, device: torch.device) -> Iterator[slice]:
    """This rank's queries in equally many parts on all ranks, the last ones maybe empty."""
    most = Everyone.of(mine, device).most
    return (slice(at, at + QUERIES_PER_WAVE) for at in range(0, most, QUERIES_PER_WAVE))


def _to_all(queries: Tensor, seen: Seen, wave: slice) -> tuple[Tensor, Seen, Everyone]:
    """Queries (m, D) of each rank as (M, D) on all, what they have seen, and where each rank's stand."""
    everyone = Everyone.of(len(queries), queries.device)
    begin, end = torch.searchsorted(seen.query, torch.tensor([wave.start, wave.stop], device=queries.device)).tolist()
    pairs = Everyone.of(end - begin, queries.device)
    query = pairs.gather(seen.query[begin:end] - wave.start + everyone.rank * everyone.most, empty=-1)
    item = pairs.gather(seen.item[begin:end])
    return everyone.gather(queries), Seen(query[query >= 0], item[query >= 0]), everyone
