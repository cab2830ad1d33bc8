"""One pass over a log before anything is kept of it: every value is read and held against its rules."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from ssd_torchrec.data.prepare.rules import Rule
from ssd_torchrec.data.prepare.source import Source
from ssd_torchrec.errors import DataError


@dataclass(frozen=True)
class Reading:
    """Rows that are read of a source."""

    source: Source
    keep: tuple[str, ...] = ()  # SQL, true of the rows that are kept

    @property
    def sql(self) -> str:
        """Rows of all files, for FROM."""
        return f"{self.source.relation(self.source.files)} WHERE {self.kept}"

    @property
    def kept(self) -> str:
        return " AND ".join(self.keep) or "true"


@dataclass(frozen=True)
class Surveyed:
    """What a log is, all rules kept."""

    num_rows: int
    counts: tuple[int, ...]  # rows of which each fact holds


def survey(
    connection: duckdb.DuckDBPyConnection, reading: Reading, rules: Sequence[Rule], facts: Sequence[str]
) -> Surveyed:
    """Hold every row that is kept against the rules, and count facts.

    Args:
        facts: SQL, each true or false of a row.

    Raises:
        DataError: the files cannot be read, hold no row, none is kept, or one breaks a rule; the first such row of the
            first broken rule is named.
    """
    everything = ", ".join(column.sql for column in reading.source.columns.values())
    # the hash makes the database read what its statistics would tell it
    sums = [f"bit_xor(hash({everything}))", "count(*)"]
    sums += [f"count_if({sql})" for sql in (*(rule.broken for rule in rules), *facts)]
    with reading.source.reading():
        _, num_rows, *counts = connection.execute(f"SELECT {', '.join(sums)} FROM {reading.sql}").fetchall()[0]
    if not num_rows:
        raise _nothing(connection, reading.source)
    for rule, count in zip(rules, counts, strict=False):
        if count:
            raise refusal(connection, reading, rule, count)
    return Surveyed(num_rows, tuple(counts[len(rules) :]))


def refusal(connection: duckdb.DuckDBPyConnection, reading: Reading, rule: Rule, count: int) -> DataError:
    """Say where a rule is broken first, and by what."""
    file, row, value = _first(connection, reading, rule)
    return refused(reading.source.place(file, row), rule, value, count)


def refused(place: str, rule: Rule, value: str | None, count: int) -> DataError:
    """That a rule is broken so many times, first at a place by a value."""
    got = "nothing" if value in (None, "") else repr(value if len(value) <= 80 else value[:80] + "...")
    others = f" and {count - 1} more rows like it" if count > 1 else ""
    return DataError(f"{place}: {rule.column.name} {rule.must}, got {got}{others}; {rule.mend(value or '')}")


def _first(connection: duckdb.DuckDBPyConnection, reading: Reading, rule: Rule) -> tuple[Path, int, str | None]:
    """File, row and value."""
    for file in reading.source.files:
        numbered = f"(SELECT *, row_number() OVER () - 1 AS line FROM {reading.source.relation([file])})"
        broken = f"SELECT line, {rule.column.text} FROM {numbered} WHERE ({reading.kept}) AND ({rule.broken}) LIMIT 1"
        with reading.source.reading():
            found = connection.execute(broken).fetchall()
        if found:
            line, value = found[0]
            return file, line, value
    raise DataError(f"{reading.source.files[0]}: must stay as it is while it is read; start again")


def _nothing(connection: duckdb.DuckDBPyConnection, source: Source) -> DataError:
    with source.reading():
        (num_rows,) = connection.execute(f"SELECT count(*) FROM {source.relation(source.files)}").fetchall()[0]
    if num_rows:
        return DataError(f"{source.files[0]}: must hold rows that --keep keeps, got none of {num_rows}; loosen --keep")
    first, *more = source.files
    others = f" and {len(more)} more files" if more else ""
    return DataError(f"{first}{others}: must hold rows, got none; correct the path")
