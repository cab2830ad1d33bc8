from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from ssd_torchrec.data.attainable import AttainableScores, next_item_probabilities, optimal_ranks
from ssd_torchrec.data.synthetic import Law, SyntheticConfig, sample_users
from ssd_torchrec.training.metrics import means, ranking_sums

CONFIG = SyntheticConfig(num_users=1500, num_classes=8, seed=5)
TINY = SyntheticConfig(
    num_users=15,
    num_classes=2,
    group_size=2,
    num_segments=3,
    shortest=3,
    longest=6,
    median_length=5.0,
    weight_last=0.4,
    weight_previous=0.4,
    gap_centres_s=(300.0, 10_800.0, 172_800.0),
)


@pytest.fixture(scope="module")
def law():
    return Law.draw(CONFIG)


@pytest.fixture(scope="module")
def sample(law):
    return next(sample_users(law))


def log_likelihood(law, sample, target, *, timed=True):
    users = np.arange(len(target))
    probabilities = next_item_probabilities(law, sample, users, target, timed=timed)
    return np.log(probabilities[users, sample.item[users, target]]).mean()


@pytest.mark.parametrize("timed", [True, False], ids=["timed", "blind"])
@pytest.mark.parametrize("position", [1, 2, 3, 9])
def test_probabilities_sum_to_one(law, sample, position, timed):
    users = np.arange(50)
    target = np.full(50, position)
    probabilities = next_item_probabilities(law, sample, users, target, timed=timed)
    assert (probabilities >= 0).all()
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("back", [1, 2], ids=["test", "valid"])
def test_the_optimum_expects_what_it_meets(law, sample, back):
    """Its ten likeliest items hold the target as often as it believes, within four standard errors."""
    target = sample.lengths - back
    for timed in (True, False):
        probabilities = next_item_probabilities(law, sample, np.arange(len(target)), target, timed=timed)
        believed = np.sort(probabilities, axis=1)[:, -10:].sum(axis=1)
        met = optimal_ranks(law, sample, target, timed=timed) <= 10
        error = np.sqrt((believed * (1 - believed)).sum()) / len(met)
        assert abs(met.mean() - believed.mean()) < 4 * error


OTHER_LAWS = {
    "weights": lambda law: replace(law, config=replace(law.config, weight_last=0.6, weight_previous=0.27)),
    "flatter-groups": lambda law: replace(law, config=replace(law.config, group_exponent=0.2)),
    "flatter-segments": lambda law: replace(law, config=replace(law.config, segment_exponent=0.5)),
    "swapped-regimes": lambda law: replace(law, interest=law.interest[:, ::-1]),
    "another-class-of-some-items": lambda law: replace(law, class_of_item=_moved(law.class_of_item)),
}


def _moved(class_of_item):
    moved = class_of_item.copy()
    moved[::20] = (moved[::20] + 1) % CONFIG.num_classes
    return moved


@pytest.mark.parametrize("other", OTHER_LAWS.values(), ids=OTHER_LAWS)
def test_the_law_explains_its_users_better_than_another_law(law, sample, other):
    target = sample.lengths - 1
    assert log_likelihood(law, sample, target) > log_likelihood(other(law), sample, target) + 0.001


def test_time_explains_more(law, sample):
    target = sample.lengths - 1
    assert log_likelihood(law, sample, target) > log_likelihood(law, sample, target, timed=False) + 0.5


def test_what_past_items_betray_of_past_gaps_explains_more_than_nothing(law, sample):
    """The filter against a reader who also forgets what the last item says of the gap before the previous event."""
    target = sample.lengths - 1
    unfiltered = replace(
        law, config=replace(law.config, weight_last=1 - law.config.weight_segment, weight_previous=0.0)
    )
    assert log_likelihood(law, sample, target, timed=False) > log_likelihood(unfiltered, sample, target, timed=False)


def test_the_blind_optimum_is_the_sum_over_all_regimes():
    """Every history of regimes is tried in turn, weighted by the likelihood of the items it leads to."""
    law = Law.draw(TINY)
    sample = next(sample_users(law))
    for user, length in enumerate(sample.lengths.tolist()):
        target = np.array([length - 1])
        total, weight = 0.0, 0.0
        for tail in product(range(TINY.num_regimes), repeat=length - 2):
            imagined = replace(sample, regime=np.array([[0, *tail, 0]] * len(sample.lengths)))
            likelihood = 1.0
            for t in range(1, length - 1):
                step = next_item_probabilities(law, imagined, np.array([user]), np.array([t]), timed=True)
                likelihood *= step[0, sample.item[user, t]]
            end = next_item_probabilities(law, imagined, np.array([user]), target, timed=True)[0]
            total, weight = total + likelihood * end, weight + likelihood
        got = next_item_probabilities(law, sample, np.array([user]), target, timed=False)[0]
        assert np.allclose(got, total / weight, atol=1e-12)


def test_needing_time_means_half_the_score_is_lost_without(law, sample):
    scores = {}
    for timed in (True, False):
        best = AttainableScores(law, timed=timed)
        best.update(sample)
        scores[timed] = best.scores()
    for stage in ("valid", "test"):
        assert scores[False][stage]["ndcg@10"] <= 0.5 * scores[True][stage]["ndcg@10"]


def test_the_optimum_beats_popularity(law, sample):
    target = sample.lengths - 1
    users = np.arange(len(target))
    counts = np.bincount(sample.item[np.arange(sample.item.shape[1]) < target[:, None]], minlength=CONFIG.num_items)
    popular = (counts >= counts[sample.item[users, target]][:, None]).sum(axis=1)
    for timed in (True, False):
        assert (optimal_ranks(law, sample, target, timed=timed) <= 10).mean() > 2 * (popular <= 10).mean()


def test_scores_of_blocks_are_the_scores_of_all(law, sample, monkeypatch):
    target = sample.lengths - 1
    whole = optimal_ranks(law, sample, target, timed=True)
    monkeypatch.setattr("ssd_torchrec.data.attainable._CELLS_AT_ONCE", 7 * CONFIG.num_items)
    assert (optimal_ranks(law, sample, target, timed=True) == whole).all()


def test_scores_are_those_of_a_model_that_ranks_alike(law, sample):
    ranks = [optimal_ranks(law, sample, sample.lengths - back, timed=True) for back in (2, 1)]
    best = AttainableScores(law, timed=True)
    best.update(sample)
    for (stage, scores), rank in zip(best.scores().items(), ranks, strict=True):
        assert scores == pytest.approx(means(ranking_sums(torch.from_numpy(rank)))), stage


def test_ties_count_against():
    """With flat popularities the ten items of a group are equally likely: all targets of the group are tenth."""
    config = replace(
        CONFIG, group_exponent=0.0, segment_exponent=0.0, weight_last=0.9, weight_previous=0.0, num_users=50
    )
    law = Law.draw(config)
    sample = next(sample_users(law))
    target = sample.lengths - 1
    ranks = optimal_ranks(law, sample, target, timed=True)
    assert set(ranks.tolist()) == {config.group_size, config.num_items}
