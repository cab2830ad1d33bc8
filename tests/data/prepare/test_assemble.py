from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from ssd_torchrec.data.prepare import assemble as assemble_module
from ssd_torchrec.data.prepare.assemble import TIME, Extras, assemble, rising
from ssd_torchrec.data.prepare.by_user import ByUser
from ssd_torchrec.data.prepare.core import code_events, k_core
from ssd_torchrec.data.rows import Rows
from ssd_torchrec.errors import DataError
from tests.data.prepare.events import core_by_hand, database, events_table, random_events
from tests.data.samples import lists

BUCKETS = 3


def assembled(events, *, k=0, extras=None, order="int64", users=None):
    if order == "float32-stable":
        events = events.append_column("float32_time", pa.array(events["timestamp"].to_numpy().astype(np.float32)))
    connection, extras = database(events, users), extras or Extras()
    code_events(connection, extras.of_log, time=sorted({"timestamp", TIME[order]}))
    list(k_core(connection, k))
    return assemble(connection, extras, order, BUCKETS)


def rows_and_names(left):
    rows, names = zip(*left.blocks(), strict=True)
    return Rows.concatenate(list(rows)), None if names[0] is None else pa.chunked_array(names).to_pylist()


def raw_items(left, rows):
    return [left.vocabulary.ids_of(np.array(row)).to_pylist() for row in lists(rows.item, rows.offsets)]


@pytest.fixture
def few_at_once(monkeypatch):
    """Users reach over batches, and blocks hold one or two users."""
    monkeypatch.setattr(assemble_module, "_BATCH", 2048)  # DuckDB's vectors are not cut further
    monkeypatch.setattr(assemble_module, "_LINES_AT_ONCE", 100)


@pytest.mark.parametrize("k", [0, 140])
def test_rows_are_users_ascending_with_events_by_time_then_position(few_at_once, k):
    events = random_events(0, 20_000, num_users=60, num_items=80, seconds=50)
    left = assembled(events, k=k)
    rows, names = rows_and_names(left)
    assert len(list(left.blocks())) > 5
    pairs = list(zip(*(events[name].to_pylist() for name in ("user_id", "item")), strict=True))
    kept = set(core_by_hand(pairs, k))
    lines = sorted(zip(*(events[c].to_pylist() for c in ("user_id", "timestamp", "position", "item")), strict=True))
    expected = [line for line in lines if (line[0], line[3]) in kept]
    assert (len(expected) < len(lines)) == (k > 0)
    assert names is None
    assert rows.user_id.tolist() == sorted({line[0] for line in expected})
    assert np.repeat(rows.user_id, rows.lengths).tolist() == [line[0] for line in expected]
    assert rows.timestamp.tolist() == [line[1] for line in expected]
    assert left.vocabulary.ids_of(rows.item).to_pylist() == [line[3] for line in expected]


def test_only_the_core_is_left():
    left = assembled(events_table([1, 2, 1, 2, 3, 1], [5, 5, 6, 6, 5, 7]), k=2)
    rows, _ = rows_and_names(left)
    assert rows.user_id.tolist() == [1, 2]
    assert raw_items(left, rows) == [[5, 6], [5, 6]]
    assert left.vocabulary.ids.to_pylist() == [5, 6]


def test_users_with_names_are_counted_in_the_order_of_their_names(few_at_once):
    names = [f"user {n}" for n in range(300)]
    left = assembled(events_table(names[::-1] * 10, ["b", "a", "c"] * 1000))
    rows, told = rows_and_names(left)
    assert told == sorted(names)
    assert rows.user_id.tolist() == list(range(300))
    assert left.vocabulary.ids.to_pylist() == ["a", "b", "c"]
    assert set(rows.lengths.tolist()) == {10}


def test_event_columns_go_with_their_events():
    events = events_table([2, 1, 1, 1], [5, 5, 6, 7], [4, 3, 2, 1], colour=["red", None, "blue", "red"], u=["x"] * 4)
    left = assembled(events, extras=Extras(event=("colour", "u")))
    rows, _ = rows_and_names(left)
    assert raw_items(left, rows) == [[7, 6, 5], [5]]
    assert lists(rows.event_columns["colour"], rows.offsets) == [[2, 1, 0], [2]]
    assert lists(rows.event_columns["u"], rows.offsets) == [[1, 1, 1], [1]]
    assert left.values["colour"].to_pylist() == [None, "blue", "red"]
    assert left.event_columns == {"colour": 3, "u": 2}
    assert left.context == {}


def test_values_are_those_of_what_is_left():
    events = events_table([1, 2, 1, 2, 3], [5, 5, 6, 6, 5], colour=["red", "red", None, "tan", "sky"])
    assert assembled(events, k=2, extras=Extras(event=("colour",))).values["colour"].to_pylist() == [None, "red", "tan"]
    left = assembled(events, k=2, extras=Extras(user=("colour",)))
    assert left.values["colour"].to_pylist() == ["red", "tan"]
    with pytest.raises(
        DataError, match="column colour must hold a value for some event or user that is left, got none"
    ):
        assembled(events_table([1, 2], [5, 5], colour=[None, None]), extras=Extras(event=("colour",)))


def test_a_user_column_of_the_log_is_a_bag_of_distinct_values(few_at_once):
    events = events_table([1, 1, 1, 3, 2, 2], [5] * 6, device=["tv", "app", "tv", "app", None, None], c=["x"] * 6)
    left = assembled(events, extras=Extras(event=("c",), user=("device",)))
    rows, _ = rows_and_names(left)
    bags = rows.context["device"]
    assert lists(bags.values, bags.offsets) == [[0, 1], [], [0]]
    assert (left.context, left.event_columns) == ({"device": 2}, {"c": 2})


def test_user_columns_of_a_table_of_users(few_at_once):
    num_users = 500
    users = pa.table(
        {"user_id": range(num_users), "age": [f"{n % 7}0" for n in range(num_users)], "u": ["x"] * num_users}
    )
    other = pa.table({"user_id": [0, 10**6], "age": ["9", "8"], "u": ["x", "y"]})
    users = pa.concat_tables([users.slice(0, 499), users.slice(0, 1), other])  # 0 twice, 499 not at all
    events = events_table(list(range(num_users)) * 12, [5] * 12 * num_users)
    left = assembled(events, extras=Extras(user=("age", "u"), of_users_table=True), users=users)
    rows, _ = rows_and_names(left)
    bags = rows.context["age"]
    assert lists(bags.values, bags.offsets) == [[0, 7], *([n % 7] for n in range(1, 499)), []]
    assert left.values["age"].to_pylist() == ["00", "10", "20", "30", "40", "50", "60", "9"]
    assert left.context == {"age": 8, "u": 1}


def test_float32_order_takes_near_times_for_equal_and_keeps_them_rising():
    base = 2**30  # float32 steps of 128
    times = [base + 40, base + 10, base + 500, base + 20, base + 30, base + 129]
    events = events_table([1, 1, 1, 1, 2, 2], [10, 11, 12, 13, 14, 15], times)
    exact, _ = rows_and_names(left := assembled(events))
    assert raw_items(left, exact) == [[11, 13, 10, 12], [14, 15]]
    rows, _ = rows_and_names(left := assembled(events, order="float32-stable"))
    assert raw_items(left, rows) == [[10, 11, 13, 12], [14, 15]]
    assert lists(rows.timestamp - base, rows.offsets) == [[40, 40, 40, 500], [30, 129]]


def test_float32_order_is_a_stable_sort_of_float32_times():
    events = random_events(1, 5000, num_users=20, num_items=50, seconds=5000)
    left = assembled(events, order="float32-stable")
    rows, _ = rows_and_names(left)
    users, times, items = (events[name].to_numpy() for name in ("user_id", "timestamp", "item"))
    order = np.lexsort((times.astype(np.float32), users))
    assert left.vocabulary.ids_of(rows.item).to_pylist() == items[order].tolist()
    moved = rows.timestamp - times[order]
    assert 0 < moved.max() < 128
    assert moved.min() == 0


def test_rising_is_the_latest_so_far_of_each_row():
    offsets = np.array([0, 0, 3, 3, 5, 5])
    assert rising(np.array([5, 3, 9, 2, 1]), offsets).tolist() == [5, 5, 9, 2, 2]
    assert rising(np.zeros(0, np.int64), np.array([0, 0])).tolist() == []


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_whole_users_whatever_the_batches(batch):
    user = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4]
    table = pa.table({"user": user, "value": range(len(user))})

    def reader():
        return pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=batch))

    parts = list(ByUser(reader()).whole_users(least_lines=2))
    assert pa.concat_tables(parts).equals(table)
    ends = [(part["user"][0].as_py(), part["user"][-1].as_py()) for part in parts]
    assert all(this[1] < after[0] for this, after in pairwise(ends))
    lines = ByUser(reader())
    assert [lines.before(stop)["value"].to_pylist() for stop in (0, 1, 3, 3, 9)] == [
        [],
        [0, 1, 2],
        [3, 4, 5],
        [],
        [6, 7, 8, 9, 10],
    ]
