import csv as csv_lines
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssd_torchrec.data import asked_file
from ssd_torchrec.data.asked import LATEST_S, read_asked_users
from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.rows import Rows
from ssd_torchrec.data.writer import DatasetWriter
from ssd_torchrec.errors import DataError
from tests.data.samples import FIRST_ITEM, NUM_ITEMS, NUM_SEGMENTS, VOCABULARY, dataset, lists, random_rows

LENGTHS = [5, 12, 0, 30, 45, 1, 7, 22, 3, 2, 4, 18]
USERS = 100 + np.arange(len(LENGTHS))
HISTORY = {"user_id": 7, "item": [3, 1, 3], "timestamp": [10, 20, 20], "segment": [1]}


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data") / "set", random_rows(LENGTHS))


def parquet(folder: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "users.parquet")
    return folder / "users.parquet"


def csv(folder: Path, *users: object) -> Path:
    (folder / "users.csv").write_text("".join(f"{user}\n" for user in ("user_id", *users)))
    return folder / "users.csv"


@pytest.mark.parametrize("users_per_block", [2, 4096])
def test_known_users_are_found_in_the_order_asked_for(histories, tmp_path, monkeypatch, users_per_block):
    monkeypatch.setattr(asked_file, "ROWS_PER_BLOCK", users_per_block)
    asked = read_asked_users(csv(tmp_path, 111, 100, 105, 111), histories, tmp_path / "beside")
    assert asked.user_id.to_pylist() == [111, 100, 105, 111]
    assert asked.row.tolist() == [11, 0, 5, 11]
    assert (asked.folder, asked.num_unknown) == (histories.folder, 0)
    assert not (tmp_path / "beside").exists()


def test_unknown_users_are_named_and_counted(histories, tmp_path):
    file = csv(tmp_path, 1, 100, *range(200, 210))
    with pytest.raises(DataError, match=r"11 of 12 are not: 1, 200, 201, 202, 203, \.\.\.; .*--skip-unknown"):
        read_asked_users(file, histories, tmp_path / "beside")
    with pytest.raises(DataError, match="1 of 1 are not: 5; leave"):
        read_asked_users(csv(tmp_path, 5), histories, tmp_path / "beside")


def test_unknown_users_can_be_left_out(histories, tmp_path):
    asked = read_asked_users(csv(tmp_path, 1, 101, 2, 100), histories, tmp_path / "beside", skip_unknown=True)
    assert (asked.user_id.to_pylist(), asked.row.tolist(), asked.num_unknown) == ([101, 100], [1, 0], 2)


def test_nobody_left_is_an_answer_too(histories, tmp_path):
    asked = read_asked_users(csv(tmp_path, 1), histories, tmp_path / "beside", skip_unknown=True)
    assert (len(asked.user_id), len(asked.row), asked.num_unknown) == (0, 0, 1)


def test_user_ids_of_another_type_are_refused(histories, tmp_path):
    file = parquet(tmp_path, [{"user_id": "100"}])
    with pytest.raises(DataError, match="row 0: user_id must be int64 as in the data set, got string"):
        read_asked_users(file, histories, tmp_path / "beside")


@pytest.mark.parametrize("users_per_block", [1, 4096])
def test_histories_become_a_data_set_with_items_mapped(histories, tmp_path, monkeypatch, users_per_block):
    monkeypatch.setattr(asked_file, "ROWS_PER_BLOCK", users_per_block)
    rows = [
        {"user_id": "ann", "item": [3, 49, 3], "timestamp": [10, 20, 20], "segment": [1, 2]},
        {"user_id": "bob", "item": [], "timestamp": [], "segment": []},
        {"user_id": "ann", "item": [NUM_ITEMS, 0], "timestamp": [5, LATEST_S], "segment": [0]},  # one item unknown
        {"user_id": "cid", "item": [], "timestamp": [], "segment": []},
    ]
    asked = read_asked_users(parquet(tmp_path, rows), histories, tmp_path / "beside")
    assert (asked.user_id.to_pylist(), asked.row.tolist()) == (["ann", "bob", "ann", "cid"], [0, 1, 2, 3])
    brought = open_dataset(asked.folder)
    assert brought.meta.item_vocabulary_hash == histories.meta.item_vocabulary_hash
    read = Rows.concatenate(list(brought))
    items = lists(read.item, read.offsets)
    assert items[:2] == [[FIRST_ITEM + 3, FIRST_ITEM + 49, FIRST_ITEM + 3], []]
    assert 1 <= items[2][0] < FIRST_ITEM
    assert items[2][1] == FIRST_ITEM
    assert lists(read.timestamp, read.offsets) == [[10, 20, 20], [], [5, LATEST_S], []]
    bags = read.context["segment"]
    assert lists(bags.values, bags.offsets) == [[1, 2], [], [0], []]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"timestamp": [10, 20]}, "row 1: item and timestamp must be equally long, got 3 and 2"),
        ({"timestamp": [10, 30, 20]}, "row 1: timestamps must ascend, got 20 after 30; sort"),
        ({"timestamp": [-1, 20, 20]}, "row 1: timestamp must be unix seconds from 0 .* got -1"),
        ({"timestamp": [10, 20, 1_600_000_000_000]}, "row 1: .* got 1600000000000; divide milliseconds by 1,000"),
        ({"timestamp": [10, 20, LATEST_S + 1]}, "row 1: .* divide milliseconds by 1,000"),
        ({"timestamp": [10, 20, None]}, "row 1: timestamp must hold no null"),
        ({"item": None}, "row 1: item must not be null"),
        ({"user_id": None}, "row 1: user_id must not be null"),
        ({"segment": [NUM_SEGMENTS]}, r"row 1: segment must be ids 0\.\.3 as in the data set, got 4"),
        ({"segment": [0, -1]}, r"row 1: segment must be ids 0\.\.3 as in the data set, got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("users_per_block", [1, 4096])
def test_histories_that_are_wrong_are_refused_by_row(histories, tmp_path, monkeypatch, users_per_block, wrong, match):
    monkeypatch.setattr(asked_file, "ROWS_PER_BLOCK", users_per_block)
    file = parquet(tmp_path, [HISTORY, {**HISTORY, **wrong}, HISTORY])
    with pytest.raises(DataError, match=match):
        read_asked_users(file, histories, tmp_path / "beside")
    assert [path.name for path in tmp_path.iterdir()] == ["users.parquet"]


def test_items_of_another_type_are_refused(histories, tmp_path):
    file = parquet(tmp_path, [{**HISTORY, "item": ["3", "1", "3"]}])
    with pytest.raises(DataError, match="row 0: item must be int64 as in the vocabulary, got string"):
        read_asked_users(file, histories, tmp_path / "beside")


@pytest.mark.parametrize("columns", [["user_id", "item"], ["user_id", "item", "timestamp"], ["item"], [*HISTORY, "x"]])
def test_other_columns_are_refused(histories, tmp_path, columns):
    file = parquet(tmp_path, [{name: HISTORY.get(name, 1) for name in columns}])
    with pytest.raises(DataError, match=r"user_id, item, segment, timestamp.*; got .*: rename, add or drop"):
        read_asked_users(file, histories, tmp_path / "beside")


@pytest.mark.parametrize("content", ["", "user_id\n"], ids=["no-line", "no-row"])
def test_no_users_are_refused(histories, tmp_path, content):
    (tmp_path / "users.csv").write_text(content)
    with pytest.raises(DataError, match="must hold at least one user, got none"):
        read_asked_users(tmp_path / "users.csv", histories, tmp_path / "beside")


def test_context_is_given_by_its_values_where_the_data_set_has_them(tmp_path):
    plain = random_rows([3, 2])
    known = {
        "context": {"segment": NUM_SEGMENTS},
        "values": {"segment": pa.array(["a", "b", "c", "7"], pa.large_string())},
    }
    with DatasetWriter(tmp_path / "set", name="sample", vocabulary=VOCABULARY, **known) as writer:
        writer.append(plain)
        writer.finish()
    histories = open_dataset(tmp_path / "set")
    file = parquet(tmp_path, [{**HISTORY, "segment": ["c", "7"]}, {**HISTORY, "segment": []}])
    asked = read_asked_users(file, histories, tmp_path / "beside")
    bags = Rows.concatenate(list(open_dataset(asked.folder))).context["segment"]
    assert lists(bags.values, bags.offsets) == [[2, 3], []]
    file = parquet(tmp_path, [{**HISTORY, "segment": ["c"]}, {**HISTORY, "segment": ["c", "z"]}])
    with pytest.raises(DataError, match="row 1: segment must be values that the data set knows, got 'z'"):
        read_asked_users(file, histories, tmp_path / "other")


ACTIONS = pa.array([None, "buy", "view", "7"], pa.large_string())
WITH_ACTIONS = {**HISTORY, "action": ["view", None, "7"]}


def acting(folder: Path, values: bool = True):
    """A data set with an event column, whose ids mean something or nothing."""
    known = {"context": {"segment": NUM_SEGMENTS}, "event_columns": {"action": len(ACTIONS)}}
    if values:
        known["values"] = {"segment": pa.array(list("abcd"), pa.large_string()), "action": ACTIONS}
    rows = replace(random_rows([3, 2]), event_columns={"action": np.array([0, 1, 2, 1, 3])})
    with DatasetWriter(folder, name="sample", vocabulary=VOCABULARY, **known) as writer:
        writer.append(rows)
        writer.finish()
    return open_dataset(folder)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("users_per_block", [1, 4096])
def test_event_columns_are_given_by_their_values_or_null(tmp_path, monkeypatch, users_per_block, suffix):
    monkeypatch.setattr(asked_file, "ROWS_PER_BLOCK", users_per_block)
    nothing = {"item": [], "timestamp": [], "segment": [], "action": []}
    given = [WITH_ACTIONS, {**HISTORY, **nothing}, {**WITH_ACTIONS, "action": [None] * 3}]
    given = [{**row, "segment": ["b"]} for row in given]
    file = parquet(tmp_path, given)
    if suffix == ".jsonl":
        file = tmp_path / "users.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
    if suffix == ".csv":
        file = tmp_path / "users.csv"
        table = [[*HISTORY, "action"], *([json.dumps(value) for value in row.values()] for row in given)]
        with file.open("w", newline="") as lines:
            csv_lines.writer(lines).writerows(table)
    asked = read_asked_users(file, acting(tmp_path / "set"), tmp_path / "beside")
    read = Rows.concatenate(list(open_dataset(asked.folder)))
    assert lists(read.event_columns["action"], read.offsets) == [[2, 0, 3], [], [0, 0, 0]]


def test_event_columns_are_given_by_ids_where_these_mean_nothing(tmp_path):
    file = parquet(tmp_path, [{**HISTORY, "action": [3, None, 0]}])
    asked = read_asked_users(file, acting(tmp_path / "set", values=False), tmp_path / "beside")
    assert open_dataset(asked.folder).read(0).event_columns["action"].tolist() == [3, 0, 0]
    file = parquet(tmp_path, [{**HISTORY, "action": [3, None, 4]}])
    with pytest.raises(DataError, match=r"row 0: action must be ids 0\.\.3 as in the data set, got 4"):
        read_asked_users(file, acting(tmp_path / "set", values=False), tmp_path / "other")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (["view"], "row 1: item and action must be equally long, got 3 and 1; give each item its action, or null"),
        (["view", "sell", None], "row 1: action must be values that the data set knows, got 'sell'; write null"),
        (None, "row 1: action must not be null; write an empty list"),
    ],
    ids=["too-short", "unknown", "null"],
)
def test_event_columns_that_are_wrong_are_refused_by_row(tmp_path, wrong, match):
    file = parquet(tmp_path, [{**row, "segment": ["a"]} for row in (WITH_ACTIONS, {**WITH_ACTIONS, "action": wrong})])
    with pytest.raises(DataError, match=match):
        read_asked_users(file, acting(tmp_path / "set"), tmp_path / "beside")


def test_event_columns_that_are_not_read_are_not_to_be_brought(tmp_path):
    histories = acting(tmp_path / "set")
    without = parquet(tmp_path, [{**HISTORY, "segment": ["a"]}])
    with pytest.raises(DataError, match="or user_id, action, item, segment, timestamp"):
        read_asked_users(without, histories, tmp_path / "beside")
    asked = read_asked_users(without, histories.with_event_columns(()), tmp_path / "beside")
    assert open_dataset(asked.folder).meta.event_columns == {}
    with pytest.raises(DataError, match="rename, add or drop"):
        read_asked_users(parquet(tmp_path, [WITH_ACTIONS]), histories.with_event_columns(()), tmp_path / "other")
