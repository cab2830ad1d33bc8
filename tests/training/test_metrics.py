import math

import pytest
import torch

from ssd_torchrec.training.metrics import means, ranking_sums
from ssd_torchrec.training.schedule import learning_rate_factor


def test_means_are_the_textbook_figures():
    figures = means(ranking_sums(torch.tensor([1, 10, 11, 60])))
    assert figures["hr@10"] == 2 / 4
    assert figures["hr@50"] == 3 / 4
    assert figures["ndcg@10"] == pytest.approx((1 + 1 / math.log2(11)) / 4)
    assert figures["mrr@20"] == pytest.approx((1 + 1 / 10 + 1 / 11) / 4)


def test_sums_of_parts_are_the_sums_of_the_whole():
    ranks = torch.randint(1, 100, (50,), generator=torch.Generator().manual_seed(0))
    parts = ranking_sums(ranks[:20]) + ranking_sums(ranks[20:])
    torch.testing.assert_close(parts, ranking_sums(ranks))


def test_nothing_ranked_is_all_zero():
    assert set(means(ranking_sums(torch.empty(0, dtype=torch.int64))).values()) == {0.0}


def test_learning_rate_rises_then_falls_to_the_last_step():
    factors = [learning_rate_factor(step, total_steps=100, warmup_steps=10, decay="linear") for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 90)


def test_a_constant_rate_stays_up_after_the_warm_up():
    assert learning_rate_factor(5000, total_steps=100, warmup_steps=10, decay="constant") == 1


def test_a_run_longer_than_planned_keeps_learning():
    assert learning_rate_factor(500, total_steps=100, warmup_steps=0, decay="linear") > 0
