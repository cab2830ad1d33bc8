"""What the values of a log must be, as SQL that tells which are not.

Times in the log's unit count from 1970. They must fall into 1980..2100, which tells the units apart: a number that is
a time there in one unit is none in any other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite

from ssd_torchrec.data.prepare.log import Condition, TimeUnit
from ssd_torchrec.data.prepare.source import Column, quoted_text
from ssd_torchrec.data.schema import RawType
from ssd_torchrec.errors import DataError

FIRST_S, LAST_S = 315_532_800, 4_102_444_800  # 1980-01-01 and 2100-01-01
PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 1_000, "us": 1_000_000}
_WHOLE = "('UBIGINT', 'BIGINT', 'HUGEINT', 'UHUGEINT')"
NUMBER = r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*"
ISO = r"[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?Z?)?"
_UNITS_S = {"ms": 1e-3, "us": 1e-6, "s": 1.0, "ns": 1e-9, "minutes": 60.0, "hours": 3600.0, "days": 86400.0}


@dataclass(frozen=True)
class Rule:
    """What each value of a column must be."""

    column: Column
    broken: str  # SQL: whether a value is not so
    must: str  # "must ..."
    mend: Callable[[str], str]  # of the first value that is not so

    @classmethod
    def of(cls, column: Column, broken: str, must: str, mend: str) -> "Rule":
        return cls(column, broken, must, lambda _: mend)


def id_rules(column: Column) -> list[Rule]:
    """Ids are there, and strings or whole numbers of 64 bits."""
    must_be = "must be whole numbers or strings"
    if column.kind in ("real", "instant", "boolean", "unfit"):
        mend = "cast it, dropping rows without an id first" if column.kind == "real" else "cast it"
        raise DataError(f"{column.file}: {column.name} {must_be}, got {column.type}; {mend}")
    rules = [Rule.of(column, column.is_empty, "must not be null or empty", "drop the row")]
    if column.kind == "json":
        fits = f"json_type({column.sql}) = 'VARCHAR' OR json_type({column.sql}) IN {_WHOLE}"
        rules.append(
            Rule.of(column, f"NOT (regexp_full_match({column.text}, '-?[0-9]+') OR {fits})", must_be, "correct it")
        )
    if column.kind in ("json", "integer"):
        number = column.sql if column.kind == "integer" else column.text
        broken = f"TRY_CAST({number} AS BIGINT) IS NULL AND {column.sql} IS NOT NULL"
        broken += f" AND json_type({column.sql}) <> 'VARCHAR'" if column.kind == "json" else ""
        rules.append(Rule.of(column, broken, "must fit into 64 bits with a sign", "write the ids as strings"))
    return rules


def is_integer(column: Column) -> str:
    """SQL: whether an id is a whole number of 64 bits, written as we would."""
    if column.kind == "integer":
        return "true"
    if column.kind == "string":
        return "false"
    canonical = f"coalesce(CAST(TRY_CAST({column.text} AS BIGINT) AS VARCHAR) = {column.text}, false)"
    return canonical if column.kind == "text" else f"(json_type({column.sql}) <> 'VARCHAR' AND {canonical})"


def is_string(column: Column) -> str:
    """SQL: whether an id is a string."""
    if column.kind == "json":
        return f"(json_type({column.sql}) = 'VARCHAR')"
    return "false" if column.kind == "integer" else "true"


def type_rule(column: Column, raw_type: RawType, others: str) -> Rule:
    """Ids are of the same type as others; text without a type can be either.

    Args:
        others: "as ...", for messages.
    """
    if raw_type == "int64":
        return Rule.of(column, f"NOT {is_integer(column)}", f"must be whole numbers {others}", "correct it")
    return Rule.of(column, f"NOT {is_string(column)}", f"must be strings {others}", "write every id as a string")


def as_id(column: Column, raw_type: RawType) -> str:
    """SQL: an id in its type."""
    return f"CAST({column.text} AS {'BIGINT' if raw_type == 'int64' else 'STRING'})"


def as_value(column: Column) -> str:
    """SQL: a value of a further column; empty is null."""
    return f"nullif({column.text}, '')"


def value_rules(column: Column) -> list[Rule]:
    """Further columns hold one value a row."""
    if column.kind == "unfit":
        raise DataError(
            f"{column.file}: {column.name} must hold one value a row, got {column.type}; cast it or leave it out"
        )
    if column.kind != "json":
        return []
    broken = f"json_type({column.sql}) IN ('ARRAY', 'OBJECT')"
    return [Rule.of(column, broken, "must hold one value a line", "correct it or leave the column out")]


def as_seconds(column: Column, unit: TimeUnit) -> str:
    """SQL: unix seconds, rounded down; null where there is no time."""
    if column.kind == "instant":
        ns = "[ns" in column.type
        return f"({'epoch_ns' if ns else 'epoch_us'}({column.sql}) // {10**9 if ns else 10**6})"
    if unit == "iso":
        instant = f"epoch_us(TRY_CAST({column.text} AS TIMESTAMP)) // 1000000"
        return f"(CASE WHEN regexp_full_match({column.text}, '{ISO}') THEN {instant} END)"
    per_second = PER_SECOND[unit]
    if column.kind == "integer":
        return f"CAST({column.sql} // {per_second} AS BIGINT)"
    real = f"TRY_CAST(floor(TRY_CAST({column.text} AS DOUBLE) / {per_second}) AS BIGINT)"
    if column.kind == "real":
        return real
    return (
        f"(CASE WHEN regexp_full_match({column.text}, '\\s*[0-9]{{1,18}}\\s*') "
        f"THEN TRY_CAST({column.text} AS BIGINT) // {per_second} "
        f"WHEN regexp_full_match({column.text}, '{NUMBER}') THEN {real} END)"
    )


def as_float32(column: Column, unit: TimeUnit) -> str:
    """SQL: the number that the log has for a time, rounded to float32; dates count in seconds."""
    if column.kind == "instant" or unit == "iso":
        return f"CAST({as_seconds(column, unit)} AS FLOAT)"
    return f"CAST(CAST({column.text} AS DOUBLE) AS FLOAT)"


def time_rules(column: Column, unit: TimeUnit, seconds: str) -> list[Rule]:
    """Times are there, of their unit, and of our days.

    Args:
        seconds: SQL, the unix seconds of a time; null where there is none.
    """
    if column.kind in ("boolean", "unfit") or (unit == "iso" and column.kind in ("integer", "real")):
        mend = "give --time-unit s, ms or us" if column.kind in ("integer", "real") else "cast it"
        raise DataError(f"{column.file}: {column.name} must be {_unit_in_words(unit)}, got {column.type}; {mend}")
    told = "" if column.kind == "instant" else f" as {_unit_in_words(unit)}"
    return [
        Rule.of(column, column.is_empty, "must not be null or empty", "drop the row"),
        Rule(column, f"{seconds} IS NULL", f"must be {_unit_in_words(unit)}", lambda value: _mend(column, unit, value)),
        Rule.of(column, f"{seconds} < 0", "must not be negative", "correct the time or drop the row"),
        Rule(
            column,
            f"{seconds} NOT BETWEEN {FIRST_S} AND {LAST_S - 1}",
            f"must fall into 1980..2100{told}",
            lambda value: _mend(column, unit, value),
        ),
    ]


def meets(
    condition: Condition,
    column: Column,
    quoted: Callable[[str], str] = quoted_text,
    as_double: str = "TRY_CAST({} AS DOUBLE)",
) -> str:
    """SQL: whether a line is kept.

    Args:
        quoted: text as SQL takes it.
        as_double: SQL, the number that {} is as text; null if it is none.
    """
    value = quoted(condition.value)
    as_number = f"{as_double.format(column.text)} {condition.operator} {as_double.format(value)}"
    if condition.operator not in ("=", "!="):
        return f"coalesce({as_number}, false)"
    return f"coalesce({as_number}, {column.text} {condition.operator} {value}, false)"


def fitting_unit(value: float) -> str:
    """The unit in which a number is a time of 1980..2100; empty if there is none."""
    return next((unit for unit, unit_s in _UNITS_S.items() if FIRST_S <= value * unit_s < LAST_S), "")


def _unit_in_words(unit: TimeUnit) -> str:
    return (
        "dates such as 2016-03-09 or 2016-03-09 13:05:00 in UTC" if unit == "iso" else f"numbers of {unit} since 1970"
    )


def _mend(column: Column, unit: TimeUnit, text: str) -> str:
    """What to do about a time that is none in the unit of the log."""
    correct = "correct the time or drop the row"
    is_date = text[:4].isdigit() and text[4:5] == "-"
    if is_date and column.kind != "instant":
        return "write it like these" if unit == "iso" else "give --time-unit iso"
    try:
        value = float(text)
    except ValueError:
        return correct
    fits = fitting_unit(value)
    if not fits:
        return f"{correct}, or leave such rows out, as by --keep '{column.name}>=N'" if isfinite(value) else correct
    day = datetime.fromtimestamp(value * _UNITS_S[fits], UTC)
    mends = {"ns": "divide the column by 1000 and give --time-unit us"}
    mends |= {fit: f"give --time-unit {fit}" for fit in PER_SECOND}
    return f"in {fits} it is {day:%Y-%m-%d}: {mends.get(fits, f'multiply the column by {_UNITS_S[fits]:.0f}')}"
