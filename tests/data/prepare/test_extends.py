"""A data set that goes on from another: what has an id keeps it."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.prepare.log import LogConfig
from ssd_torchrec.data.prepare.run import PrepareConfig, prepare
from ssd_torchrec.errors import ConfigError, DataError

CONFIG = PrepareConfig(log=LogConfig(item="item"), k_core=0, num_oov_buckets=3)
WITH_COLUMNS = replace(CONFIG, log=replace(CONFIG.log, event_columns=("action",), user_columns=("home",)))


def write_log(file, items, actions=None, homes=None):
    n = len(items)
    events = {"user_id": np.arange(n) % 2, "item": items, "timestamp": 10**9 + np.arange(n)}
    events |= {name: values for name, values in {"action": actions, "home": homes}.items() if values}
    pq.write_table(pa.table(events), file)
    return file


def raw_events(folder):
    """(user, time, raw item) of every event, from the rows and the vocabulary."""
    histories = open_dataset(folder)
    vocabulary, events = histories.vocabulary(), []
    for rows in histories:
        user = np.repeat(rows.user_id, rows.lengths)
        raw = vocabulary.ids_of(rows.item).to_pylist()
        events += zip(user.tolist(), rows.timestamp.tolist(), raw, strict=True)
    return sorted(events)


@pytest.mark.parametrize("name", [int, str], ids=["int64", "strings"])
def test_known_items_keep_their_rows_and_new_ones_come_after(name, tmp_path):
    first = [*map(name, [50, 40, 30, 50])]
    second = [*map(name, [35, 50, 10, 60, 35])]  # 40 and 30 do not occur any more, 10 is less than all before
    old = prepare(write_log(tmp_path / "1.parquet", first), tmp_path / "old", CONFIG)
    config = replace(CONFIG, extends=str(tmp_path / "old"), num_oov_buckets=16)
    new = prepare(write_log(tmp_path / "2.parquet", second), tmp_path / "new", config)
    before, after = (open_dataset(tmp_path / folder).vocabulary() for folder in ("old", "new"))
    assert after.ids.to_pylist() == [*map(name, [30, 40, 50, 10, 35, 60])]
    assert after.num_oov_buckets == 3
    assert (after.rows_of(before.ids) == before.rows_of(before.ids)).all()
    assert after.hash_of_first(len(before)) == old.item_vocabulary_hash
    assert new.item_vocabulary_hash == after.content_hash != old.item_vocabulary_hash
    assert new.num_items == 6
    assert raw_events(tmp_path / "new") == sorted((n % 2, 10**9 + n, item) for n, item in enumerate(second))


def test_a_log_without_anything_new_has_the_same_vocabulary_whatever_it_lacks(tmp_path):
    old = prepare(write_log(tmp_path / "1.parquet", [5, 6, 7]), tmp_path / "old", CONFIG)
    config = replace(CONFIG, extends=str(tmp_path / "old"))
    new = prepare(write_log(tmp_path / "2.parquet", [7, 7]), tmp_path / "new", config)
    assert (new.item_vocabulary_hash, new.num_items, new.num_events) == (old.item_vocabulary_hash, 3, 2)


def test_a_data_set_may_be_extended_in_its_own_place_and_again(tmp_path):
    config = CONFIG
    for day, items in enumerate([[5, 9], [7, 9], [6, 5]]):
        prepare(write_log(tmp_path / f"{day}.parquet", items), tmp_path / "set", config)
        config = replace(CONFIG, extends=str(tmp_path / "set"))
    assert open_dataset(tmp_path / "set").vocabulary().ids.to_pylist() == [5, 9, 7, 6]
    assert raw_events(tmp_path / "set") == [(0, 10**9, 6), (1, 10**9 + 1, 5)]


def test_values_of_further_columns_keep_their_ids(tmp_path):
    log = write_log(tmp_path / "1.parquet", [1, 1, 1], ["view", None, "buy"], ["rome", "oslo", "rome"])
    prepare(log, tmp_path / "old", WITH_COLUMNS)
    log = write_log(tmp_path / "2.parquet", [1, 1, 2], ["add", "view", None], ["oslo", "bonn", "oslo"])
    meta = prepare(log, tmp_path / "new", replace(WITH_COLUMNS, extends=str(tmp_path / "old")))
    histories = open_dataset(tmp_path / "new")
    values = {name: of.to_pylist() for name, of in histories.values().items()}
    assert values == {"home": ["oslo", "rome", "bonn"], "action": [None, "buy", "view", "add"]}
    assert (meta.context, meta.event_columns) == ({"home": 3}, {"action": 4})
    rows = histories.read(0)
    assert rows.event_columns["action"].tolist() == [3, 0, 2]
    assert rows.context["home"].values.tolist() == [0, 2]


def test_text_without_types_is_read_as_the_known_items_are(tmp_path):
    prepare(write_log(tmp_path / "1.parquet", ["7", "x"]), tmp_path / "old", CONFIG)
    csv.write_csv(pa.table({"user_id": [1, 1], "item": [7, 8], "timestamp": [10**9, 10**9]}), tmp_path / "2.csv")
    prepare(tmp_path / "2.csv", tmp_path / "new", replace(CONFIG, extends=str(tmp_path / "old")))
    assert open_dataset(tmp_path / "new").vocabulary().ids.to_pylist() == ["7", "x", "8"]


def test_the_k_core_counts_this_log_alone(tmp_path):
    prepare(write_log(tmp_path / "1.parquet", [1, 2, 3] * 4), tmp_path / "old", CONFIG)
    config = replace(CONFIG, k_core=2, extends=str(tmp_path / "old"))
    meta = prepare(write_log(tmp_path / "2.parquet", [1, 1, 1, 1, 3, 9]), tmp_path / "new", config)
    assert (meta.num_items, meta.num_events) == (3, 4)
    assert {event[2] for event in raw_events(tmp_path / "new")} == {1}


def test_items_of_another_type_are_refused_by_the_first_of_them(tmp_path):
    prepare(write_log(tmp_path / "1.parquet", [7, 8]), tmp_path / "old", CONFIG)
    csv.write_csv(pa.table({"user_id": [1, 1], "item": ["7", "x"], "timestamp": [10**9, 10**9]}), tmp_path / "2.csv")
    with pytest.raises(DataError, match=r"item must be whole numbers as in the data set that is extended, got .x"):
        prepare(tmp_path / "2.csv", tmp_path / "new", replace(CONFIG, extends=str(tmp_path / "old")))
    assert not (tmp_path / "new").exists()


def test_other_further_columns_are_refused_before_the_log_is_read(tmp_path):
    prepare(write_log(tmp_path / "1.parquet", [7, 8], ["view", "buy"], ["a", "b"]), tmp_path / "old", WITH_COLUMNS)
    with pytest.raises(ConfigError, match=r"same further columns, \[\], got \['action', 'home'\]; give those"):
        prepare(tmp_path / "absent.parquet", tmp_path / "new", replace(CONFIG, extends=str(tmp_path / "old")))


def test_what_is_no_data_set_cannot_be_extended(tmp_path):
    with pytest.raises(DataError, match=r"nowhere"):
        prepare(tmp_path / "absent.parquet", tmp_path / "new", replace(CONFIG, extends=str(tmp_path / "nowhere")))
