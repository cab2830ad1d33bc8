from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ssd_torchrec.data.rows import Rows, cut_under_budget, even_offsets, offsets_of, ranges
from tests.data.samples import FEW, lists, random_rows, rows_of

LENGTHS = st.lists(st.integers(0, 9), max_size=12)


@FEW
@given(LENGTHS)
def test_ranges_are_the_ranges_end_to_end(lengths):
    starts = np.arange(len(lengths)) * 7
    expected = [s + i for s, n in zip(starts.tolist(), lengths, strict=True) for i in range(n)]
    assert ranges(starts, np.array(lengths, np.int64)).tolist() == expected


@FEW
@given(st.integers(0, 40), st.integers(1, 12))
def test_a_count_is_laid_over_rows_evenly(count, rows):
    offsets = even_offsets(count, rows)
    lengths = np.diff(offsets)
    assert (len(lengths), offsets[0], offsets[-1]) == (rows, 0, count)
    assert max(lengths) - min(lengths) <= 1


@FEW
@given(LENGTHS, st.integers(1, 20))
def test_groups_keep_the_budget_unless_one_row_alone_breaks_it(lengths, budget):
    cuts = cut_under_budget(np.array(lengths, np.int64), budget).tolist()
    assert cuts[0] == 0
    assert cuts[-1] == len(lengths)
    for first, stop in pairwise(cuts):
        assert stop > first
        assert sum(lengths[first:stop]) <= budget or stop == first + 1


@FEW
@given(LENGTHS, st.integers(1, 20))
def test_no_group_could_take_the_row_after_it(lengths, budget):
    cuts = cut_under_budget(np.array(lengths, np.int64), budget).tolist()
    for first, stop in pairwise(cuts):
        assert stop == len(lengths) or sum(lengths[first : stop + 1]) > budget


def test_taken_rows_come_in_the_order_asked_for_and_cut_at_their_ends():
    rows = rows_of([[3, 4, 5], [], [6, 7], [8]])
    taken = rows.take(np.array([2, 0, 1]), np.array([1, 3, 0]))
    assert lists(taken.item, taken.offsets) == [[6], [3, 4, 5], []]
    assert lists(taken.timestamp, taken.offsets) == [[1000], [1000, 4600, 8200], []]
    assert taken.context["segment"].values.tolist() == [2, 0, 1]
    assert taken.user_id.tolist() == [2, 0, 1]


def test_cut_and_joined_rows_are_the_rows_again():
    rows = random_rows([3, 0, 5, 1, 2])
    again = Rows.concatenate([rows[:1], rows[1:4], rows[4:]])
    for name in ("user_id", "item", "timestamp", "offsets"):
        assert np.array_equal(getattr(again, name), getattr(rows, name)), name
    assert np.array_equal(again.context["segment"].offsets, rows.context["segment"].offsets)


def test_event_columns_go_with_their_events():
    rows = replace(rows_of([[3, 4, 5], [], [6, 7]]), event_columns={"price": np.array([30, 40, 50, 60, 70])})
    assert rows.take(np.array([2, 0]), np.array([1, 2])).event_columns["price"].tolist() == [60, 30, 40]
    assert rows[1:3].event_columns["price"].tolist() == [60, 70]
    again = Rows.concatenate([rows[1:3], rows[:1]])
    assert (again.event_columns["price"] == 10 * again.item).all()


def test_no_rows_are_rows():
    none = random_rows([3, 2])[1:1]
    assert (none.num_rows, none.num_events) == (0, 0)
    assert offsets_of(none.lengths).tolist() == [0]
