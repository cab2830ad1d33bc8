"""Ranking rows where they lie equals ranking the whole catalogue in one process."""

from typing import Any

import pytest
import torch

from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.vocab_parallel import CatalogueShard
from ssd_torchrec.training import in_place
from ssd_torchrec.training.catalogue import Seen
from ssd_torchrec.training.ranking import Questions, rank_wanted
from ssd_torchrec.training.top_items import top_items
from tests.distributed.world import spawn

ITEMS, QUERIES = 50, [11, 0, 6]  # of each rank; the second asks nothing
BOUNDS = [0, 30, 30, 50]  # items of each rank; the second has none
BEST = [1, 5, 80]


def whole() -> tuple[Questions, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    queries = torch.randint(-3, 4, (sum(QUERIES), 2), generator=rng).float()  # small whole numbers: ties across ranks
    vectors = torch.randint(-3, 4, (ITEMS, 2), generator=rng).float()
    wanted = torch.randint(0, ITEMS, (sum(QUERIES),), generator=rng)
    has_seen = torch.rand(sum(QUERIES), ITEMS, generator=rng) < 0.3
    return Questions(queries, wanted, Seen(*has_seen.nonzero().T)), vectors


def of_rank(questions: Questions, rank: int) -> Questions:
    first = sum(QUERIES[:rank])
    at = slice(first, first + QUERIES[rank])
    ours = (questions.seen.query >= at.start) & (questions.seen.query < at.stop)
    seen = Seen(questions.seen.query[ours] - first, questions.seen.item[ours])
    return Questions(questions.queries[at], questions.wanted[at], seen)


def in_place_on(world: World) -> dict[str, Any]:
    in_place.QUERIES_PER_WAVE = 4
    questions, vectors = whole()
    begin, end = BOUNDS[world.rank : world.rank + 2]
    shard, ours = CatalogueShard(vectors[begin:end], begin), of_rank(questions, world.rank)
    best = {k: in_place.top_items_in_place(ours.queries, ours.seen, shard, k, 7) for k in BEST}
    return {"rank": in_place.rank_in_place(ours, shard, 7), **best}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return spawn(in_place_on, 3)


def test_ranks_are_those_of_one_process(ranks):
    questions, vectors = whole()
    expected = rank_wanted(questions, lambda: iter(vectors.split(9)))
    assert torch.cat([view["rank"] for view in ranks]).tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 5


@pytest.mark.parametrize("k", BEST)
def test_best_items_are_those_of_one_process(k, ranks):
    questions, vectors = whole()
    expected = top_items(questions.queries, questions.seen, vectors.split(9), k)
    assert torch.equal(torch.cat([view[k] for view in ranks]), expected)
