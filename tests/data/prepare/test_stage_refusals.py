"""Bad logs: each is refused with its place, what must hold, what came and the mend."""

import gzip
import re
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssd_torchrec.data.prepare.log import LogConfig
from ssd_torchrec.data.prepare.stage import stage
from ssd_torchrec.errors import DataError
from tests.data.prepare.logs import HEADER, LINES, NOON_S, events, reviews, staged, table, write

GOOD = HEADER + LINES  # lines 1 to 11


def refused(log, message: str, **options: Any) -> None:
    """`message` is a pattern of all that follows the folder of the log."""
    with pytest.raises(DataError) as error:
        staged(log, **options)
    told = str(error.value).replace(f"{log.parent}/", "")
    assert re.fullmatch(message, told), told


TEXT = {
    "empty": ("", "log.csv: must hold something, got nothing; correct the path"),
    "header only": (HEADER, "log.csv: must hold rows, got none; correct the path"),
    "column": (
        "user_id,movie,timestamp\n",
        "log.csv: must have a column item_id, got user_id, movie, timestamp; correct the option that names it, or name "
        "all columns by --columns if the files have no header line, or give --delimiter",
    ),
    "delimiter": (GOOD.replace(",", ";"), "log.csv: must have a column user_id, got user_id;item_id;timestamp; .*"),
    "column twice": (
        "user_id,user_id," + GOOD,
        "log.csv: must have the column user_id once, got it 3 times; rename one",
    ),
    "null user": (
        GOOD + f",1,{NOON_S}\n",
        "log.csv, line 12: user_id must not be null or empty, got nothing; drop the row",
    ),
    "null items": (
        GOOD + f'1,,{NOON_S}\n1,"",{NOON_S}\n',
        "log.csv, line 12: item_id must not be null or empty, got nothing and 1 more rows like it; drop the row",
    ),
    "null time": (GOOD + "1,2,\n", "log.csv, line 12: timestamp must not be null or empty, got nothing; drop the row"),
    "behind line breaks": (
        HEADER + f'"1\n\n2",3,{NOON_S}\n\n\n4,5,monday\n',
        "log.csv, line 7: timestamp must be numbers of s since 1970, got 'monday'; correct the time or drop the row",
    ),
    "few cells": (
        GOOD + "1,2\n" + LINES,
        "log.csv, line 12: must have 3 cells, got 2; correct the line, or give --delim.*",
    ),
    "many cells": (
        GOOD + "1,2,3,4\n",
        "log.csv, line 12: must have 3 cells, got 4; correct the line, or give --delim.*",
    ),
    "quote": (
        GOOD + '1,"2,3\n' + LINES,
        "log.csv, line 12: must close the quote it opens, got none; correct the line.*",
    ),
    "line ends": (GOOD.replace("\n", "\r\n", 3), "log.csv: must end all lines alike .*; write it again"),
    "negative": (
        GOOD + "1,2,-5\n",
        "log.csv, line 12: timestamp must not be negative, got '-5'; correct the time or drop.*",
    ),
    "infinite": (
        GOOD + "1,2,1e999\n",
        "log.csv, line 12: timestamp must be numbers of s since 1970, got '1e999'; correct.*",
    ),
    "hexadecimal": (
        GOOD + "1,2,0x56e0\n",
        "log.csv, line 12: timestamp must be numbers of s since 1970, got '0x56e0'; .*",
    ),
    "date": (
        HEADER + "1,2,2016-03-09\n",
        "log.csv, line 2: timestamp must be numbers of s since 1970, got '2016-03-09'; give --time-unit iso",
    ),
    "long": (GOOD + f"1,2,{'x' * 100}\n", f"log.csv, line 12: timestamp must be .*, got '{'x' * 80}...'; correct .*"),
}


@pytest.mark.parametrize(("content", "message"), TEXT.values(), ids=TEXT)
def test_csv_is_refused(tmp_path, content, message):
    refused(write(tmp_path / "log.csv", content), message)


OUT_OF = r"timestamp must fall into 1980..2100 as numbers of {} since 1970, got '{}'( and 9 more rows like it)?; {}"
UNITS = {
    "ms as s": ("s", f"{NOON_S}123", "in ms it is 2016-03-09: give --time-unit ms"),
    "us as s": ("s", f"{NOON_S}123456", "in us it is 2016-03-09: give --time-unit us"),
    "ns as s": ("s", f"{NOON_S}123456789", "in ns it is 2016-03-09: divide the column by 1000 and give --time-unit us"),
    "s as ms": ("ms", f"{NOON_S}", "in s it is 2016-03-09: give --time-unit s"),
    "us as ms": ("ms", f"{NOON_S}123456", "in us it is 2016-03-09: give --time-unit us"),
    "s as us": ("us", f"{NOON_S}", "in s it is 2016-03-09: give --time-unit s"),
    "days as s": ("s", "16869", "in days it is 2016-03-09: multiply the column by 86400"),
    "hours as s": ("s", "404868", "in hours it is 2016-03-09: multiply the column by 3600"),
    "minutes as ms": ("ms", "24292080", "in minutes it is 2016-03-09: multiply the column by 60"),
    "nothing": ("s", "0", "correct the time or drop the row, or leave such rows out, as by --keep 'timestamp>=N'"),
    "1979": ("s", "315532799", "correct the time or drop the row, or leave such rows out, as by --keep 'timestamp>=N'"),
    "2100": (
        "s",
        "4102444800",
        "correct the time or drop the row, or leave such rows out, as by --keep 'timestamp>=N'",
    ),
}


@pytest.mark.parametrize(("unit", "time", "mend"), UNITS.values(), ids=UNITS)
def test_times_of_another_unit_are_refused_with_the_one_that_fits(tmp_path, unit, time, mend):
    log = write(tmp_path / "log.csv", HEADER + f"1,2,{time}\n")
    refused(log, "log.csv, line 2: " + OUT_OF.format(unit, time, re.escape(mend)), time_unit=unit)
    log = write(
        tmp_path / "log.parquet", table(timestamp=[NOON_S * {"s": 1, "ms": 10**3, "us": 10**6}[unit]] * 2 + [int(time)])
    )
    refused(log, "log.parquet, row group 1, row 0: " + OUT_OF.format(unit, time, re.escape(mend)), time_unit=unit)


@pytest.mark.parametrize("time", ["315532800", "4102444799"])
def test_times_of_the_first_and_the_last_day_pass(tmp_path, time):
    assert events(write(tmp_path / "log.csv", f"{HEADER}1,2,{time}\n")) == [(1, 2, int(time))]


DATES = "timestamp must be dates such as 2016-03-09 or 2016-03-09 13:05:00 in UTC, got "
ISO = {
    "number": (f"{NOON_S}", f"'{NOON_S}'; in s it is 2016-03-09: give --time-unit s"),
    "offset": ("2016-03-09 12:00:00+02:00", r"'2016-03-09 12:00:00\+02:00'; write it like these"),
    "no such day": ("2016-02-30", "'2016-02-30'; write it like these"),
    "american": ("03/09/2016", "'03/09/2016'; correct the time or drop the row"),
}


@pytest.mark.parametrize(("text", "rest"), ISO.values(), ids=ISO)
def test_dates_of_another_kind_are_refused(tmp_path, text, rest):
    refused(write(tmp_path / "log.csv", f"{HEADER}1,2,{text}\n"), f"log.csv, line 2: {DATES}{rest}", time_unit="iso")


def test_the_first_bad_row_is_named_in_whichever_file_it_is(tmp_path):
    (tmp_path / "log").mkdir()
    write(tmp_path / "log/a.csv", GOOD)
    write(tmp_path / "log/b.csv.gz", GOOD + f"1,,{NOON_S}\n")
    write(tmp_path / "log/c.csv", GOOD + f",1,{NOON_S}\n1,,{NOON_S}\n")
    refused(tmp_path / "log", r"log/c.csv, line 12: user_id must not be null or empty, got nothing; .*")
    write(tmp_path / "log/c.csv", GOOD + f"1,,{NOON_S}\n")
    refused(tmp_path / "log", r"log/b.csv.gz, line 12: item_id must not be .* and 1 more rows like it; .*")


def test_files_of_other_columns_are_refused(tmp_path):
    write(tmp_path / "log/a.csv", GOOD)
    write(tmp_path / "log/b.csv", "user_id,age\n1,2\n")
    refused(
        tmp_path / "log",
        r"log/b.csv: must have the columns \['user_id', 'item_id', 'timestamp'\] of a.csv, got \['user_id', .*",
    )


BYTES = "must be UTF-8 text, got b'\\\\xff' at byte {}; convert the file, as by `iconv -f latin1 -t utf-8`"


@pytest.mark.parametrize("lines", [0, 20_000])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path, lines):
    bad = (HEADER + f"1,2,{NOON_S}\n" * lines).encode() + f"1,\xff,{NOON_S}\n".encode("latin1")
    refused(write(tmp_path / "log.csv", bad), f"log.csv, line {lines + 2}: " + BYTES.format(2))
    refused(write(tmp_path / "log.csv.gz", gzip.compress(bad)), f"log.csv.gz, line {lines + 2}: " + BYTES.format(2))
    objects = b'{"reviewerID":"a","asin":"b","unixReviewTime":1457524800}\n' * lines + b'{"reviewerID":"\xff"}\n'
    refused(write(tmp_path / "log.json", objects), f"log.json, line {lines + 1}: " + BYTES.format(15))


def test_utf16_is_refused(tmp_path):
    refused(write(tmp_path / "log.csv", GOOD.encode("utf-16")), "log.csv, line 1: " + BYTES.format(0))


@pytest.mark.parametrize("name", ["log.csv.gz", "log.json.gz"])
def test_gzip_that_is_cut_short_or_corrupt_is_refused(tmp_path, name):
    line = f"1,2,{NOON_S}\n" if "csv" in name else '{"reviewerID":1,"asin":1,"unixReviewTime":1457524800}\n'
    whole = gzip.compress(((HEADER if "csv" in name else "") + line * 9).encode())
    message = "gzip must be whole, but {}; copy or download it again"
    refused(write(tmp_path / name, whole[:-4]), f"{name}: " + message.format("it ends too early"))
    wrong = bytes([*whole[:-8], whole[-8] ^ 1, *whole[-7:]])
    refused(write(tmp_path / name, wrong), f"{name}: " + message.format(".*incorrect data check"))


HEADLESS = {
    "cells": (
        "1::2::978300760\n",
        {},
        r"line 1: must have the 4 cells \['user_id', .*\], got 3: \['1', '2', '978300760'\]; .*",
    ),
    "line": (
        f"1::2::5::{NOON_S}\n1::2::5\n",
        {},
        "line 2: must have 4 cells, got 3; correct the line, or give --delimiter",
    ),
    "names": ("1::2\n", {"columns": ("a", "b")}, ": must have a column user_id, got a, b; correct the option .*"),
}


@pytest.mark.parametrize(("content", "options", "message"), HEADLESS.values(), ids=HEADLESS)
def test_lines_without_a_header_are_refused(tmp_path, content, options, message):
    refused(write(tmp_path / "log.dat", content), f"log.dat(, )?{message}", **options)


@pytest.mark.parametrize("cell", ["user_id", "user_id:", ":token", "user_id:string"])
def test_headers_of_recbole_without_types_are_refused(tmp_path, cell):
    log = write(tmp_path / "log.inter", f"{cell}\titem_id:token\ttimestamp:float\n1\t2\t{NOON_S}\n")
    refused(
        log,
        f"log.inter, line 1: must name each column as name:type, type one of .*, got '{cell}'; correct the header.*",
    )


OBJECT = "line {}: must be a JSON object, but {}; correct the line; one object a line, in double quotes"
JSON = {
    "column": ([{"user": 1}], ": must have a column reviewerID, got user; correct the option that names it"),
    "array": ("[]\n", OBJECT.format(1, r"got \[\]")),
    "python": ("{{'asin': 1}}\n", OBJECT.format(1, "Expecting property name.* at letter 2")),
    "cut": ('{{"reviewerID":\n{}', OBJECT.format(1, "Expecting value at letter 15")),
    "second cut": ('{}\n{{"asin"\n{}', OBJECT.format(3, "Expecting ':' delimiter at letter 8")),
    "second array": ("{}[1]\n", OBJECT.format(2, r"got \[1\]")),
    "two objects": ("{0}{{}} {{}}\n{0}", OBJECT.format(2, "Extra data at letter 4")),
    "spaces": ("{}  \n", OBJECT.format(2, "Expecting value at letter 3")),
    "control": ('{}{{"a": "\x01"}}\n', OBJECT.format(2, "Invalid control character at at letter 8")),
    "null": (reviews(asin=["a", None, "b"]), "line 2: asin must not be null or empty, got nothing; drop the row"),
    "left out": ([*reviews(), {"asin": 1}], "line 4: reviewerID must not be null or empty, got nothing; drop the row"),
    "list": (
        reviews(asin=["a", "b", ["c"]]),
        "line 3: asin must be whole numbers or strings, got '\\[\"c\"\\]'; correct it",
    ),
    "real": (reviews(asin=["a", 1.5, 2.5]), "line 2: asin must be .*, got '1.5' and 1 more rows like it; correct it"),
    "bool": (reviews(asin=[True, "b", "c"]), "line 1: asin must be whole numbers or strings, got 'true'; correct it"),
    "large": (
        reviews(asin=[1, 2, 2**63]),
        "line 3: asin must fit into 64 bits with a sign, got '9223372036854775808'; write.*",
    ),
    "larger": (
        reviews(asin=[1, 2, -(2**70)]),
        "line 3: asin must fit into 64 bits with a sign, got '-1180591620717411303424'.*",
    ),
    "one string": (
        reviews(asin=[1, 2, "3"]),
        "line 3: asin must be whole numbers as in other rows, got '3'; correct it",
    ),
    "one number": (
        reviews(asin=["1", 2, "3"]),
        "line 2: asin must be strings as in other rows, got '2'; write every id.*",
    ),
    "time": (
        reviews(unixReviewTime=[NOON_S, True, 1]),
        "line 2: unixReviewTime must be numbers of s since 1970, got 'true'.*",
    ),
}


@pytest.mark.parametrize(("content", "message"), JSON.values(), ids=JSON)
def test_json_lines_are_refused(tmp_path, content, message):
    good = f'{{"reviewerID": 1, "asin": 2, "unixReviewTime": {NOON_S}}}\n'
    content = content.format(good, good) if isinstance(content, str) else content
    refused(write(tmp_path / "log.json", content), f"log.json(, )?{message}")


def test_a_malformed_line_among_files_and_threads_is_never_passed_over(tmp_path):
    line = f'{{"reviewerID": "{"u" * 300}", "asin": 2, "unixReviewTime": {NOON_S}}}\n'
    for number in range(4):
        write(tmp_path / f"log/{number}.json", line * 20_000 + ('{"asin": 2\n' + line if number == 2 else ""))
    for _ in range(3):
        refused(
            tmp_path / "log", "log/2.json, " + OBJECT.format(20_001, "Expecting ',' delimiter at letter 11"), threads=8
        )


def test_further_columns_of_lists_are_refused(tmp_path):
    log = write(tmp_path / "log.json", reviews(tags=["a", ["b"], {}]))
    message = r"log.json, line 2: tags must hold one value a line, got '\[\"b\"\]' and 1 more rows like it; .*"
    refused(log, message, event_columns=("tags",))
    log = write(tmp_path / "log.parquet", table(tags=[["a"], ["b"], []]))
    refused(
        log,
        r"log.parquet: tags must hold one value a row, got list<.*>; cast it or leave it out",
        user_columns=("tags",),
    )


IDS = "user_id must be whole numbers or strings, got "
PARQUET = {
    "column": (
        table(user_id=None),
        ": must have a column user_id, got item_id, timestamp; correct the option that names it",
    ),
    "empty": (table()[:0], ": must hold rows, got none; correct the path"),
    "real ids": (table(user_id=[1.0, 2.0, None]), f": {IDS}double; cast it, dropping rows without an id first"),
    "binary ids": (table(user_id=[b"1", b"2", b"1"]), f": {IDS}binary; cast it"),
    "null ids": (table(user_id=pa.nulls(3)), f": {IDS}null; cast it"),
    "list ids": (table(user_id=[[1], [2], [3]]), f": {IDS}list<.*>; cast it"),
    "null": (
        table(user_id=[1, 2, None]),
        ", row group 1, row 0: user_id must not be null or empty, got nothing; drop the row",
    ),
    "empty id": (
        table(item_id=["a", "", "b"]),
        ", row group 0, row 1: item_id must not be null or empty, got nothing; .*",
    ),
    "unsigned": (
        table(user_id=pa.array([1, 2, 2**63], pa.uint64())),
        ", row group 1, row 0: user_id must fit into 64 bits with a sign, got '9223372036854775808'; write the ids .*",
    ),
    "nan": (
        table(timestamp=[float(NOON_S), float("nan"), 1.0]),
        ", row group 0, row 1: timestamp must be numbers of s since 1970, got 'nan'; correct the time or drop the row",
    ),
    "negative": (
        table(timestamp=[NOON_S, -1, 1]),
        ", row group 0, row 1: timestamp must not be negative, got '-1'; .*",
    ),
    "bool time": (table(timestamp=[True] * 3), ": timestamp must be numbers of s since 1970, got bool; cast it"),
    "early instant": (
        table(timestamp=pa.array([NOON_S] * 3, pa.timestamp("ms"))),
        ", row group 0, row 0: timestamp must fall into 1980..2100, got '1970-01-17 20:52:04.8' and 2 more rows .*",
    ),
}


@pytest.mark.parametrize(("content", "message"), PARQUET.values(), ids=PARQUET)
def test_parquet_is_refused(tmp_path, content, message):
    refused(write(tmp_path / "log.parquet", content), f"log.parquet{message}")


def test_numbers_are_no_dates(tmp_path):
    log = write(tmp_path / "log.parquet", table())
    refused(log, f"log.parquet: {DATES}int64; give --time-unit s, ms or us", time_unit="iso")


def test_parquet_of_two_types_is_refused(tmp_path):
    write(tmp_path / "log/a.parquet", table())
    write(tmp_path / "log/b.parquet", table(user_id=["1", "2", "3"]))
    refused(tmp_path / "log", "log/b.parquet: user_id must be int64 as in a.parquet, got string; cast it")


def test_parquet_that_is_cut_short_or_corrupt_is_refused(tmp_path):
    log = write(tmp_path / "log.parquet", table())
    whole = log.read_bytes()
    message = "must be Parquet, but .*; write or copy the file again"
    for content in (whole[:-20], whole[: len(whole) // 2], b"", b"user_id,item_id"):
        refused(write(log, content), f"log.parquet: {message}")
    page = pq.read_metadata(write(log, whole)).row_group(1).column(1)
    start = page.dictionary_page_offset or page.data_page_offset
    refused(write(log, whole[:start] + b"\xff" * 20 + whole[start + 20 :]), f"log.parquet, row group 1: {message}")


def test_conditions_that_keep_nothing_or_name_no_column_are_refused(tmp_path):
    log = write(tmp_path / "log.csv", GOOD)
    refused(log, "log.csv: must hold rows that --keep keeps, got none of 10; loosen --keep", keep=("item_id>10",))
    refused(log, "log.csv: must have a column rating, got user_id, .*", keep=("rating>=4",))


def test_the_bad_row_that_is_named_is_one_that_is_kept(tmp_path):
    log = write(tmp_path / "log.csv", GOOD + f"0,,{NOON_S}\n1,,{NOON_S}\n")
    refused(log, "log.csv, line 13: item_id must not be null or empty, got nothing; drop the row", keep=("user_id=1",))


USERS = {
    "word": (
        "users.csv",
        "user_id,age\n1,5\nx,6\n",
        "users.csv, line 3: user_id must be whole numbers as in the log, got 'x'; .*",
    ),
    "null": (
        "users.csv",
        "user_id,age\n1,5\n,6\n",
        "users.csv, line 3: user_id must not be null or empty, got nothing; .*",
    ),
    "column": (
        "users.csv",
        "user,age\n1,5\n",
        "users.csv: must have a column user_id, got user, age; .* by --columns-of-users.*",
    ),
    "type": (
        "users.parquet",
        pa.table({"user_id": ["1"], "age": [5]}),
        "users.parquet, row group 0, row 0: user_id must be whole numbers as in the log, got '1'; correct it",
    ),
    "nowhere": ("users.csv", None, "users.csv must be a file or folder, there is none; correct the path"),
}


@pytest.mark.parametrize(("name", "content", "message"), USERS.values(), ids=USERS)
def test_tables_of_users_are_refused(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    log = write(tmp_path / "log.csv", GOOD)
    refused(log, message, users=str(tmp_path / name), user_columns=("age",))


def test_users_of_numbers_do_not_fit_a_log_of_strings(tmp_path):
    users = write(tmp_path / "users.parquet", pa.table({"user_id": [1], "age": [5]}))
    log = write(tmp_path / "log.csv", f"{HEADER}x,1,{NOON_S}\n")
    message = (
        "users.parquet, row group 0, row 0: user_id must be strings as in the log, got '1'; write every id as a string"
    )
    refused(log, message, users=str(users), user_columns=("age",))


def test_a_log_that_is_refused_leaves_no_table(tmp_path):
    connection = duckdb.connect()
    with pytest.raises(DataError, match="must not be null"):
        stage(connection, write(tmp_path / "log.csv", GOOD + f"1,,{NOON_S}\n"), LogConfig())
    assert connection.execute("SHOW TABLES").fetchall() == []


def test_memory_that_does_not_suffice_is_told_as_the_database_tells_it(tmp_path):
    connection = duckdb.connect(config={"memory_limit": "1MiB"})
    log = write(tmp_path / "log.csv", HEADER + f"1,2,{NOON_S}\n" * 200_000)
    with pytest.raises(duckdb.OutOfMemoryException):
        stage(connection, log, LogConfig())
