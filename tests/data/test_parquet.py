import json
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.rows import Rows
from ssd_torchrec.data.schema import META_FILE
from ssd_torchrec.data.values import VALUES_FILE, save_values
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.data.writer import DatasetWriter
from ssd_torchrec.errors import DataError
from tests.data.samples import FIRST_ITEM, NUM_ITEMS, VOCABULARY, dataset, lists, random_rows, rows_of, write

LENGTHS = [5, 12, 0, 30, 45, 1, 7, 22, 3, 0, 0, 18, 50, 4]
LAST_ROW = FIRST_ITEM + NUM_ITEMS - 1
LIST = pa.list_(pa.int64())


def columns(items=((3, 4), (5, 6, 7)), timestamps=((10, 20), (10, 10, 30)), segments=((0,), (1, 3))):
    """Columns of one file, to be spoilt before they are written."""
    return {
        "user_id": pa.array([41, 42], pa.int64()),
        "item": pa.array(items, LIST),
        "timestamp": pa.array(timestamps, LIST),
        "segment": pa.array(segments, LIST),
    }


def foreign(folder, table, **meta):
    """A data set as another program may have written it."""
    write(folder, rows_of([[3, 4], [5, 6, 7]]))
    for file in folder.glob("users-*.parquet"):
        file.unlink()
    pq.write_table(pa.table(table), folder / "users-0.parquet")
    content = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps({**content, **meta}))
    return folder


@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0], [], [1]], ids=["mixed", "only-empty", "no-rows", "one-event"])
def test_what_is_written_is_read(tmp_path, lengths):
    rows = random_rows(lengths)
    histories = dataset(tmp_path / "set", rows)
    assert histories.counts.tolist() == lengths
    assert (histories.meta.num_users, histories.meta.num_events) == (len(lengths), sum(lengths))
    parts = list(histories)
    again = Rows.concatenate(parts) if parts else rows
    for name in ("user_id", "item", "timestamp", "offsets"):
        assert np.array_equal(getattr(again, name), getattr(rows, name)), name
    assert np.array_equal(again.context["segment"].values, rows.context["segment"].values)


def test_row_groups_and_files_are_bounded_and_none_is_cut(tmp_path):
    histories = dataset(tmp_path / "set", random_rows(LENGTHS), events_per_row_group=40, events_per_file=100)
    events = [part.num_events for part in histories]
    assert max(events) == 50  # a row longer than a row group should be
    assert all(n <= 40 or part.num_rows == 1 for n, part in zip(events, histories, strict=True))
    assert len(list((tmp_path / "set").glob("users-*.parquet"))) == 2
    assert histories.row_group_offsets.tolist() == np.cumsum([0, *[part.num_rows for part in histories]]).tolist()


def test_the_fingerprint_is_of_the_rows_and_not_of_row_groups(tmp_path):
    rows = random_rows(LENGTHS)
    prints = {write(tmp_path / str(n), rows, events_per_row_group=n).fingerprint for n in (20, 1000)}
    assert len(prints) == 1
    later = Rows(rows.user_id, rows.item, rows.timestamp + 1, rows.offsets, rows.context)
    assert write(tmp_path / "later", later).fingerprint not in prints


def test_an_old_data_set_gives_way_to_the_new(tmp_path):
    write(tmp_path / "set", random_rows([5, 5]))
    histories = dataset(tmp_path / "set", random_rows([3]))
    assert histories.counts.tolist() == [3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_event_columns_raw_users_and_what_ids_mean_are_read_again(tmp_path):
    rows, names, values = told_rows()
    prints = set()
    for limit in (3, 1000):
        folder = tmp_path / str(limit)
        write_told(folder, rows, names, values, events_per_row_group=limit)
        histories = open_dataset(folder)
        price = np.concatenate([part.event_columns["price"] for part in histories])
        assert price.tolist() == rows.event_columns["price"].tolist()
        read = [histories.raw_user_ids(group) for group in range(histories.num_row_groups)]
        assert pa.chunked_array(read).to_pylist() == names.to_pylist()
        assert {name: of.to_pylist() for name, of in histories.values().items()} == {
            "segment": ["a", "b", "c", "d"],
            "price": [None, "1 EUR", "2 EUR"],
        }
        prints.add(histories.fingerprint)
    assert len(prints) == 1
    other = dict(values, segment=pa.array(["a", "b", "d", "c"], pa.large_string()))
    event = replace(rows, event_columns={"price": rows.event_columns["price"][::-1].copy()})
    bob = pa.array(["ann", "bob", "cy"], pa.large_string())
    for told in ((rows, names, other), (event, names, values), (rows, bob, values)):
        prints.add(write_told(tmp_path / "other", *told).fingerprint)
    assert len(prints) == 4


def told_rows():
    rows = replace(rows_of([[3, 4], [], [5, 6, 7]]), event_columns={"price": np.array([0, 1, 2, 2, 1])})
    values = {"segment": ["a", "b", "c", "d"], "price": [None, "1 EUR", "2 EUR"]}
    return (
        rows,
        pa.array(["ann", "b\u00e9a", "cy"], pa.large_string()),
        {name: pa.array(of, pa.large_string()) for name, of in values.items()},
    )


def write_told(folder, rows, names, values, **limits):
    columns = {"context": {"segment": 4}, "event_columns": {"price": 3}, "values": values, "raw_user_type": "string"}
    with DatasetWriter(folder, name="told", vocabulary=VOCABULARY, **columns, **limits) as writer:
        writer.append(rows, names)
        return writer.finish()


def test_values_must_be_those_the_rows_were_made_with(tmp_path):
    rows, names, values = told_rows()
    write_told(tmp_path / "set", rows, names, values)
    histories = open_dataset(tmp_path / "set")
    save_values(dict(values, segment=values["segment"][::-1]), tmp_path / "set")
    with pytest.raises(DataError, match=r"values must have the hash .* of meta\.json"):
        histories.values()
    (tmp_path / "set" / VALUES_FILE).unlink()
    with pytest.raises(DataError, match=r"values\.parquet: must say what ids mean, but"):
        histories.values()
    with pytest.raises(DataError, match=r"values must be given for every column as counted, .*'price': 3"):
        write_told(tmp_path / "set", rows, names, {"segment": values["segment"]})


def test_without_further_columns_nothing_is_to_be_told(tmp_path):
    histories = dataset(tmp_path / "set", random_rows([5, 5]))
    assert histories.values() == {}
    assert histories.raw_user_ids(0).to_pylist() == [100, 101]


def test_lengths_and_gaps_are_summed_up_over_row_groups(tmp_path):
    rows = rows_of([[3, 4], [], [5, 6, 7]], [[10, 20], [], [10, 10, 40]])
    for limit in (1, 100):
        meta = write(tmp_path / "set", rows, events_per_row_group=limit)
        assert (meta.lengths["min"], meta.lengths["p50"], meta.lengths["max"]) == (0, 2, 3)
        assert (meta.gaps_s["min"], meta.gaps_s["max"], meta.gaps_s["mean"]) == (0, 30, 40 / 3)
    assert write(tmp_path / "none", rows_of([])).lengths == {}


@pytest.mark.parametrize("there_was_one", [True, False])
def test_an_interrupted_write_leaves_the_old_data_set_or_none(tmp_path, there_was_one):
    if there_was_one:
        write(tmp_path / "set", random_rows([5, 5]))
    writer = DatasetWriter(tmp_path / "set", name="new", vocabulary=VOCABULARY, context={"segment": 4})
    with suppress(KeyboardInterrupt), writer:
        writer.append(random_rows([3]))
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == (["set"] if there_was_one else [])
    if there_was_one:
        assert open_dataset(tmp_path / "set").counts.tolist() == [5, 5]


def test_a_killed_write_leaves_the_old_data_set_and_is_in_nobodys_way(tmp_path):
    write(tmp_path / "set", random_rows([5, 5]))
    killed = DatasetWriter(tmp_path / "set", name="new", vocabulary=VOCABULARY, context={"segment": 4}).__enter__()
    killed.append(random_rows([3]))
    assert open_dataset(tmp_path / "set").counts.tolist() == [5, 5]
    write(tmp_path / "set", random_rows([4]))
    assert open_dataset(tmp_path / "set").counts.tolist() == [4]


def test_rows_that_no_reader_would_take_are_not_written(tmp_path):
    with pytest.raises(DataError, match=r"rows to be written to set, row 1 \(user_id 1\): item must be table rows"):
        write(tmp_path / "set", rows_of([[3], [0]]))
    assert not (tmp_path / "set").exists()


def test_large_lists_and_further_columns_are_welcome(tmp_path):
    table = columns()
    expected = write(tmp_path / "plain", rows_from(table)).fingerprint
    table = {name: c.cast(pa.large_list(pa.int64())) if name != "user_id" else c for name, c in table.items()}
    table["colour"] = pa.array(["red", "blue"])
    folder = foreign(tmp_path / "set", table, fingerprint=expected)
    assert open_dataset(folder).counts.tolist() == [2, 3]


def rows_from(table):
    rows = rows_of(table["item"].to_pylist(), table["timestamp"].to_pylist())
    segment = rows_of(table["segment"].to_pylist())
    bags = {"segment": type(rows.context["segment"])(segment.item, segment.offsets)}
    return Rows(table["user_id"].to_numpy(), rows.item, rows.timestamp, rows.offsets, bags)


SPOILT = {
    "missing-column": (lambda c: c.pop("timestamp"), r"column timestamp must be there once, got columns \['user_id'"),
    "missing-context": (lambda c: c.pop("segment"), "column segment must be there once"),
    "items-of-32-bits": (
        lambda c: c.update(item=c["item"].cast(pa.list_(pa.int32()))),
        "column item must be list<int64>, got list<.*int32>; cast it",
    ),
    "timestamps-of-floats": (
        lambda c: c.update(timestamp=c["timestamp"].cast(pa.list_(pa.float64()))),
        "column timestamp must be list<int64>, got list<.*double>",
    ),
    "users-of-strings": (lambda c: c.update(user_id=pa.array(["a", "b"])), "column user_id must be int64, got string"),
    "null-user": (lambda c: c.update(user_id=pa.array([1, None], pa.int64())), "row 1: user_id must not be null"),
    "null-list": (lambda c: c.update(item=pa.array([None, [1]], LIST)), "row 0: item must not be null; write an empty"),
    "null-event": (
        lambda c: c.update(timestamp=pa.array([[10, 20], [10, None, 30]], LIST)),
        "row 1: timestamp must hold no null; drop the event",
    ),
    "null-in-a-bag": (lambda c: c.update(segment=pa.array([[], [None]], LIST)), "row 1: segment must hold no null"),
    "unequal-lengths": (
        lambda c: c.update(timestamp=pa.array([[10, 20], [10, 30]], LIST)),
        "row 1: item and timestamp must be equally long, got 3 and 2",
    ),
}
VALUES = {
    "mask": ({"items": ((3, 4), (5, 0, 7))}, r"item must be table rows 1..52 .*got 0; map raw"),
    "negative-item": ({"items": ((-1, 4), (5, 6, 7))}, r"item must be table rows .*got -1"),
    "item-past-the-end": (
        {"items": ((3, LAST_ROW + 1), (5, 6, 7))},
        f"item must be table rows 1..52 .*got {LAST_ROW + 1}",
    ),
    "negative-time": ({"timestamps": ((-5, 20), (10, 10, 30))}, "timestamp must be unix seconds, 0 or later, got -5"),
    "falling-time": (
        {"timestamps": ((10, 20), (10, 30, 29))},
        r"timestamps must ascend within a row, got 29 after 30; sort the events of each user",
    ),
    "bag-past-the-end": (
        {"segments": ((0,), (1, 4))},
        r"segment must be ids 0..3 .*got 4; correct",
    ),
    "negative-bag": ({"segments": ((0,), (-1,))}, "segment must be ids 0..3 as meta.json says, got -1"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_spoilt_columns_are_refused_by_file_and_row(tmp_path, spoil, message):
    table = columns()
    spoil(table)
    with pytest.raises(DataError, match=rf"users-0\.parquet.*{message}"):
        open_dataset(foreign(tmp_path / "set", table))


@pytest.mark.parametrize(("values", "message"), VALUES.values(), ids=VALUES)
def test_spoilt_values_are_refused_by_file_row_group_and_user(tmp_path, values, message):
    with pytest.raises(DataError, match=rf"users-0\.parquet, row group 0, row \d \(user_id 4\d\): {message}"):
        open_dataset(foreign(tmp_path / "set", columns(**values)))


def test_the_row_group_of_a_spoilt_value_is_named(tmp_path):
    write(tmp_path / "set", rows_of([[3], [3], [3]]))
    file = next((tmp_path / "set").glob("users-*.parquet"))
    table = pq.read_table(file).set_column(1, "item", pa.array([[3], [3], [0]], LIST))
    pq.write_table(table, file, row_group_size=2)
    with pytest.raises(DataError, match=r"row group 1, row 0 \(user_id 2\): item"):
        open_dataset(tmp_path / "set")


def test_a_row_may_begin_before_the_last_one_ended_even_across_empty_rows(tmp_path):
    rows = rows_of([[], [3, 4], [], [], [5], []], [[], [50, 60], [], [], [7], []])
    assert dataset(tmp_path / "set", rows).counts.tolist() == [0, 2, 0, 0, 1, 0]


def test_further_event_columns_must_be_as_long_as_the_items(tmp_path):
    table = columns() | {"price": pa.array([[1, 2], [3, 0]], LIST)}
    folder = foreign(tmp_path / "set", table, event_columns={"price": 4})
    with pytest.raises(DataError, match="row 1: item and price must be equally long, got 3 and 2"):
        open_dataset(folder)
    with pytest.raises(DataError, match="column colour must be there once"):
        open_dataset(foreign(tmp_path / "other", table, event_columns={"colour": 4}))
    table["price"] = pa.array([[1, 2], [3, 4, 0]], LIST)
    with pytest.raises(DataError, match=r"row 1 \(user_id 42\): price must be ids 0..3 as meta.json says, got 4"):
        open_dataset(foreign(tmp_path / "third", table, event_columns={"price": 4}))


def test_raw_users_must_be_there_and_strings(tmp_path):
    with pytest.raises(DataError, match="column raw_user_id must be there once"):
        open_dataset(foreign(tmp_path / "set", columns(), raw_user_type="string"))
    table = columns() | {"raw_user_id": pa.array([41, 42])}
    with pytest.raises(DataError, match="column raw_user_id must be string, got int64"):
        open_dataset(foreign(tmp_path / "set", table, raw_user_type="string"))
    table["raw_user_id"] = pa.array(["ann", None])
    with pytest.raises(DataError, match="row 1: raw_user_id must not be null"):
        open_dataset(foreign(tmp_path / "set", table, raw_user_type="string"))


def test_a_missing_file_is_noticed(tmp_path):
    write(tmp_path / "set", random_rows(LENGTHS))
    sorted((tmp_path / "set").glob("users-*.parquet"))[-1].unlink()
    with pytest.raises(DataError, match=r"must hold 14 users and 197 events .*a file is missing or foreign"):
        open_dataset(tmp_path / "set")
    for file in (tmp_path / "set").glob("users-*.parquet"):
        file.unlink()
    with pytest.raises(DataError, match=r"must hold users-\*\.parquet beside meta\.json, got none"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    write(tmp_path / "set", random_rows(LENGTHS))
    file = sorted((tmp_path / "set").glob("users-*.parquet"))[0]
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"users-00000\.parquet: must be a Parquet file"):
        open_dataset(tmp_path / "set")


def test_damage_inside_a_file_is_refused(tmp_path):
    write(tmp_path / "set", random_rows(LENGTHS))
    file = sorted((tmp_path / "set").glob("users-*.parquet"))[0]
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"users-00000\.parquet, row group \d+: must be readable"):
        open_dataset(tmp_path / "set")


def test_altered_rows_do_not_have_the_fingerprint(tmp_path):
    folder = foreign(tmp_path / "set", columns())
    with pytest.raises(DataError, match=r"must have the fingerprint .* rows were altered after writing"):
        open_dataset(folder)


def test_a_file_changed_after_opening_is_refused(tmp_path):
    histories = dataset(tmp_path / "set", random_rows([5, 5]))
    write(tmp_path / "set", random_rows([4, 5]))
    with pytest.raises(
        DataError, match=r"users-00000\.parquet, row group 0.*(changed since it was opened|must be readable)"
    ):
        histories.read(0)


def test_the_vocabulary_must_be_the_one_the_rows_were_made_with(tmp_path):
    histories = dataset(tmp_path / "set", random_rows([5]))
    assert histories.vocabulary().ids_of(np.array([0, FIRST_ITEM])).to_pylist() == [None, 0]
    Vocabulary(np.arange(NUM_ITEMS) + 1, num_oov_buckets=2).save(tmp_path / "set")
    with pytest.raises(DataError, match=r"vocabulary must have the hash .* of meta\.json"):
        histories.vocabulary()


def test_a_copied_data_set_is_the_same(tmp_path):
    histories = dataset(tmp_path / "set", random_rows(LENGTHS))
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    copy = open_dataset(tmp_path / "copy")
    assert copy.fingerprint == histories.fingerprint
    assert lists(copy.read(0).item, copy.read(0).offsets) == lists(histories.read(0).item, histories.read(0).offsets)
