from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ssd_torchrec.training import ranking
from ssd_torchrec.training.catalogue import Seen
from ssd_torchrec.training.ranking import Questions, rank_wanted

NONE = Seen.none()


def catalogue_of(vectors: Tensor, chunk: int):
    def chunks() -> Iterator[Tensor]:
        return iter(vectors.split(chunk))

    return chunks


def rank_of_target(scores: Tensor, target: Tensor) -> Tensor:
    """The definition: (M, V) scores and (M,) wanted columns to (M,) ranks, 1 the best; a tie counts against it."""
    return (scores >= scores.gather(1, target[:, None])).sum(dim=1)


def test_a_tie_counts_against_the_target():
    scores, wanted = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3]]), torch.tensor([2, 0])
    assert rank_of_target(scores, wanted).tolist() == [2, 3]
    questions = Questions(torch.eye(2), wanted, NONE)
    assert rank_wanted(questions, catalogue_of(scores.T.contiguous(), 2)).tolist() == [2, 3]


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_ranking_by_chunks_is_ranking_the_whole_score_matrix(chunk, monkeypatch):
    monkeypatch.setattr(ranking, "QUERIES_PER_BLOCK", 4)
    rng = torch.Generator().manual_seed(0)
    queries = torch.randn(10, 8, generator=rng)
    vectors = torch.randn(50, 8, generator=rng)
    wanted = torch.randint(0, 50, (10,), generator=rng)
    got = rank_wanted(Questions(queries, wanted, NONE), catalogue_of(vectors, chunk))
    assert got.tolist() == rank_of_target(queries @ vectors.T, wanted).tolist()


def test_a_model_that_scores_all_items_alike_ranks_every_target_last():
    questions = Questions(torch.randn(5, 3), torch.arange(5), NONE)
    assert rank_wanted(questions, catalogue_of(torch.ones(30, 3), 7)).tolist() == [30] * 5


def test_seen_items_leave_the_ranking_but_the_wanted_one_stays():
    queries = torch.tensor([[1.0], [1.0]])
    vectors = torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]])
    seen = Seen(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 2, 2]))
    questions = Questions(queries, torch.tensor([2, 3]), seen)
    assert rank_wanted(questions, catalogue_of(vectors, 2)).tolist() == [2, 3]


def test_no_queries_rank_nothing():
    questions = Questions(torch.empty(0, 3), NONE.item, NONE)
    assert rank_wanted(questions, catalogue_of(torch.ones(4, 3), 2)).tolist() == []


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_what_each_query_has_seen_is_found_again_in_blocks_and_chunks(chunk, monkeypatch):
    monkeypatch.setattr(ranking, "QUERIES_PER_BLOCK", 4)
    rng = torch.Generator().manual_seed(1)
    queries, vectors = torch.randn(10, 8, generator=rng), torch.randn(50, 8, generator=rng)
    wanted = torch.randint(0, 50, (10,), generator=rng)
    has_seen = torch.rand(10, 50, generator=rng) < 0.3
    has_seen[2:5] = False  # queries without a history stand between others
    scores = queries @ vectors.T
    left = scores.masked_fill(has_seen & (torch.arange(50) != wanted[:, None]), -torch.inf)
    got = rank_wanted(Questions(queries, wanted, Seen(*has_seen.nonzero().T)), catalogue_of(vectors, chunk))
    assert got.tolist() == rank_of_target(left, wanted).tolist()
