import numpy as np
import pytest

from ssd_torchrec.data.negatives import NegativeSampler
from ssd_torchrec.errors import DataError

COUNTS = np.array([3, 0, 40, 7, 7, 1, 120, 0, 15, 2])
V = len(COUNTS)
BY_RANK = [6, 2, 8, 3, 4, 0, 9, 5, 1, 7]  # most counted first, equals in order
ZIPF = np.log((np.arange(V) + 2) / (np.arange(V) + 1)) / np.log(V + 1)
CHANCE = {
    "uniform": np.full(V, 1 / V),
    "popularity": COUNTS / COUNTS.sum(),
    "log_uniform": ZIPF[np.argsort(BY_RANK)],
}
DRAWING = list(CHANCE)


def sampler(kind, num_negatives=4, counts=COUNTS):
    return NegativeSampler(kind, num_negatives, counts)


def frequencies(kind, draws):
    """Share of each item among single draws."""
    one = sampler(kind, 1)
    return np.bincount(np.concatenate([one.draw(5, number) for number in range(draws)]), minlength=V) / draws


@pytest.mark.parametrize("kind", DRAWING)
def test_draws_hang_on_their_words_alone(kind):
    wide = sampler(kind, 1000, np.arange(1, 100_001))
    assert wide.draw(3, 0, 2, 7).tolist() == sampler(kind, 1000, np.arange(1, 100_001)).draw(3, 0, 2, 7).tolist()
    for words in [(4, 0, 2, 7), (3, 1, 2, 7), (3, 0, 1, 7), (3, 0, 2, 8)]:
        assert wide.draw(*words).tolist() != wide.draw(3, 0, 2, 7).tolist()


@pytest.mark.parametrize("kind", DRAWING)
@pytest.mark.parametrize("num_negatives", [1, 7, 500])
def test_what_is_drawn_is_ascending_and_different_items(kind, num_negatives):
    drawn = sampler(kind, num_negatives).draw(0, 0, 0, 0)
    assert 1 <= len(drawn) <= num_negatives
    assert (np.diff(drawn) > 0).all()
    assert 0 <= drawn[0] <= drawn[-1] < V


@pytest.mark.parametrize("kind", DRAWING)
def test_chances_are_those_of_the_law(kind):
    chance = sampler(kind).chance(np.arange(V))
    assert chance == pytest.approx(CHANCE[kind], abs=1e-15)
    assert chance.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("kind", DRAWING)
def test_items_come_as_often_as_their_chance_says(kind):
    draws, chance = 20_000, CHANCE[kind]
    seen = frequencies(kind, draws)
    possible = chance > 0
    assert not seen[~possible].any()
    chi_square = draws * ((seen - chance)[possible] ** 2 / chance[possible]).sum()
    assert chi_square < 28  # with at most 9 degrees of freedom exceeded once in a thousand seeds


def test_a_zipfian_law_follows_the_rank_of_the_counts():
    chance = sampler("log_uniform").chance(np.array(BY_RANK))
    assert (np.diff(chance) < 0).all()


@pytest.mark.parametrize("kind", DRAWING)
def test_log_q_is_the_share_of_draws_that_have_the_item(kind):
    possible, times, drawn = np.flatnonzero(CHANCE[kind]), 5000, sampler(kind, 6)
    has = np.zeros(V)
    for number in range(times):
        has[drawn.draw(9, number)] += 1
    log_q = drawn.log_q(possible, 6)
    assert log_q.dtype == np.float32
    deviation = np.sqrt(np.exp(log_q) * -np.expm1(log_q) / times)
    assert (np.abs(has[possible] / times - np.exp(log_q)) < 4 * deviation).all()


def test_log_q_of_rare_items_is_that_of_their_expected_number_of_draws():
    counts = np.ones(10**6, np.int64)
    counts[0] = 10**15
    log_q = sampler("popularity", 4096, counts).log_q(np.array([0, 1]), 4096)
    assert log_q.tolist() == pytest.approx([0, np.log(4096e-15)], abs=1e-5)


@pytest.mark.parametrize("kind", [*DRAWING, "in_batch"])
def test_an_only_item_comes_for_certain(kind):
    alone = sampler(kind, 3, np.array([5]))
    assert alone.log_q(np.array([0]), 3).tolist() == [0]
    assert kind == "in_batch" or alone.draw(0).tolist() == [0]


def test_the_targets_of_a_batch_are_its_negatives_each_once():
    shared = sampler("in_batch").among(np.array([6, 2, 6, 9, 2, 6]))
    assert shared.item.tolist() == [2, 6, 9]
    missed = (1 - CHANCE["popularity"][[2, 6, 3]]) ** 6
    assert shared.log_q(np.array([2, 6, 3])) == pytest.approx(np.log(1 - missed), abs=1e-6)


def test_a_batch_without_targets_has_the_most_counted_item_for_negative():
    shared = sampler("in_batch").among(np.array([], np.int64))
    assert (shared.item.tolist(), shared.num_draws) == ([6], 1)
    assert np.isfinite(shared.log_q(shared.item)).all()


def test_drawn_negatives_know_how_many_draws_they_are_from():
    drawn = sampler("log_uniform", 5)
    shared = drawn.shared(1, 2, 3, 4)
    assert shared.item.tolist() == drawn.draw(1, 2, 3, 4).tolist()
    assert shared.log_q(np.arange(V)).tolist() == drawn.log_q(np.arange(V), 5).tolist()


@pytest.mark.parametrize("kind", ["popularity", "in_batch"])
def test_an_item_that_can_never_come_is_refused_as_a_candidate(kind):
    with pytest.raises(DataError, match="must be in the training events, got item 1, which is not; count them on"):
        sampler(kind).log_q(np.array([0, 1]), 4)


@pytest.mark.parametrize("kind", ["popularity", "in_batch"])
def test_counts_of_nothing_are_refused_where_they_are_the_law(kind):
    with pytest.raises(DataError, match=f"{kind} negatives must have training events of known items"):
        sampler(kind, counts=np.zeros(3, np.int64))
    assert sampler("uniform", counts=np.zeros(3, np.int64)).draw(0).max() < 3
