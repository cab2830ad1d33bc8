"""A table of users as somebody wrote it: Parquet, CSV or JSON lines, read in blocks of Arrow columns.

Parquet keeps its types. JSON lines give whole numbers, strings and lists of them. CSV gives text in `user_id` and JSON
in every other cell, such as "[3, 7, 9]". Messages count rows of the table from 0, lines of the file from 1.
"""

import bisect
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ssd_torchrec.data.rows import Ints, offsets_of
from ssd_torchrec.errors import DataError

ROWS_PER_BLOCK = 4096
FORMATS = "Parquet (.parquet), CSV (.csv) or JSON lines (.jsonl, .json)"


@dataclass(frozen=True)
class IdType:
    """What the ids of a column must be."""

    type: pa.DataType | None  # int64 or large_string; none: the one or the other
    why: str = ""  # "as in ...", for messages

    def __str__(self) -> str:
        names = {None: "int64 or strings", pa.int64(): "int64", pa.large_string(): "strings"}
        return f"{names[self.type]} {self.why}".rstrip()


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive rows of a table."""

    file: Path
    first_row: int
    columns: dict[str, pa.Array]

    def ids(self, name: str, expected: IdType) -> pa.Array:
        """A column of one id a row: (R,) int64 or large_string.

        Raises:
            DataError: it is of another type, or null somewhere.
        """
        column = self.columns[name]
        self._refuse_nulls(column, _each(column), f"{name} must not be null; drop the user")
        return self._cast(name, column, _each(column), expected)

    def id_lists(self, name: str, expected: IdType, *, nulls: bool = False) -> tuple[pa.Array, Ints]:
        """A column of a list of ids a row: all ids end to end, and the (R+1,) offsets that cut them.

        Args:
            nulls: whether an id, though no list, may be null.

        Raises:
            DataError: it is of another type, or null somewhere.
        """
        column = self.columns[name]
        self._refuse_nulls(column, _each(column), f"{name} must not be null; write an empty list")
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            self.refuse(0, f"{name} must be a list of {expected}, got {column.type}; write one list a user")
        offsets = offsets_of(column.value_lengths().to_numpy().astype(np.int64))
        values = column.flatten()
        if not nulls:
            self._refuse_nulls(values, offsets, f"{name} must hold no null; drop the event")
        return self._cast(name, values, offsets, expected), offsets

    def refuse(self, row: int, message: str) -> NoReturn:
        """Raise a DataError that names file and row; `row` counts from 0 at the block's first."""
        raise DataError(f"{self.file}, row {self.first_row + row}: {message}")

    def refuse_where(self, wrong: NDArray[np.bool_], offsets: Ints, message: Callable[[int], str]) -> None:
        """Refuse the first wrong one of values that `offsets` cut into rows; `message` is given its place."""
        if wrong.any():
            at = int(np.argmax(wrong))
            self.refuse(int(np.searchsorted(offsets, at, side="right")) - 1, message(at))

    def _refuse_nulls(self, values: pa.Array, offsets: Ints, message: str) -> None:
        if values.null_count:
            self.refuse_where(values.is_null().to_numpy(zero_copy_only=False), offsets, lambda _: message)

    def _cast(self, name: str, values: pa.Array, offsets: Ints, expected: IdType) -> pa.Array:
        if values.null_count == len(values):  # of no type in particular
            return values.cast(expected.type or pa.int64())
        is_text = self.file.suffix == ".csv" and expected.type == pa.int64()  # where a column of ids has no type yet
        wanted = pa.int64() if is_text or pa.types.is_integer(values.type) else pa.large_string()
        first = int(np.searchsorted(offsets, 0, side="right")) - 1
        if not (_is_text(values) or pa.types.is_integer(values.type)) or wanted != (expected.type or wanted):
            self.refuse(first, f"{name} must be {expected}, got {values.type}; cast it")
        if (cast := _cast(values, wanted)) is not None:
            return cast
        at = _first_that_fails(len(values), lambda stop: _cast(values[:stop], wanted))
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        self.refuse(row, f"{name} must be whole numbers of 64 bits, got {values[at].as_py()!r}; correct it")


def blocks_of(file: Path) -> Iterator[Block]:
    """The rows of a file in order, some thousands at a time; all blocks have the same columns.

    Raises:
        DataError: there is no such file, its name does not tell the format, or its content is not of it: cut short,
            not UTF-8, a line that is no JSON object, a row with other columns than the first, values of mixed types.
    """
    readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines, ".json": _json_lines}
    if not file.is_file():
        raise DataError(f"{file} must be a file of users, there is none; correct the path")
    if file.suffix not in readers:
        raise DataError(f"{file} must be {FORMATS} by its name, got {file.suffix or 'no suffix'}; rename or convert it")
    try:
        yield from readers[file.suffix](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: must be UTF-8 text, but {error}; save it as UTF-8") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: must be readable, but {error}; write or copy it again") from error


def _parquet(file: Path) -> Iterator[Block]:
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        _refuse_twice(file, names)
        first_row = 0
        for batch in table.iter_batches(ROWS_PER_BLOCK):
            columns = dict(zip(names, map(_plain, batch.columns), strict=True))
            yield Block(file, first_row, columns)
            first_row += len(batch)


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def _json_lines(file: Path) -> Iterator[Block]:
    with file.open(encoding="utf-8") as lines:
        yield from _in_blocks(file, (_json_object(file, number, line) for number, line in enumerate(lines, 1)))


def _json_object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {number}: must be a JSON object, but {error}; correct the line") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}, line {number}: must be a JSON object, got {type(value).__name__}; correct the line")
    return value


def _csv(file: Path) -> Iterator[Block]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            names = next(reader, [])
            _refuse_twice(file, names)
            yield from _in_blocks(file, (_csv_row(file, reader.line_num, names, cells) for cells in reader))
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: must be CSV, but {error}; correct the line") from error


def _csv_row(file: Path, number: int, names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise DataError(
            f"{file}, line {number}: must have {len(names)} cells like the header, got {len(cells)}; "
            'put a cell with commas in it between quotes, as in "[3, 7, 9]"'
        )
    return {name: _csv_value(file, number, name, cell) for name, cell in zip(names, cells, strict=True)}


def _csv_value(file: Path, number: int, name: str, cell: str) -> Any:
    if name == "user_id" or not cell:
        return cell or None
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise DataError(
            f'{file}, line {number}: {name} must be a list in JSON, such as "[3, 7, 9]", got {cell!r}; correct the cell'
        ) from error


def _in_blocks(file: Path, rows: Iterator[dict[str, Any]]) -> Iterator[Block]:
    first = next(rows, None)
    if first is None:
        return
    rows, first_row = chain([first], rows), 0
    while block := list(islice(rows, ROWS_PER_BLOCK)):
        yield Block(file, first_row, _as_columns(file, first_row, block, list(first)))
        first_row += len(block)


def _as_columns(file: Path, first_row: int, rows: list[dict[str, Any]], names: list[str]) -> dict[str, pa.Array]:
    for at, row in enumerate(rows):
        if row.keys() != set(names):
            raise DataError(
                f"{file}, row {first_row + at}: must have the columns {names} like the first row, got {list(row)}; "
                "give every row the same"
            )
    return {name: _as_array(file, first_row, name, [row[name] for row in rows]) for name in names}


def _as_array(file: Path, first_row: int, name: str, values: list[Any]) -> pa.Array:
    if (array := _arrow(values)) is not None:
        return array
    row = _first_that_fails(len(values), lambda stop: _arrow(values[:stop]))
    raise DataError(
        f"{file}, row {first_row + row}: {name} must be of one type in all rows, whole numbers of 64 bits or strings, "
        f"got {str(values[row])[:80]}; correct the row"
    )


def _arrow(values: list[Any]) -> pa.Array | None:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array | None:
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        return None


def _is_text(values: pa.Array) -> bool:
    return pa.types.is_string(values.type) or pa.types.is_large_string(values.type)


def _first_that_fails(count: int, convert: Callable[[int], object]) -> int:
    """Place of the first value at which converting all up to it gives None."""
    return bisect.bisect_left(range(count), True, key=lambda at: convert(at + 1) is None)


def _each(column: pa.Array) -> Ints:
    """Offsets of rows of one value each."""
    return np.arange(len(column) + 1)


def _refuse_twice(file: Path, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{file}: columns must have names of their own, got {twice} twice; rename them")
