"""Lines of cells: CSV, TSV, MovieLens .dat and RecBole .inter; every cell is text.

CSV and TSV put a cell that holds the delimiter, a quote or a line break between quotes; the others have no quotes. A
cell without anything in it is null. RecBole's header gives each column as name:type (its docs: "Atomic Files").
"""

import csv
import gzip
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TextIO, cast

import duckdb

from ssd_torchrec.data.prepare.files import is_gzip
from ssd_torchrec.data.prepare.log import DELIMITERS, Format
from ssd_torchrec.data.prepare.source import (
    Column,
    Source,
    file_list,
    first_sentence,
    missing,
    quoted_text,
)
from ssd_torchrec.errors import DataError

_QUOTED: tuple[Format, ...] = ("csv", "tsv")
_TYPES = ("token", "token_seq", "float", "float_seq")


@dataclass(frozen=True)
class Layout:
    """How cells stand in lines."""

    format: Format
    delimiter: str
    names: tuple[str, ...] = ()  # of the columns, if there is no header line

    @classmethod
    def of(cls, kind: Format, delimiter: str, names: tuple[str, ...]) -> "Layout":
        return cls(kind, delimiter or DELIMITERS.get(kind, ""), names)

    @property
    def quote(self) -> str:
        return '"' if self.format in _QUOTED else ""

    def records(self, file: Path) -> Iterator[tuple[int, list[str]]]:
        """Lines that are not empty, cut into cells, each with the number of its first line."""
        with opened(file) as lines:
            if not self.quote or len(self.delimiter) > 1:
                for number, line in enumerate(lines, 1):
                    if line.strip("\r\n"):
                        yield number, line.rstrip("\r\n").split(self.delimiter)
                return
            reader, number = csv.reader(lines, delimiter=self.delimiter), 1
            for cells in reader:
                if cells:
                    yield number, cells
                number = reader.line_num + 1


@dataclass(frozen=True)
class TextSource(Source):
    """Files whose cells are text."""

    layout: Layout
    width: int  # cells a line
    gzipped: frozenset[Path]

    def relation(self, files: Sequence[Path]) -> str:
        cells = ", ".join(f"'c_{number}': 'VARCHAR'" for number in range(self.width))
        options = {
            "columns": f"{{{cells}}}",
            "header": "false" if self.layout.names else "true",
            "delim": quoted_text(self.layout.delimiter),
            "quote": quoted_text(self.layout.quote),
            "escape": quoted_text(self.layout.quote),
        }
        return read_csv(files, self.gzipped, options)

    def place(self, file: Path, row: int) -> str:
        header = 0 if self.layout.names else 1
        try:
            for at, (number, _) in enumerate(self.layout.records(file)):
                if at == row + header:
                    return f"{file}, line {number}"
        except (csv.Error, UnicodeDecodeError):
            pass
        return f"{file}, line {row + header + 1}"

    def explain(self, error: duckdb.Error) -> DataError:
        said = str(error)
        if "unicode" in said.lower():
            return not_utf8(self.files)
        line, file = re.search(r"on Line: (\d+)", said), re.search(r"^\s*file = (.*)$", said, re.MULTILINE)
        where = f"{file[1] if file else self.files[0]}" + (f", line {line[1]}" if line else "")
        cells = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", said)
        if cells:
            told = f"must have {cells[1]} cells, got {cells[2]}; correct the line, or give --delimiter"
        elif "quote" in said.partition("Possible")[0]:
            told = 'must close the quote it opens, got none; correct the line, or write a quote within quotes as ""'
        elif "state machine" in said:
            told = "must end all lines alike and put nothing after a closing quote, got something else; write it again"
        else:
            told = f"must be {self.layout.format}, but {first_sentence(error)}; write or copy the file again"
        return DataError(f"{where}: {told}")


def open_text(files: tuple[Path, ...], layout: Layout, wanted: Sequence[str], option: str) -> TextSource:
    """Find columns in the header lines.

    Args:
        option: what names the columns of files without a header line.

    Raises:
        DataError: a header cannot be read, misses a column, has one twice, or is not that of the first file.
    """
    headers = {file: names for file in files if (names := _header(file, layout))}
    if not headers:
        raise DataError(f"{files[0]}: must hold something, got nothing; correct the path")
    first, names = next(iter(headers.items()))
    for file, others in headers.items():
        if others != names:
            raise DataError(
                f"{file}: must have the columns {names} of {first.name}, got {others}; give the log's files by --files"
            )
    also = f", or name all columns by {option} if the files have no header line, or give --delimiter"
    columns = {}
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(f"{first}: must have the column {name} once, got it {names.count(name)} times; rename one")
        if name not in names:
            raise missing(first, name, names, also)
        columns[name] = Column(name, f"c_{names.index(name)}", first, "text")
    return TextSource(files, columns, layout, len(names), frozenset(filter(is_gzip, files)))


def read_csv(files: Sequence[Path], gzipped: frozenset[Path], options: dict[str, str]) -> str:
    """SQL of lines of cells: neighbours that are compressed alike by one call each."""
    told = ", ".join(f"{name} = {value}" for name, value in options.items())
    calls = [
        f"SELECT * FROM read_csv({file_list(list(run))}, {told}, auto_detect = false, strict_mode = true, "
        f"compression = '{'gzip' if compressed else 'none'}')"
        for compressed, run in groupby(files, key=gzipped.__contains__)
    ]
    return f"({' UNION ALL '.join(calls)})"


def opened(file: Path) -> TextIO:
    """A file's text, decompressed if need be, without its byte order mark."""
    opener = gzip.open if is_gzip(file) else open
    return cast(TextIO, opener(file, "rt", encoding="utf-8-sig", newline=""))


def not_utf8(files: Sequence[Path]) -> DataError:
    """The first line of files that is not UTF-8."""
    mend = "convert the file, as by `iconv -f latin1 -t utf-8`"
    for file in files:
        with gzip.open(file) if is_gzip(file) else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    wrong = f"{error.object[error.start : error.start + 1]!r} at byte {error.start}"
                    return DataError(f"{file}, line {number}: must be UTF-8 text, got {wrong}; {mend}")
    return DataError(f"{files[0]}: must be UTF-8 text, got other bytes; {mend}")


def _header(file: Path, layout: Layout) -> list[str]:
    """Names of a file's columns; none if it is empty."""
    try:
        _, cells = next(layout.records(file), (0, []))
    except UnicodeDecodeError as error:
        raise not_utf8([file]) from error
    except csv.Error as error:
        raise DataError(f"{file}, line 1: must be {layout.format}, but {error}; correct the line") from error
    if layout.names and cells and len(cells) != len(layout.names):
        raise DataError(
            f"{file}, line 1: must have the {len(layout.names)} cells {list(layout.names)}, got {len(cells)}: "
            f"{str(cells)[:200]}; name them all, or give --delimiter"
        )
    if layout.names:
        return list(layout.names) if cells else []
    return [_recbole_name(file, cell) for cell in cells] if layout.format == "inter" else cells


def _recbole_name(file: Path, cell: str) -> str:
    name, _, kind = cell.rpartition(":")
    if not name or kind not in _TYPES:
        raise DataError(
            f"{file}, line 1: must name each column as name:type, type one of {', '.join(_TYPES)}, got {cell!r}; "
            "correct the header, or read the file as --format tsv"
        )
    return name
