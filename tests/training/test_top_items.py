import pytest
import torch
from torch import Tensor

from ssd_torchrec.training import top_items as module
from ssd_torchrec.training.catalogue import Seen
from ssd_torchrec.training.top_items import NOTHING, items_of, scores_of, top_items


def brute_force(scores: Tensor, k: int) -> list[list[int]]:
    """The definition: by score from the best, of equal scores the first item."""
    return [sorted(range(len(row)), key=lambda item: (-row[item], item))[:k] for row in scores.tolist()]


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("k", [1, 5, 50, 80], ids=["best", "some", "all", "more-than-there-are"])
def test_chunks_and_blocks_give_what_the_whole_matrix_gives(chunk, k, monkeypatch):
    monkeypatch.setattr(module, "QUERIES_PER_BLOCK", 4)
    rng = torch.Generator().manual_seed(0)
    queries = torch.randint(-3, 4, (10, 2), generator=rng).float()  # small whole numbers: ties, also across chunks
    vectors = torch.randint(-3, 4, (50, 2), generator=rng).float()
    has_seen = torch.rand(10, 50, generator=rng) < 0.3
    scores = (queries @ vectors.T).masked_fill(has_seen, -torch.inf)
    keys = top_items(queries, Seen(*has_seen.nonzero().T), vectors.split(chunk), k)
    assert items_of(keys).tolist() == brute_force(scores, k)
    assert scores_of(keys).tolist() == scores.gather(1, items_of(keys)).tolist()


def test_keys_give_scores_back_to_the_last_bit():
    rng = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.randn(1000, generator=rng) * 10.0 ** torch.randint(-30, 30, (1000,), generator=rng)])
    ends = torch.tensor([0.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf])
    vectors = torch.cat([numbers, ends])[:, None]
    keys = top_items(torch.ones(1, 1), Seen.none(), [vectors], len(vectors))
    assert torch.equal(scores_of(keys)[0], vectors[:, 0].sort(descending=True, stable=True).values)
    assert torch.equal(items_of(keys)[0], vectors[:, 0].sort(descending=True, stable=True).indices)


@pytest.mark.parametrize("k", [2, 3])
def test_zero_and_minus_zero_are_a_tie(k):
    keys = module._best_keys(torch.tensor([[-0.0, 0.0, -0.0]]), 0, k)  # what a matrix product makes of -0 is its own
    assert items_of(keys.sort(descending=True).values).tolist() == [list(range(k))]


def test_no_query_still_draws_the_whole_catalogue_since_others_wait_for_it():
    chunks = iter(torch.ones(10, 3).split(4))
    assert top_items(torch.empty(0, 3), Seen.none(), chunks, 2).shape == (0, 2)
    assert next(chunks, None) is None


def test_nothing_has_the_score_of_what_was_dropped():
    assert scores_of(torch.tensor([NOTHING])).tolist() == [-torch.inf]
