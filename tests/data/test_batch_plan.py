from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_torchrec.data.batch_plan import BatchConfig, evaluation_windows, share_of_rank, training_windows
from ssd_torchrec.data.rows import offsets_of
from ssd_torchrec.errors import ConfigError
from tests.data.samples import FEW

CONFIG = BatchConfig(tokens_per_batch=20, window_events=60)
PLANS = st.tuples(
    st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=6), max_size=6), st.integers(1, 30), st.integers(1, 80)
)


def plan(groups, config, epoch=0, evaluation=False):
    """Global batches as rows of the data set."""
    lengths = np.array([n for group in groups for n in group], np.int64)
    bounds = offsets_of(np.array([len(group) for group in groups], np.int64))
    windows = (
        evaluation_windows(lengths, bounds, config) if evaluation else training_windows(lengths, bounds, config, epoch)
    )
    batches = []
    for window in windows:
        rows = np.concatenate([np.arange(bounds[g], bounds[g + 1]) for g in window.row_groups])
        batches += [rows[window.stretches.row[batch]].tolist() for batch in window.batches]
    return lengths, batches


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@FEW
@given(PLANS)
def test_every_row_with_events_is_in_one_batch_under_the_budget(evaluation, drawn):
    groups, budget, window = drawn
    lengths, batches = plan(groups, BatchConfig(tokens_per_batch=budget, window_events=window), evaluation=evaluation)
    assert sorted(row for batch in batches for row in batch) == np.flatnonzero(lengths).tolist()
    for batch in batches:
        assert lengths[batch].sum() <= budget or len(batch) == 1


@FEW
@given(PLANS)
def test_windows_hold_no_more_row_groups_than_their_bound(drawn):
    groups, budget, window_events = drawn
    lengths = np.array([n for group in groups for n in group], np.int64)
    bounds = offsets_of(np.array([len(group) for group in groups], np.int64))
    config = BatchConfig(tokens_per_batch=budget, window_events=window_events)
    for window in training_windows(lengths, bounds, config, 0):
        events = sum(sum(groups[g]) for g in window.row_groups)
        assert events <= window_events or sum(sum(groups[g]) > 0 for g in window.row_groups) == 1


GROUPS = [np.random.default_rng(g).integers(1, 15, size=12).tolist() for g in range(8)]
ONE_GROUP = np.random.default_rng(9).integers(1, 15, size=96).tolist()


def test_the_plan_hangs_on_seed_and_epoch_alone():
    _, batches = plan(GROUPS, CONFIG, epoch=3)
    assert plan(GROUPS, CONFIG, epoch=3)[1] == batches
    assert plan(GROUPS, CONFIG, epoch=4)[1] != batches
    assert plan(GROUPS, replace(CONFIG, seed=1), epoch=3)[1] != batches


def test_rows_change_their_company_from_epoch_to_epoch():
    config = replace(CONFIG, tokens_per_batch=60)
    together = [{frozenset(batch) for batch in plan([ONE_GROUP], config, epoch)[1]} for epoch in (0, 1)]
    assert not together[0] & together[1]


def test_rows_of_a_batch_are_of_similar_length():
    config = replace(CONFIG, window_events=10**6, tokens_per_batch=60)
    lengths, batches = plan([[int(n) for n in np.random.default_rng(0).integers(1, 100, size=2000)]], config)
    within = np.mean([np.std(lengths[batch]) for batch in batches if len(batch) > 1])
    assert within < 0.5 * np.std(lengths)


def test_long_and_short_batches_take_turns():
    lengths, batches = plan([ONE_GROUP], replace(CONFIG, length_noise=0))
    means = np.array([lengths[batch].mean() for batch in batches])
    assert len(means) > 20
    assert 0.25 < (np.diff(means) < 0).mean() < 0.75


def test_no_rest_makes_a_tiny_batch():
    lengths, batches = plan([[5] * 41], replace(CONFIG, tokens_per_batch=100, window_events=10**6))
    assert sorted(lengths[batch].sum() for batch in batches) == [65, 70, 70]


def test_evaluation_leaves_nothing_to_chance():
    _, batches = plan(GROUPS, CONFIG, evaluation=True)
    assert plan(GROUPS, replace(CONFIG, seed=9), evaluation=True)[1] == batches


def test_rows_are_dealt_back_and_forth():
    rows = np.arange(6)
    shares = [share_of_rank(rows, 9 - rows, rank, 2) for rank in range(2)]
    assert [(9 - share).tolist() for share in shares] == [[9, 5, 6], [8, 4, 7]]


@FEW
@given(st.lists(st.integers(1, 30), max_size=15), st.integers(1, 5))
def test_shares_are_all_rows_and_balance(lengths, world_size):
    rows = np.arange(len(lengths)) + 100
    counts = np.array(lengths, np.int64)
    shares = [share_of_rank(rows, counts, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == rows.tolist()
    events = [int(counts[share - 100].sum()) for share in shares]
    assert max(events) - min(events) <= max(lengths, default=0)


@pytest.mark.parametrize("field", ["tokens_per_batch", "window_events", "length_noise", "seed"])
def test_a_batch_config_out_of_range_is_refused(field):
    with pytest.raises(ConfigError, match=f"{field} must be at least"):
        BatchConfig(**{field: -1})
