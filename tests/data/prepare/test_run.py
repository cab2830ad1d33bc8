import errno
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.prepare.core import Counts
from ssd_torchrec.data.prepare.log import LogConfig
from ssd_torchrec.data.prepare.report import print_outcome
from ssd_torchrec.data.prepare.run import PrepareConfig, prepare
from ssd_torchrec.errors import ConfigError, DataError
from tests.data.prepare.events import events_table, random_events
from tests.data.samples import lists

LOG = LogConfig(user="user_id", item="item", timestamp="timestamp")
CONFIG = PrepareConfig(log=LOG)
SHARED = Path(os.environ.get("SSD_TORCHREC_LOGS", Path(__file__).parents[4] / "shared" / "data"))
PUBLISHED = {"ml-1m": Counts(6040, 3416, 999_611), "beauty": Counts(22_363, 12_101, 198_502)}


@pytest.fixture
def log(tmp_path):
    events = random_events(0, 3000, num_users=40, num_items=600, seconds=500)
    pq.write_table(events.drop_columns("position"), tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def test_a_log_becomes_a_data_set_that_opens(tmp_path, log):
    steps = []
    meta = prepare(log, tmp_path / "set", CONFIG, on_step=steps.append)
    histories = open_dataset(tmp_path / "set")
    assert histories.meta == meta
    assert meta.name == "log"
    assert steps[0].name == "log"
    assert steps[0].counts.events == 3000
    assert [step.name for step in steps[1:-1]] == [f"5-core, round {n}" for n in range(1, len(steps) - 1)]
    assert steps[-1].counts == steps[-2].counts == Counts(meta.num_users, meta.num_items, meta.num_events)
    assert meta.num_events < 3000
    assert meta.lengths["min"] >= 5
    assert sum(rows.num_events for rows in histories) == meta.num_events
    assert np.bincount(np.concatenate([rows.item for rows in histories]))[meta.first_item :].min() >= 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "set"]


def test_the_same_log_gives_the_same_fingerprint_whatever_the_file_and_the_machine(tmp_path, log):
    csv.write_csv(pq.read_table(log), tmp_path / "log.csv")
    configs = {
        log: CONFIG,
        tmp_path / "log.csv": replace(CONFIG, threads=1, memory_limit="64MiB", temporary=str(tmp_path / "elsewhere")),
    }
    prints = {prepare(file, tmp_path / "set", config).fingerprint for file, config in configs.items()}
    assert len(prints) == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []
    for change in ({"k_core": 6}, {"num_oov_buckets": 2}, {"order": "float32-stable"}):
        prints.add(prepare(log, tmp_path / "set", replace(CONFIG, **change)).fingerprint)
    assert len(prints) == 4


def test_further_columns_and_names_reach_the_data_set(tmp_path):
    drawn = random_events(0, 3000, num_users=40, num_items=60, seconds=500)
    users, items, times = (drawn[name].to_pylist() for name in ("user_id", "item", "timestamp"))
    shops = [str(time % 4) for time in times]
    events = events_table([f"u{user}" for user in users], items, times, shop=shops, home=shops)
    pq.write_table(events, tmp_path / "log.parquet")
    log = replace(LOG, event_columns=("shop",), user_columns=("home",))
    meta = prepare(tmp_path / "log.parquet", tmp_path / "set", replace(CONFIG, log=log, name="shops"))
    histories = open_dataset(tmp_path / "set")
    assert (meta.name, meta.event_columns, meta.context) == ("shops", {"shop": 5}, {"home": 4})
    assert histories.values()["shop"].to_pylist() == [None, "0", "1", "2", "3"]
    rows = histories.read(0)
    assert (rows.event_columns["shop"] == 1 + rows.timestamp % 4).all()
    bags = [sorted({t % 4 for t in row}) for row in lists(rows.timestamp, rows.offsets)]
    assert lists(rows.context["home"].values, rows.context["home"].offsets) == bags
    raw = histories.raw_user_ids(0).to_pylist()
    assert raw == sorted(raw)
    assert rows.user_id.tolist() == list(range(len(raw)))


@pytest.mark.parametrize("columns", [(), ("shop", "home")], ids=["none", "two"])
def test_what_to_do_next_names_the_event_columns(columns, tmp_path, capsys):
    users, items, times = ([n % 2 for n in range(6)], [1] * 6, [10**9 + n for n in range(6)])
    pq.write_table(events_table(users, items, times, shop=["a"] * 6, home=["b"] * 6), tmp_path / "log.parquet")
    config = replace(CONFIG, log=replace(LOG, event_columns=columns), k_core=0)
    print_outcome(prepare(tmp_path / "log.parquet", tmp_path / "set", config), tmp_path / "set")
    told = " --data.event-columns shop home" if columns else ""
    assert capsys.readouterr().out.endswith(f"--data.path {tmp_path / 'set'}{told}\n")


UNITS = {"s": 1, "ms": 1000, "us": 1_000_000}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("unit", UNITS)
def test_float32_order_is_that_of_the_numbers_in_the_log(tmp_path, unit, suffix):
    drawn = random_events(0, 3000, num_users=5, num_items=30, seconds=10**6 * 3000)
    numbers = 10**9 * UNITS[unit] + drawn["timestamp"].to_numpy() % (10**6 * 3000) * UNITS[unit] // 10**6
    told = drawn.drop_columns("position").set_column(2, "timestamp", pa.array(numbers))
    (csv.write_csv if suffix == "csv" else pq.write_table)(told, tmp_path / f"log.{suffix}")
    config = replace(CONFIG, log=replace(LOG, time_unit=unit), order="float32-stable", k_core=0)
    prepare(tmp_path / f"log.{suffix}", tmp_path / "set", config)
    histories = open_dataset(tmp_path / "set")
    order = np.lexsort((numbers.astype(np.float32), drawn["user_id"].to_numpy()))
    items = np.concatenate([histories.vocabulary().ids_of(rows.item).to_numpy() for rows in histories])
    assert items.tolist() == drawn["item"].to_numpy()[order].tolist()


def test_a_core_that_is_empty_leaves_the_old_data_set(tmp_path, log):
    kept = prepare(log, tmp_path / "set", CONFIG).fingerprint
    with pytest.raises(DataError, match=r"the 500-core of a log must hold something, got nothing of 40 users"):
        prepare(log, tmp_path / "set", replace(CONFIG, k_core=500))
    assert open_dataset(tmp_path / "set").fingerprint == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "set"]


REFUSED = {
    "unit": ({"memory_limit": "2 gigs"}, r"memory_limit must be a number and its unit, got '2 gigs'; write 2GiB"),
    "core": ({"k_core": -1}, "k_core must be at least 0, got -1"),
    "buckets": ({"num_oov_buckets": 0}, "num_oov_buckets must be at least 1, got 0"),
    "threads": ({"threads": -2}, "threads must be at least 0, got -2"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)


def test_what_is_no_data_set_is_not_replaced(tmp_path, log):
    (tmp_path / "letters").mkdir()
    with pytest.raises(DataError, match=r"letters must be a data set to be replaced, or not be there"):
        prepare(log, tmp_path / "letters", CONFIG)


@pytest.mark.parametrize("name", ["item", "raw_user_id", "twice"])
def test_names_that_a_data_set_cannot_have_are_refused_before_the_log_is_read(tmp_path, name):
    config = replace(LOG, event_columns=(name,), user_columns=("twice",))
    with pytest.raises(DataError, match=rf"names of columns must differ .* got \['{name}'\] twice"):
        prepare(tmp_path / "no-log.parquet", tmp_path / "set", replace(CONFIG, log=config))


def test_a_place_that_cannot_be_written_is_named(tmp_path, log):
    with pytest.raises(DataError, match=r"log\.parquet.* must take what prepare writes, but .*File exists"):
        prepare(log, log / "set", CONFIG)


def test_memory_that_does_not_suffice_is_named(tmp_path, log):
    with pytest.raises(ConfigError, match=r"memory_limit must suffice for this log, 1MiB did not: .*; raise it"):
        prepare(log, tmp_path / "set", replace(CONFIG, memory_limit="1MiB"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet"]


def test_a_database_that_finds_no_room_leaves_the_old_data_set(tmp_path, log):
    kept = prepare(log, tmp_path / "set", CONFIG).fingerprint
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, {resource.RLIM_INFINITY}))"
    words = ["prepare", str(log), "--output", str(tmp_path / "set"), "--k-core", "4", "--item", "item"]
    code = f"{limited}; from ssd_torchrec.__main__ import main; raise SystemExit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "DataError:" in done.stderr
    assert "must take what prepare writes, but" in done.stderr
    assert open_dataset(tmp_path / "set").fingerprint == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "set"]


def test_a_disk_that_fills_while_rows_are_written_leaves_the_old_data_set(tmp_path, log, monkeypatch):
    kept = prepare(log, tmp_path / "set", CONFIG).fingerprint

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(DataError, match=r"set and .* must take what prepare writes, but .*No space left on device"):
        prepare(log, tmp_path / "set", replace(CONFIG, k_core=4))
    monkeypatch.undo()
    assert open_dataset(tmp_path / "set").fingerprint == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "set"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(tmp_path, name):
    file = SHARED / f"{name}.parquet"
    if not file.exists():
        pytest.skip(f"no {file}: SSD_TORCHREC_LOGS names no folder with the logs of the papers")
    steps = []
    config = PrepareConfig(log=LogConfig(user="user_id", item="item_id", timestamp="timestamp"))
    meta = prepare(file, tmp_path / "set", config, on_step=steps.append)
    assert [step.counts for step in steps] == [PUBLISHED[name]] * 2  # they are 5-cores already: no round
    told = pq.read_table(file).sort_by([("user_id", "ascending"), ("seq_pos", "ascending")])
    histories = open_dataset(tmp_path / "set")
    rows = [(histories.vocabulary().ids_of(part.item), part.timestamp) for part in histories]
    assert np.array_equal(np.concatenate([item.to_numpy() for item, _ in rows]), told["item_id"].to_numpy())
    assert np.array_equal(np.concatenate([time for _, time in rows]), told["timestamp"].to_numpy())
    assert meta.num_users == PUBLISHED[name].users
