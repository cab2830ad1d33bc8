"""Columns of a log's files as the database reads them; one kind of source a family of formats.

What columns hold, by kind: text is untyped, as in CSV; json has a type in each value; the others are typed columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb

from ssd_torchrec.errors import DataError

Kind = Literal["text", "json", "integer", "string", "real", "instant", "boolean", "unfit"]


@dataclass(frozen=True)
class Column:
    """A column that is read."""

    name: str  # in the log
    sql: str  # in the relation of its source
    file: Path | str  # the first that has it
    kind: Kind
    type: str = ""  # what the file calls its type, if it has one

    @property
    def text(self) -> str:
        """Its values as the log writes them."""
        if self.kind == "json":
            return f"({self.sql} ->> '$')"
        return self.sql if self.kind in ("text", "string") else f"CAST({self.sql} AS STRING)"

    @property
    def is_empty(self) -> str:
        """SQL: whether there is no value."""
        return f"coalesce({self.text}, '') = ''" if self.kind in ("text", "json", "string") else f"{self.sql} IS NULL"


@dataclass(frozen=True)
class Source(ABC):
    """Files of one format with the columns that are read."""

    files: tuple[Path, ...]
    columns: dict[str, Column]

    @abstractmethod
    def relation(self, files: Sequence[Path]) -> str:
        """SQL of the columns in some of the files: lines in their order."""

    @abstractmethod
    def place(self, file: Path, row: int) -> str:
        """Where a row of a file lies, for people; `row` counts from 0."""

    @abstractmethod
    def explain(self, error: duckdb.Error) -> DataError:
        """Why the database could not read the files, with file and line or row group."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The database's errors in our words, but for those of its memory and of the user who stops it."""
        try:
            yield
        except (duckdb.OutOfMemoryException, duckdb.InterruptException):
            raise
        except duckdb.Error as error:
            raise self.explain(error) from error


def file_list(files: Sequence[Path]) -> str:
    """Files as SQL takes them, none of their letters a wildcard."""
    return f"[{', '.join(quoted_text(_literal(str(file))) for file in files)}]"


def quoted_text(text: str) -> str:
    """Text as SQL takes it."""
    return "'" + text.replace("'", "''") + "'"


def quoted_name(name: str) -> str:
    """The name of a column as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def first_sentence(error: duckdb.Error) -> str:
    """What the database says, without its advice on its own options."""
    return str(error).strip().partition("\n")[0].removeprefix("Invalid Input Error: ").removeprefix("IO Error: ")


def missing(file: Path | str, name: str, there: Sequence[str], also: str = "") -> DataError:
    """A column that is not there."""
    listed = ", ".join(there[:40]) + (", ..." if len(there) > 40 else "")
    return DataError(
        f"{file}: must have a column {name}, got {listed or 'none'}; correct the option that names it{also}"
    )


def _literal(path: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)
