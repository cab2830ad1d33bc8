import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssd_torchrec.data import asked_file
from ssd_torchrec.data.asked_file import IdType, blocks_of
from ssd_torchrec.errors import DataError

INTEGERS = IdType(pa.int64(), "as asked for")
STRINGS = IdType(pa.large_string(), "as asked for")
ROWS = [{"user_id": user, "item": list(range(user % 3))} for user in range(10)]


def parquet(folder: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "users.parquet")
    return folder / "users.parquet"


def json_lines(folder: Path, rows: list[dict]) -> Path:
    return text(folder, "users.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def comma_separated(folder: Path, rows: list[dict]) -> Path:
    lines = [f'{row["user_id"]},"{json.dumps(row["item"])}"\n'.replace('""', '"') for row in rows]
    return text(folder, "users.csv", "user_id,item\n" + "".join(lines))


def text(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("write", [parquet, json_lines, comma_separated])
def test_every_format_gives_the_rows_in_order_block_after_block(write, tmp_path, monkeypatch):
    monkeypatch.setattr(asked_file, "ROWS_PER_BLOCK", 4)
    blocks = list(blocks_of(write(tmp_path, ROWS)))
    assert [block.first_row for block in blocks] == [0, 4, 8]
    users = [user for block in blocks for user in block.ids("user_id", INTEGERS).to_pylist()]
    items = [block.id_lists("item", INTEGERS) for block in blocks]
    assert users == [row["user_id"] for row in ROWS]
    assert [item for values, _ in items for item in values.to_pylist()] == [i for row in ROWS for i in row["item"]]
    assert items[1][1].tolist() == [0, 1, 3, 3, 4]


def test_text_stays_text_unless_whole_numbers_are_asked_for(tmp_path):
    (block,) = blocks_of(text(tmp_path, "users.csv", "user_id\n007\n8\n"))
    assert block.ids("user_id", STRINGS).to_pylist() == ["007", "8"]
    assert block.ids("user_id", IdType(None)).to_pylist() == ["007", "8"]
    assert block.ids("user_id", INTEGERS).to_pylist() == [7, 8]


def test_categories_of_parquet_are_strings(tmp_path):
    pq.write_table(pa.table({"user_id": pa.array(["a", "b"]).dictionary_encode()}), tmp_path / "users.parquet")
    (block,) = blocks_of(tmp_path / "users.parquet")
    assert block.ids("user_id", STRINGS).to_pylist() == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("users.jsonl", '{"user_id": 1}\n{"user_id": \n', r"users.jsonl, line 2: must be a JSON object"),
        ("users.jsonl", '{"user_id": 1}\n[2]\n', "line 2: must be a JSON object, got list"),
        (
            "users.jsonl",
            '{"user_id": 1}\n{"user": 1}\n',
            r"row 1: must have the columns \['user_id'\] .* got \['user'\]",
        ),
        (
            "users.jsonl",
            '{"user_id": 1}\n{"user_id": 2}\n{"user_id": "a"}\n',
            "row 2: user_id must be of one type .* a;",
        ),
        ("users.jsonl", '{"user_id": 1}\n{"user_id": 9223372036854775808}\n', "row 1: user_id must be of one type"),
        ("users.csv", "user_id,item\n1,3,7\n", "line 2: must have 2 cells .* got 3; put a cell with commas"),
        ("users.csv", "user_id,item\n1,[3\n", r"line 2: item must be a list in JSON.* got '\[3'"),
        ("users.csv", "user_id,user_id\n1,2\n", r"must have names of their own, got \['user_id'\]"),
        ("users.csv", 'user_id\n"1"2\n', "line 2: must be CSV"),
        ("users.parquet", "PAR1 and then nothing", "users.parquet: must be readable"),
        ("users.txt", "1\n", r"must be Parquet .* got .txt"),
        ("users", "1\n", r"must be Parquet .* got no suffix"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_line_or_row(name, content, match, tmp_path):
    file = text(tmp_path, name, content)
    with pytest.raises(DataError, match=match):
        list(blocks_of(file))


def test_bytes_that_are_no_utf8_are_refused(tmp_path):
    (tmp_path / "users.csv").write_bytes(b"user_id\ncaf\xe9\n")
    with pytest.raises(DataError, match="must be UTF-8"):
        list(blocks_of(tmp_path / "users.csv"))


def test_a_parquet_file_cut_short_is_refused(tmp_path):
    file = parquet(tmp_path, ROWS)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="must be readable"):
        list(blocks_of(file))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is none; correct the path"):
        list(blocks_of(tmp_path / "users.csv"))


@pytest.mark.parametrize(
    ("user_id", "expected", "match"),
    [
        ([1, None], INTEGERS, "row 5: user_id must not be null"),
        (["a"], INTEGERS, "row 4: user_id must be int64 as asked for, got string"),
        ([1], STRINGS, "row 4: user_id must be strings as asked for, got int64"),
        ([0.5], IdType(None), "row 4: user_id must be int64 or strings, got double"),
        ([[1]], INTEGERS, "got list"),
        (pa.array([1, 2**64 - 1], pa.uint64()), INTEGERS, "row 5: .* 64 bits, got 18446744073709551615"),
    ],
    ids=["null", "strings", "integers", "fractions", "lists", "past-int64"],
)
def test_ids_of_another_kind_are_refused_by_row(user_id, expected, match):
    block = asked_file.Block(Path("users.parquet"), 4, {"user_id": pa.array(user_id)})
    with pytest.raises(DataError, match=match):
        block.ids("user_id", expected)


def test_text_that_is_no_whole_number_is_refused_by_row():
    block = asked_file.Block(Path("users.csv"), 4, {"user_id": pa.array(["1", "2", "x", "y"])})
    with pytest.raises(DataError, match=r"row 6: .* got 'x'"):
        block.ids("user_id", INTEGERS)


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ([[1], None], "row 5: item must not be null; write an empty list"),
        ([[], [1], [2, None]], "row 6: item must hold no null; drop the event"),
        ([3], "row 4: item must be a list of int64 as asked for, got int64"),
        ([[], [], ["a"]], "row 6: item must be int64 as asked for, got string"),
    ],
    ids=["null-list", "null-inside", "no-list", "strings"],
)
def test_lists_of_another_kind_are_refused_by_row(item, match):
    block = asked_file.Block(Path("users.parquet"), 4, {"item": pa.array(item)})
    with pytest.raises(DataError, match=match):
        block.id_lists("item", INTEGERS)


@pytest.mark.parametrize(
    "item", [[[], []], pa.array([[], []], pa.list_(pa.string())), []], ids=["untyped", "typed", "no-rows"]
)
def test_empty_lists_are_of_any_type(item):
    block = asked_file.Block(
        Path("users.parquet"), 0, {"item": pa.array(item, None if len(item) else pa.list_(pa.int64()))}
    )
    values, offsets = block.id_lists("item", INTEGERS)
    assert (values.to_pylist(), offsets.tolist()) == ([], [0] * (len(item) + 1))
