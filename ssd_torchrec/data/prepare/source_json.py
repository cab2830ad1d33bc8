"""JSON lines: an object a line, as in Amazon's reviews; values are numbers or strings, a column left out is null.

The database reads the lines as text and takes them apart itself. Its own reader of JSON lines is not used: with
several files and threads duckdb 2.0 lost the error of a malformed line, and the rows around it, without a word.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from ssd_torchrec.data.prepare.files import is_gzip
from ssd_torchrec.data.prepare.source import Column, Source, first_sentence, missing, quoted_text
from ssd_torchrec.data.prepare.source_text import not_utf8, opened, read_csv
from ssd_torchrec.errors import DataError

_MEND = "correct the line; one object a line, in double quotes"
_WHOLE_LINES = {
    "columns": "{'line': 'VARCHAR'}",
    "header": "false",
    "delim": quoted_text("\x01"),  # which JSON cannot hold
    "quote": "''",
    "escape": "''",
}


@dataclass(frozen=True)
class JsonSource(Source):
    """Files whose values have a type each."""

    gzipped: frozenset[Path]

    def relation(self, files: Sequence[Path]) -> str:
        pointers = ", ".join(quoted_text(_pointer(name)) for name in self.columns)
        values = f"CASE WHEN json_type(line) = 'OBJECT' THEN json_extract(line, [{pointers}]) ELSE error(line) END"
        lines = f"SELECT {values} AS found FROM {read_csv(files, self.gzipped, _WHOLE_LINES)} WHERE line IS NOT NULL"
        names = ", ".join(f"found[{at}] AS {column.sql}" for at, column in enumerate(self.columns.values(), 1))
        return f"(SELECT {names} FROM ({lines}))"

    def place(self, file: Path, row: int) -> str:
        for at, (number, _) in enumerate(_lines(file)):
            if at == row:
                return f"{file}, line {number}"
        return f"{file}, line {row + 1}"

    def explain(self, error: duckdb.Error) -> DataError:
        """Looks for the first line that is no object."""
        for file in self.files:
            try:
                for number, line in _lines(file):
                    if (wrong := _wrong(line)) is not None:
                        return DataError(f"{file}, line {number}: must be a JSON object, but {wrong}; {_MEND}")
            except UnicodeDecodeError:
                return not_utf8([file])
        return DataError(f"{self.files[0]}: must be JSON lines, but {first_sentence(error)}; {_MEND}")


def open_json(files: tuple[Path, ...], wanted: Sequence[str]) -> JsonSource:
    """Look for columns in the first line.

    Raises:
        DataError: the first line is no object, or misses a column.
    """
    for file in files:
        try:
            number, line = next(_lines(file), (0, ""))
        except UnicodeDecodeError as error:
            raise not_utf8([file]) from error
        if not line:
            continue
        if (wrong := _wrong(line)) is not None:
            raise DataError(f"{file}, line {number}: must be a JSON object, but {wrong}; {_MEND}")
        there = list(json.loads(line))
        for name in wanted:
            if name not in there:
                raise missing(file, name, there)
        columns = {name: Column(name, f"c_{number}", file, "json") for number, name in enumerate(wanted)}
        return JsonSource(files, columns, frozenset(filter(is_gzip, files)))
    raise DataError(f"{files[0]}: must hold something, got nothing; correct the path")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if text := line.rstrip("\r\n"):
                yield number, text


def _wrong(line: str) -> str | None:
    """What is wrong with a line, if anything is."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return f"{error.msg} at letter {error.colno}"
    return None if isinstance(value, dict) else f"got {line[:80]}"


def _pointer(name: str) -> str:
    """The JSON pointer (RFC 6901) to a member."""
    return "/" + name.replace("~", "~0").replace("/", "~1")
