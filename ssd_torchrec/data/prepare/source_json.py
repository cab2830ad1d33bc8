"""JSON lines: an object a line, as in Amazon's reviews; values are numbers or strings, a column left out is null."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from ssd_torchrec.data.prepare.files import is_gzip
from ssd_torchrec.data.prepare.source import (
    Column,
    Source,
    file_list,
    first_sentence,
    missing,
    quoted_name,
    quoted_text,
    runs,
)
from ssd_torchrec.data.prepare.source_text import not_utf8, opened
from ssd_torchrec.errors import DataError

_MEND = "correct the line; one object a line, in double quotes"


@dataclass(frozen=True)
class JsonSource(Source):
    """Files whose values have a type each."""

    gzipped: frozenset[Path]

    def relation(self, files: Sequence[Path]) -> str:
        columns = ", ".join(f"{quoted_text(name)}: 'JSON'" for name in self.columns)
        names = ", ".join(f"{quoted_name(name)} AS {column.sql}" for name, column in self.columns.items())
        told = f"columns = {{{columns}}}, format = 'newline_delimited'"
        parts = [
            f"SELECT {names} FROM read_json({file_list(part)}, compression = {compression}, {told})"
            for part, compression in runs(files, self.gzipped)
        ]
        return f"({' UNION ALL '.join(parts)})"

    def place(self, file: Path, row: int) -> str:
        for at, (number, _) in enumerate(_lines(file)):
            if at == row:
                return f"{file}, line {number}"
        return f"{file}, line {row + 1}"

    def explain(self, error: duckdb.Error) -> DataError:
        """The database counts lines within its buffers, so the first bad one is looked for here."""
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
    with opened(file, "utf-8") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _wrong(line: str) -> str | None:
    """What is wrong with a line, if anything is."""
    try:
        pairs = json.loads(line.rstrip("\r\n"), object_pairs_hook=list, parse_constant=_refused)
    except json.JSONDecodeError as error:
        return f"{error.msg} at letter {error.colno}"
    except ValueError as error:
        return str(error)
    if not line.lstrip().startswith("{"):
        return f"got {line.strip()[:80]}"
    twice = {name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}
    return f"{sorted(twice)} stands in it twice" if twice else None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
