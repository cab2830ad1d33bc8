"""The engine spark: from the same log the data set that duckdb makes, and the same refusals."""

import datetime as dt
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssd_torchrec.data.prepare import spark as spark_module
from ssd_torchrec.data.prepare import spark_log
from ssd_torchrec.data.prepare.log import LogConfig
from ssd_torchrec.data.prepare.run import PrepareConfig, prepare
from ssd_torchrec.data.prepare.spark_log import read_log
from ssd_torchrec.data.prepare.stage import stage
from ssd_torchrec.data.writer import DatasetWriter
from ssd_torchrec.errors import ConfigError, DataError
from tests.data.prepare.events import random_events
from tests.data.prepare.logs import NOON_S, table, write

SETTINGS = {
    # tests are over before better code is compiled
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark.master": "local[2]",
    "spark.sql.adaptive.enabled": "false",  # fewer jobs; it is on in one test
    "spark.sql.shuffle.partitions": "3",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
SPARK = PrepareConfig(engine="spark")


@pytest.fixture(scope="module")
def spark():
    """pyspark.sql, which starts sessions with SETTINGS."""
    sql = pytest.importorskip("pyspark.sql", reason="PySpark is an extra: ssd-torchrec[spark]")
    if not (shutil.which("java") or "JAVA_HOME" in os.environ):
        pytest.skip("Spark needs Java")
    words = " ".join(f"--conf '{name}={value}'" for name, value in SETTINGS.items())
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("PYSPARK_SUBMIT_ARGS", f"{words} pyspark-shell")
        yield sql


@pytest.fixture(scope="module")
def session(spark):
    started = spark.SparkSession.builder.getOrCreate()
    yield started
    started.stop()


@pytest.fixture
def set_for_now(session):
    """Settings that the session has until the test ends."""
    before = {}

    def to(**settings):
        for name, value in settings.items():
            name = f"spark.sql.{name.replace('__', '.')}"
            before[name] = session.conf.get(name)
            session.conf.set(name, value)

    yield to
    for name, value in before.items():
        session.conf.set(name, value)


def test_a_session_is_started_for_as_long_as_it_takes(tmp_path, spark, monkeypatch):  # before others start one
    monkeypatch.chdir(tmp_path)
    log = write(tmp_path / "log.parquet", table())
    meta = prepare(log, "set", replace(SPARK, k_core=0))
    assert spark.SparkSession.getActiveSession() is None
    assert (meta.name, meta.num_users, meta.num_items, meta.num_events) == ("log", 2, 3, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "set"]


def same_by_both(log, folder, config):
    """The meta of a data set that both engines make alike, step by step."""
    there, steps = sorted(path.name for path in folder.iterdir()), {"duckdb": [], "spark": []}
    metas = [
        prepare(log, folder / engine, replace(config, engine=engine), on_step=told.append)
        for engine, told in steps.items()
    ]
    assert metas[0] == metas[1]
    assert [(step.name, step.counts) for step in steps["duckdb"]] == [
        (step.name, step.counts) for step in steps["spark"]
    ]
    for engine in steps:
        shutil.rmtree(folder / engine)
    assert sorted(path.name for path in folder.iterdir()) == there
    return metas[0]


def drawn(seed, count=3000, num_users=40, num_items=300, seconds=50):
    """Skewed events at few different times, of which some items and users are rare."""
    return random_events(seed, count, num_users, num_items, seconds).drop_columns("position")


FOREIGN = ["z", "Ä", "é", "東京", "\uffee", "😀", "a b", "'", "\\", '"', "{x}", "\u0130", "\x7f"]  # in no order


def foreign(numbers):
    """Names whose order in UTF-8 is neither that of UTF-16 nor that of any language."""
    return pa.array([f"{FOREIGN[n % len(FOREIGN)]}{n}" for n in numbers.to_pylist()])


def typed(log):
    """More columns, of every type that a further column can have; with nulls."""
    at = np.arange(len(log))
    days = [dt.date(2020, 1, 1) + dt.timedelta(days=int(n % 5)) for n in at]
    clocks = [dt.datetime(2020, 1, 1, 12, 0, 0, 250_000 * int(n % 3)) for n in at]
    columns = {
        "name": foreign(pa.array(at % 20)),
        "blank": pa.array(["", "x", None] * (len(log) // 3)),
        "whole": pa.array(at % 4 - 2, pa.int16()),
        "real": pa.array(at % 9 / 8 - 0.5),
        "float": pa.array((at % 7 / 10).astype(np.float32)),
        "decimal": pa.array([Decimal(int(n % 4)) / 4 for n in at], pa.decimal128(5, 2)),
        "truth": pa.array(at % 2 == 0),
        "day": pa.array(days),
        "clock": pa.array(clocks, pa.timestamp("us")),
        "group": foreign(pa.array(at % 3)).dictionary_encode(),
        "Whole": pa.array(at),
    }
    for name, values in columns.items():
        log = log.append_column(name, values)
    return log


def test_the_core_of_a_log_of_files_with_columns_of_all_types(tmp_path, session, set_for_now):
    set_for_now(session__timeZone="America/New_York", ansi__enabled="true")
    log = typed(drawn(0, num_users=100, num_items=60))
    log = log.set_column(2, "timestamp", log["timestamp"].cast(pa.timestamp("s")).cast(pa.timestamp("ms")))
    names = ["b.parquet", "a-b.parquet", "a/ä ö[1].parquet", "a/{x} %20.pq", "_no/c.parquet", "c.parquet"]
    for number, name in enumerate(names):
        write(tmp_path / "log" / name, log[500 * number : 500 * (number + 1)])
    config = LogConfig(
        item="item",
        event_columns=("name", "real", "decimal", "clock"),
        user_columns=("whole", "float", "truth", "day", "blank", "group"),
        keep=("truth=true", "real>-0.4", "name!=Ä1", "whole<=1"),
    )
    meta = same_by_both(tmp_path / "log", tmp_path, PrepareConfig(log=config))
    assert 5 <= meta.lengths["min"] < meta.lengths["max"]
    assert meta.num_items > 50


def test_strings_in_order_of_their_bytes_a_table_of_users_and_float32_times(tmp_path, session, monkeypatch):
    monkeypatch.setattr(spark_module, "_EVENTS_AT_ONCE", 100)
    numbers = drawn(1)
    users = foreign(numbers["user_id"])
    times = pa.array(10**12 + 7001 * np.random.default_rng(0).integers(0, 10**6, len(numbers)))
    log = pa.table({"who": users, "item_id": foreign(numbers["item"]), "timestamp": times})
    known = [*users.unique().to_pylist()[3:], users[5].as_py(), "nobody"]
    ages = [None if n == 4 else str(n % 6) for n in range(len(known))]
    write(tmp_path / "log.parquet", log)
    homes = foreign(pa.array(range(len(known))))
    write(tmp_path / "users.parquet", pa.table({"who": known, "age": ages, "home": homes}))
    told = LogConfig(user="who", time_unit="ms", users=str(tmp_path / "users.parquet"), user_columns=("age", "home"))
    config = PrepareConfig(log=told, k_core=0, order="float32-stable", num_oov_buckets=3, name="foreign")
    meta = same_by_both(tmp_path / "log.parquet", tmp_path, config)
    assert meta.raw_user_type == "string"
    assert meta.num_events == 3000
    assert meta.gaps_s["p50"] > 0
    assert meta.context == {"age": 6, "home": len(known) - 1}


def test_rounds_that_shuffle_into_checkpoints_and_blocks_of_few_users(tmp_path, session, set_for_now, monkeypatch):
    set_for_now(ansi__enabled="false", adaptive__enabled="true")
    monkeypatch.setattr(spark_module, "_SENT_WHOLE", 0)
    monkeypatch.setattr(spark_module, "_EVENTS_AT_ONCE", 100)
    monkeypatch.setattr(spark_module, "_NAMES_AT_ONCE", 7)
    chain = [(n, m) for n in range(4) for m in (n, n + 1)] + [(9, 8), (9, 9), (8, 8), (8, 9)]
    users, items = (np.array([pair[at] for pair in chain * 20]) for at in (0, 1))
    repeated = pa.table({"user_id": users, "item": items % 7, "timestamp": [NOON_S] * len(users)})
    log = pa.concat_tables([drawn(2, 1500).cast(repeated.schema), repeated])
    write(tmp_path / "log.parquet", log)
    session.sparkContext.setCheckpointDir(str(tmp_path / "checkpoints"))
    try:
        same_by_both(tmp_path / "log.parquet", tmp_path, PrepareConfig(log=LogConfig(item="item"), k_core=12))
    finally:
        session.sparkContext._jsc.sc().setCheckpointDir(None)
    assert [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()] == []
    assert dict(session.sparkContext._jsc.getPersistentRDDs()) == {}


def test_what_is_known_keeps_its_ids(tmp_path, session):
    logs = [drawn(seed, 1500, num_items=150 * (1 + seed)) for seed in (0, 1)]
    for name, log in zip(("old", "new"), logs, strict=True):
        colours = foreign(pa.array((log["item"].to_numpy() - 10**12) // 3 % 30))
        log = log.append_column("colour", colours).append_column("home", colours)
        write(tmp_path / f"{name}.parquet", log)
    config = PrepareConfig(log=LogConfig(item="item", event_columns=("colour",), user_columns=("home",)), k_core=2)
    old = prepare(tmp_path / "old.parquet", tmp_path / "old", replace(config, num_oov_buckets=4))
    meta = same_by_both(tmp_path / "new.parquet", tmp_path, replace(config, extends=str(tmp_path / "old")))
    assert meta.num_items > old.num_items
    assert meta.num_oov_buckets == 4


def read(log, session, **options):
    return read_log(session, str(log), LogConfig(**options), float32_time=False, item_type=None)


MOMENTS = [dt.datetime(1980, 1, 1), dt.datetime(2016, 3, 9, 12, 30, 59, 999_999), dt.datetime(2099, 12, 31, 23, 59, 59)]
IN_S = [315_532_800, 1_457_526_659, 4_102_444_799]
TIMES = {
    "seconds": (pa.array(IN_S), "s"),
    "32 bits": (pa.array(IN_S, pa.uint32()), "s"),
    "64 bits without a sign": (pa.array(IN_S, pa.uint64()), "s"),
    "real": (pa.array([IN_S[0], IN_S[1] + 0.75, IN_S[2] + 0.5]), "s"),
    "milliseconds": (pa.array([1000 * second + 999 for second in IN_S]), "ms"),
    "microseconds as text": (pa.array([f" {second}999999" for second in IN_S]), "us"),
    "numbers as text": (pa.array([f"{IN_S[0]}.0", "1.457526659e9", f"+{IN_S[2]}.9"]), "s"),
    "dates": (pa.array([moment.date() for moment in MOMENTS]), "s"),
    "clocks": (pa.array(MOMENTS, pa.timestamp("us")), "s"),
    "moments": (pa.array(MOMENTS, pa.timestamp("ms", "UTC")), "s"),
    "iso": (pa.array(["1980-01-01", "2016-03-09T12:30:59.9999999Z", "2099-12-31 23:59:59"]), "iso"),
}


def test_times_of_every_type_are_taken_as_by_duckdb(tmp_path, session, set_for_now):
    set_for_now(session__timeZone="Asia/Kathmandu")
    columns = {name.replace(" ", "_"): values for name, (values, _) in TIMES.items()}
    log = write(tmp_path / "log.parquet", table(**columns))
    source = spark_log._open(session, str(log), "", "auto", [*columns])
    units = dict(zip(columns, (unit for _, unit in TIMES.values()), strict=True))
    seconds = {name: spark_log._as_seconds(source.columns[name], unit) for name, unit in units.items()}
    reals = [spark_log._as_float32(source.columns[name], unit, seconds[name]) for name, unit in units.items()]
    told = source.lines.orderBy("row").selectExpr(*seconds.values(), *reals).collect()
    for at, (name, unit) in enumerate(units.items()):
        connection = duckdb.connect()
        stage(connection, log, LogConfig(timestamp=name, time_unit=unit), float32_time=True)
        by_duckdb = connection.execute("SELECT timestamp, float32_time FROM events ORDER BY position").fetchall()
        assert [(line[at], line[len(units) + at]) for line in told] == by_duckdb, name


IDS = "user_id must be whole numbers or strings, got "
LATE = ("timestamp", "s", 10**3 * NOON_S)
REFUSED = {
    "column": (table(user_id=None), {}, ": must have a column user_id, got item_id, timestamp; correct the option .*"),
    "empty": (table()[:0], {}, ": must hold rows, got none; correct the path"),
    "real ids": (table(user_id=[1.0, 2.0, None]), {}, f": {IDS}double; cast it, dropping rows without an id first"),
    "null": (
        table(user_id=[1, 2, None]),
        {},
        ", row 2: user_id must not be null or empty, got nothing; drop the row",
    ),
    "empty ids": (
        table(item_id=["a", "", ""]),
        {},
        ", row 1: item_id must not be null or empty, got nothing and 1 more rows like it; drop the row",
    ),
    "unsigned": (
        table(user_id=pa.array([1, 2, 2**63], pa.uint64())),
        {},
        ", row 2: user_id must fit into 64 bits with a sign, got '9223372036854775808'; write the ids as strings",
    ),
    "bytes": (
        table(item_id=pa.array([b"a", b"b", b"\xff"], pa.binary()).view(pa.string())),
        {},
        ", row 2: item_id must be UTF-8 text, got '.'; write it again",
    ),
    "nan": (
        table(timestamp=[float(NOON_S), float("nan"), 1.0]),
        {},
        ", row 1: timestamp must be numbers of s since 1970, got 'NaN'; correct the time or drop the row",
    ),
    "unit": (
        table(timestamp=[NOON_S, 1000 * NOON_S, 1000 * NOON_S]),
        {},
        ", row 1: timestamp must fall into 1980..2100 as numbers of s since 1970, got '1457524800000' and 1 more rows "
        "like it; in ms it is 2016-03-09: give --time-unit ms",
    ),
    "text": (
        table(timestamp=[str(NOON_S), "0x56e0", "5d"]),
        {},
        ", row 1: timestamp must be numbers of s since 1970, got '0x56e0' and 1 more rows like it; correct .*",
    ),
    "iso": (
        table(timestamp=["2016-03-09", "2016-02-30", "2016-03-09 12:00:00+02:00"]),
        {"time_unit": "iso"},
        ", row 1: timestamp must be dates such as .* in UTC, got '2016-02-30' and 1 more rows like it; write it .*",
    ),
    "bool time": (table(timestamp=[True] * 3), {}, ": timestamp must be numbers of s since 1970, got boolean; cast it"),
    "lists": (
        table(tags=[["a"], ["b"], []]),
        {"event_columns": ("tags",)},
        ": tags must hold one value a row, got array<string>; cast it or leave it out",
    ),
    "long reals": (
        table(price=[0.5, 1e-4, float("inf")]),
        {"event_columns": ("price",)},
        ", row 1: price must lie within -1000..1000 and have at most 3 decimals, as categories, got '1.0E-4' and 1 "
        "more rows like it; cast it to strings or leave it out",
    ),
    "long decimals": (
        table(price=pa.array([Decimal(1)] * 3, pa.decimal128(20, 10))),
        {"user_columns": ("price",)},
        r": price must have at most 6 decimals, got decimal\(20,10\); cast it",
    ),
    "moments": (
        table(seen=pa.array([NOON_S] * 3, pa.timestamp("s", "UTC"))),
        {"event_columns": ("seen",)},
        ": seen must be the same text in every time zone, got timestamp; cast it to strings or dates, or leave it out",
    ),
    "none kept": (table(), {"keep": ("user_id>5",)}, ": must hold rows that --keep keeps, got none of 3; loosen .*"),
    "kept": (
        table(item_id=["", "", "b"]),
        {"keep": ("user_id=2",)},
        ", row 1: item_id must not be null or empty, got nothing; drop the row",
    ),
    "no parquet": (
        b"user_id,item_id",
        {},
        " must be Parquet that Spark reads, but .*log.parquet.*; correct the path.*",
    ),
}


@pytest.mark.parametrize(("content", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_logs_are_refused(tmp_path, session, content, options, message):
    log = write(tmp_path / "log.parquet", content)
    with pytest.raises(DataError) as error:
        read(log, session, **options)
    told = str(error.value).replace(f"{tmp_path}/", "")
    assert re.fullmatch(f"log.parquet{message}", told), told


def test_files_that_differ_are_named(tmp_path, session):
    log = tmp_path / "log"
    write(log / "a.parquet", table(shop=["x"] * 3))
    other = write(log / "b 1.parquet", table(shop=["x", "", "y"]))
    read(log, session, event_columns=("shop",))
    columns = {"a column": (table(), r"/b 1.parquet: must have a column shop, got user_id, item_id, timestamp; .*")}
    columns["no value"] = (table(shop=pa.array([None] * 3, pa.string())), None)
    columns["a type"] = (table(shop=[1, 2, 3]), r" must be Parquet that Spark reads, but .*b%201.parquet.*shop.*; .*")
    columns["an id"] = (
        table(shop=["x"] * 3, user_id=[None, 1, None]),
        r"/b 1.parquet, row 0: user_id must not be null or empty, got nothing and 1 more rows like it; drop the row",
    )
    for content, message in columns.values():
        write(other, content)
        if message is None:
            read(log, session, event_columns=("shop",))
            continue
        with pytest.raises(DataError) as error:
            read(log, session, event_columns=("shop",))
        assert re.fullmatch(f"{log}{message}", str(error.value)), error.value


def test_pages_that_are_corrupt_are_refused(tmp_path, session):
    log = write(tmp_path / "log.parquet", table())
    whole = log.read_bytes()
    page = pq.read_metadata(log).row_group(1).column(1)
    start = page.dictionary_page_offset or page.data_page_offset
    write(log, whole[:start] + b"\xff" * 20 + whole[start + 20 :])
    with pytest.raises(DataError, match=r"log.parquet must be Parquet that Spark reads, but .*[a-z]+.*; correct"):
        read(log, session)


def test_what_is_no_log_is_refused(tmp_path, session):
    with pytest.raises(
        DataError, match=r"nowhere must be Parquet that Spark reads, but Path does not exist: .*nowhere;"
    ):
        read(tmp_path / "nowhere", session)
    (tmp_path / "log").mkdir()
    with pytest.raises(DataError, match=r"log must hold Parquet files, got none; correct the path or --files"):
        read(tmp_path / "log", session)
    write(tmp_path / "log/a.parquet", table())
    write(tmp_path / "log/read.me", table(user_id=[7, 8, 9]))
    with pytest.raises(
        DataError, match=r"log must hold Parquet files for the engine spark, got .*/log/read.me; choose"
    ):
        read(tmp_path / "log", session)
    assert read(tmp_path / "log", session, files="*.parquet").num_events == 3
    assert read(tmp_path / "log", session, format="parquet").num_events == 6


def test_tables_of_users_are_refused(tmp_path, session):
    log = write(tmp_path / "log.parquet", table())
    users = write(tmp_path / "users.parquet", pa.table({"user_id": ["1"], "age": [5]}))
    with pytest.raises(
        DataError, match=r"users.parquet, row 0: user_id must be whole numbers as in the log, got '1'; "
    ):
        read(log, session, users=str(users), user_columns=("age",))
    with pytest.raises(DataError, match=r"users.parquet: must have a column home, got user_id, age"):
        read(log, session, users=str(users), user_columns=("home",))


OPTIONS = {
    "format": (LogConfig(format="csv"), "the engine spark reads Parquet, got the format csv; convert the log, or use "),
    "delimiter": (LogConfig(delimiter=";"), "delimiter is for logs of text, the engine spark reads Parquet; leave it"),
    "columns": (LogConfig(columns=("a", "b")), "columns is for logs of text"),
    "users": (LogConfig(columns_of_users=("a", "b")), "columns_of_users is for logs of text"),
}


@pytest.mark.parametrize(("log", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_other_formats_are_refused(session, log, message):
    with pytest.raises(ConfigError, match=message):
        read_log(session, "nowhere.parquet", log, float32_time=False, item_type=None)


@pytest.mark.parametrize("change", [{"memory_limit": "2GiB"}, {"threads": 2}, {"temporary": "there"}])
def test_settings_of_duckdb_are_refused(change):
    with pytest.raises(ConfigError, match=rf"{next(iter(change))} is for the engine duckdb, Spark has settings of its"):
        replace(SPARK, **change)


def test_a_failure_leaves_the_old_data_set_and_nothing_else(tmp_path, session, monkeypatch):
    log = write(tmp_path / "log.parquet", drawn(0, 400, num_items=30).append_column("blank", pa.array([""] * 400)))
    config = replace(SPARK, k_core=0, log=LogConfig(item="item"))
    kept = prepare(log, tmp_path / "set", replace(config, engine="duckdb"))
    empty = r"the 500-core of a log must hold something, got nothing of .*; round 1: 0 users, 0 items, 0 interactions;"
    with pytest.raises(DataError, match=empty):
        prepare(log, tmp_path / "set", replace(config, k_core=500))
    blank = replace(config, log=LogConfig(item="item", user_columns=("blank",)))
    with pytest.raises(DataError, match=r"column blank must hold a value for some event or user that is left"):
        prepare(log, tmp_path / "set", blank)
    monkeypatch.setattr(DatasetWriter, "append", lambda *_: session.sql("SELECT raise_error('lost')").collect())
    with pytest.raises(ConfigError, match=r"Spark must last until the data set is made, but .*lost.*; look into"):
        prepare(log, tmp_path / "set", config)
    assert kept.fingerprint in (tmp_path / "set/meta.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "set"]
    assert dict(session.sparkContext._jsc.getPersistentRDDs()) == {}
    assert session.conf.get("spark.sql.caseSensitive") == "false"


def test_a_machine_without_java_is_told_what_to_install(tmp_path, spark):
    words = [
        sys.executable,
        "-m",
        "ssd_torchrec",
        "prepare",
        "log",
        "--output",
        str(tmp_path / "set"),
        "--engine=spark",
    ]
    environment = os.environ | {"JAVA_HOME": str(tmp_path / "no-java")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ConfigError: the engine spark needs a Spark that starts, but " in done.stderr
    assert "install Java (17 suits every Spark from 3.5)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_pyspark_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    with pytest.raises(ConfigError, match=r"the engine spark needs PySpark, but .*; install ssd-torchrec\[spark\], or"):
        prepare(tmp_path / "log.parquet", tmp_path / "set", SPARK)
    assert list(tmp_path.iterdir()) == []
