import datetime

import pyarrow as pa
import pytest

from ssd_torchrec.errors import ConfigError
from tests.data.prepare.logs import HEADER, LINES, NOON_S, events, reviews, staged, table, write

THREE = [(7, 30, NOON_S), (8, 20, NOON_S + 1), (7, 30, NOON_S)]
CSV = HEADER + "".join(f"{u},{i},{t}\n" for u, i, t in THREE)
INTER = "user_id:token\titem_id:token\tnote:token_seq\ttimestamp:float\n" + "".join(
    f'{u}\t{i}\ta "b\t{t}\n' for u, i, t in THREE
)
DAT = "".join(f"{u}::{i}::5::{t}\n" for u, i, t in THREE)
OBJECTS = [{"asin": i, "unixReviewTime": t, "text": 'a\n"b",', "reviewerID": u} for u, i, t in THREE]
FORMATS = {
    "log.csv": CSV,
    "log.csv.gz": CSV,
    "crlf.csv": CSV.replace("\n", "\r\n"),
    "bom.csv": "\ufeff" + CSV,
    "no-end.csv": CSV.rstrip("\n"),
    "empty-lines.csv": CSV.replace("\n", "\n\n"),
    "quotes.csv": 'note,user_id,item_id,timestamp\n"a, ""b""\n",7,30,{}\n,"8",20,{}\nc,7,"30",{}\n'.format(
        *(time for _, _, time in THREE)
    ),
    "log.tsv": CSV.replace(",", "\t"),
    "log.txt": CSV.replace(",", "\t"),
    "ratings.dat": DAT,
    "ratings.dat.gz": DAT,
    "log.inter": INTER,
    "log.jsonl": OBJECTS,
    "crlf.jsonl": "".join(f'{{"reviewerID":{u}, "asin":{i}, "unixReviewTime":{t}}}\r\n' for u, i, t in THREE),
    "log.parquet": pa.table(dict(zip(("user_id", "item_id", "timestamp"), zip(*THREE, strict=True), strict=True))),
    "a[1]*? it's.csv": CSV,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_hold_the_same_events(tmp_path, name):
    told, connection = staged(write(tmp_path / name, FORMATS[name]))
    rows = connection.execute("SELECT user_id, item, timestamp, position FROM events ORDER BY position").fetchall()
    assert rows == [(*event, at) for at, event in enumerate(THREE)]
    assert (told.num_events, told.user_type, told.item_type) == (3, "int64", "int64")
    assert told.columns == ("user_id", "item", "timestamp", "position")
    assert told.files == (tmp_path / name,)
    types = connection.execute("SELECT column_type FROM (DESCRIBE events)").fetchall()
    assert types == [("BIGINT",)] * 4


@pytest.mark.parametrize("threads", [1, 4])
def test_positions_follow_the_names_of_files_and_the_order_of_their_lines(tmp_path, threads):
    names, each = ["a.csv", "b/0.csv", "b/1.csv.gz", "b.csv.gz", "c.csv"], 60_000
    for number in (3, 0, 4, 2, 1):  # not in the order of their names
        items = range(number * each, (number + 1) * each)
        write(
            tmp_path / names[number], HEADER + "".join(f"{item % 997},{item},{NOON_S + item % 5}\n" for item in items)
        )
    write(tmp_path / "b2.csv", "")  # as an empty part of a log is
    told, connection = staged(tmp_path, threads=threads)
    assert [str(file.relative_to(tmp_path)) for file in told.files] == [*names[:4], "b2.csv", names[4]]
    total = len(names) * each
    counts = connection.execute("SELECT count(*), count_if(item = position) FROM events").fetchall()
    assert counts == [(total, total)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_positions_hold_in_typed_files_too(tmp_path, kind):
    each = 30_000
    for number in range(3):
        items = range(number * each, (number + 1) * each)
        ids = {"user_id": ["u"] * each, "item_id": items, "timestamp": [NOON_S] * each}
        lines = [{"user_id": "u", "item_id": item, "timestamp": NOON_S} for item in items]
        write(tmp_path / f"{number}.{kind}", pa.table(ids) if kind == "parquet" else lines)
    _, connection = staged(tmp_path, threads=4, user="user_id", item="item_id", timestamp="timestamp")
    assert connection.execute("SELECT count(*) FROM events WHERE item = position").fetchall() == [(3 * each,)]


IDS = {
    "whole": (["1", "-5", "0", "9223372036854775807"], [1, -5, 0, 2**63 - 1]),
    "leading zero": (["1", "007"], ["1", "007"]),
    "sign": (["1", "+7"], ["1", "+7"]),
    "minus zero": (["1", "-0"], ["1", "-0"]),
    "space": (["1", " 7"], ["1", " 7"]),
    "real": (["1", "7.0"], ["1", "7.0"]),
    "power": (["1", "1e3"], ["1", "1e3"]),
    "underscore": (["1", "1_000"], ["1", "1_000"]),
    "beyond int64": (["1", "9223372036854775808"], ["1", "9223372036854775808"]),
    "word": (["1", "é😀"], ["1", "é😀"]),
}


@pytest.mark.parametrize(("given", "expected"), IDS.values(), ids=IDS)
def test_ids_without_a_type_are_whole_numbers_only_if_all_are_written_so(tmp_path, given, expected):
    lines = "".join(f"{text},1,{NOON_S}\n" for text in given)
    told, connection = staged(write(tmp_path / "log.csv", HEADER + lines))
    assert [row[0] for row in connection.execute("SELECT user_id FROM events ORDER BY position").fetchall()] == expected
    assert told.user_type == ("int64" if isinstance(expected[0], int) else "string")
    assert told.item_type == "int64"


def test_one_word_far_behind_any_sample_makes_ids_strings(tmp_path):
    write(tmp_path / "a.csv", HEADER + f"1,2,{NOON_S}\n" * 50_000)
    write(tmp_path / "b.csv", HEADER + f"x,2,{NOON_S}\n")
    told, _ = staged(tmp_path)
    assert (told.user_type, told.item_type) == ("string", "int64")


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.uint64(), pa.int64()])
def test_integers_of_parquet_are_int64(tmp_path, kind):
    told, _ = staged(write(tmp_path / "log.parquet", table(user_id=pa.array([1, 2, 1], kind))))
    assert (told.user_type, told.item_type) == ("int64", "string")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_of_parquet_and_json_stay_strings(tmp_path, kind):
    users = pa.array(["1", "2", "1"]).cast(kind)
    assert events(write(tmp_path / "log.parquet", table(user_id=users)))[1] == ("2", "b", NOON_S)
    lines = reviews(reviewerID=["1", "2", "1"], asin=[7, 8, 9])
    assert events(write(tmp_path / "log.jsonl", lines))[1] == ("2", 8, NOON_S)


INSTANT = datetime.datetime(2016, 3, 9, 12, 0, 0, 999_999)
TIMES = {
    "s": ({}, str(NOON_S)),
    "real": ({}, f"{NOON_S}.999"),
    "power": ({}, "1.4575248e9"),
    "space": ({}, f" {NOON_S}"),
    "ms": ({"time_unit": "ms"}, f"{NOON_S}999"),
    "us": ({"time_unit": "us"}, f"{NOON_S}999999"),
    "iso": ({"time_unit": "iso"}, "2016-03-09 12:00:00"),
    "iso T": ({"time_unit": "iso"}, "2016-03-09T12:00:00.999Z"),
    "iso minutes": ({"time_unit": "iso"}, "2016-03-09 12:00"),
}


@pytest.mark.parametrize(("options", "text"), TIMES.values(), ids=TIMES)
def test_times_become_whole_seconds(tmp_path, options, text):
    assert events(write(tmp_path / "log.csv", f"{HEADER}1,2,{text}\n"), **options) == [(1, 2, NOON_S)]
    assert events(write(tmp_path / "log.jsonl", reviews(unixReviewTime=[text] * 3)), **options)[0][2] == NOON_S


TYPED = {
    "int32": ("s", pa.array([NOON_S] * 3, pa.int32())),
    "uint64 ms": ("ms", pa.array([1000 * NOON_S + 999] * 3, pa.uint64())),
    "double": ("ms", pa.array([1000.0 * NOON_S + 999.5] * 3)),
    "decimal": ("s", pa.array([NOON_S] * 3, pa.decimal128(20, 2))),
    "string": ("s", pa.array([str(NOON_S)] * 3)),
    "iso string": ("iso", pa.array(["2016-03-09 12:00:00"] * 3)),
    "ms": ("s", pa.array([INSTANT] * 3, pa.timestamp("ms"))),
    "us": ("us", pa.array([INSTANT] * 3, pa.timestamp("us"))),
    "ns": ("s", pa.array([NOON_S * 10**9 + 999_999_999] * 3, pa.timestamp("ns"))),
    "ns zone": ("s", pa.array([NOON_S * 10**9 + 999_999_999] * 3, pa.timestamp("ns", "UTC"))),
    "zone": ("iso", pa.array([INSTANT] * 3, pa.timestamp("us", "Asia/Tokyo"))),
}


@pytest.mark.parametrize(("unit", "times"), TYPED.values(), ids=TYPED)
def test_times_of_parquet_become_whole_seconds(tmp_path, unit, times):
    log = write(tmp_path / "log.parquet", table(timestamp=times))
    assert [row[2] for row in events(log, time_unit=unit)] == [NOON_S] * 3


def test_days_of_parquet_begin_at_midnight(tmp_path):
    log = write(tmp_path / "log.parquet", table(timestamp=pa.array([INSTANT.date()] * 3)))
    assert events(log)[0][2] == NOON_S - 12 * 3600


def test_further_columns_are_text_and_null_where_empty(tmp_path):
    options = {"event_columns": ("shop", "seen"), "user_columns": ("home",)}
    csv = write(tmp_path / "log.csv", f"home,{HEADER.strip()},shop,seen\nX,1,2,{NOON_S},007,\nY,1,2,{NOON_S},,true\n")
    assert events(csv, **options) == [(1, 2, NOON_S, "007", None, "X"), (1, 2, NOON_S, None, "true", "Y")]
    typed = table(shop=[1.5, None, 2.0], seen=[True, False, None], home=pa.array(["", "X", None]).dictionary_encode())
    rows = events(write(tmp_path / "log.parquet", typed), **options)
    assert [row[3:] for row in rows] == [("1.5", "true", None), (None, "false", "X"), ("2.0", None, None)]
    lines = reviews(shop=[1, "x", None], seen=[True, 1.5, ""], home=["é", "a/b", "~"])
    rows = events(write(tmp_path / "log.jsonl", lines), **options)
    assert [row[3:] for row in rows] == [("1", "true", "é"), ("x", "1.5", "a/b"), (None, None, "~")]


def test_columns_of_odd_names_are_found(tmp_path):
    names = ('us"er', "it/em~", "the 'time'")
    options = dict(zip(("user", "item", "timestamp"), names, strict=True))
    lines = [dict(zip(names, values, strict=True)) for values in THREE]
    assert events(write(tmp_path / "log.jsonl", lines), **options) == THREE
    columns = dict(zip(names, zip(*THREE, strict=True), strict=True))
    assert events(write(tmp_path / "log.parquet", pa.table(columns)), **options) == THREE
    header = ",".join('"' + name.replace('"', '""') + '"' for name in names)
    assert events(write(tmp_path / "log.csv", header + CSV[len(HEADER) - 1 :]), **options) == THREE


def test_files_without_a_header_line_are_read_by_names_in_order(tmp_path):
    log = write(tmp_path / "log.csv", "5,30,7,1457524800\n")
    assert events(log, columns=("rating", "item_id", "user_id", "timestamp")) == [(7, 30, NOON_S)]
    write(tmp_path / "log.dat", f"7|30|{NOON_S}\n")
    assert events(tmp_path / "log.dat", delimiter="|", columns=("user_id", "item_id", "timestamp")) == THREE[:1]


def test_a_column_may_serve_twice(tmp_path):
    log = write(tmp_path / "log.csv", HEADER + LINES)
    assert events(log, event_columns=("item_id",))[4] == (1, 4, NOON_S + 4, "4")


def test_files_of_one_log_may_have_their_columns_in_another_order_in_parquet(tmp_path):
    write(tmp_path / "a.parquet", table())
    write(tmp_path / "b.parquet", table().select(["timestamp", "item_id", "user_id"]))
    assert len(events(tmp_path)) == 6


def test_names_of_folders_are_no_columns(tmp_path):
    write(tmp_path / "user_id=5" / "part.parquet", table())
    assert [row[0] for row in events(tmp_path)] == [1, 2, 1]


KEPT = {
    "at least": (("r>=4",), [2, 3]),
    "more": (("r>4",), [3]),
    "number": (("r=4",), [2]),
    "word": (("r=good",), [5]),
    "not": (("item_id!=2",), [1, 3, 4, 5]),
    "both": (("r<4.5", "item_id>1"), [2]),
}


@pytest.mark.parametrize(("keep", "items"), KEPT.values(), ids=KEPT)
def test_lines_are_kept_by_conditions_and_numbered_without_the_others(tmp_path, keep, items):
    ratings = {1: "3.5", 2: "4.0", 3: "5", 4: "", 5: "good"}
    lines = "".join(f"1,{item},{NOON_S},{rating}\n" for item, rating in ratings.items())
    _, connection = staged(write(tmp_path / "log.csv", HEADER.strip() + ",r\n" + lines), keep=keep)
    rows = connection.execute("SELECT item, position FROM events").fetchall()
    assert sorted(rows) == list(zip(items, range(len(items)), strict=True))


def test_lines_that_are_left_out_may_break_the_rules(tmp_path):
    log = write(tmp_path / "log.csv", f"{HEADER}x,1,0\n1,2,{NOON_S}\n")
    assert events(log, keep=("timestamp>0",)) == [(1, 2, NOON_S)]


def test_users_have_a_table_of_their_own(tmp_path):
    log = write(tmp_path / "ratings.dat", DAT)
    users = write(tmp_path / "users.dat", "7::F::1::10::48067\n9::M::56::16::70072\n")
    told, connection = staged(log, users=str(users), user_columns=("gender", "zip_code"))
    assert connection.execute("FROM users ORDER BY user_id").fetchall() == [(7, "F", "48067"), (9, "M", "70072")]
    assert told.columns == ("user_id", "item", "timestamp", "position")


def test_ids_of_users_have_the_type_of_the_log(tmp_path):
    log = write(tmp_path / "log.csv", f"{HEADER}x,1,{NOON_S}\n")
    users = write(tmp_path / "users.txt", "user_id\tage\n5\t\nx\t31\nx\t32\n")
    _, connection = staged(log, users=str(users), user_columns=("age",))
    rows = connection.execute("FROM users ORDER BY age NULLS FIRST").fetchall()
    assert rows == [("5", None), ("x", "31"), ("x", "32")]


@pytest.mark.parametrize("name", ["position", "ITEM", "float32_time"])
def test_names_that_the_tables_have_already_are_refused(tmp_path, name):
    with pytest.raises(
        ConfigError, match=rf"must differ from each other .* upper and lower case alike, got \['{name.lower()}'\]"
    ):
        staged(tmp_path, event_columns=(name,))
