"""Parquet files as events on a Spark cluster, held against the rules of every log before anything is made of them.

    # frame   columns                                lines
    # lines   c_0, c_1, ..., file, row               of the files; row counts from 0 in each
    # events  user_id, item, timestamp (seconds), file, row, extra_0, extra_1, ...
    #                                                 those that are kept
    # users   user_id, extra_n, ...                   of the table of users

Values are taken and written as the other engine does, whatever the time zone and the ANSI mode of the session.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ssd_torchrec.data.prepare import rules
from ssd_torchrec.data.prepare.files import format_of
from ssd_torchrec.data.prepare.log import LogConfig, TimeUnit
from ssd_torchrec.data.prepare.rules import Rule
from ssd_torchrec.data.prepare.source import Column, Kind, missing
from ssd_torchrec.data.prepare.spark_session import Frame, Session, readable
from ssd_torchrec.data.prepare.survey import refused
from ssd_torchrec.data.schema import RawType
from ssd_torchrec.errors import ConfigError, DataError

_OF_TEXT = ("columns", "columns_of_users", "delimiter")
_KINDS: dict[str, Kind] = {
    r"tinyint|smallint|int|bigint|decimal\(20,0\)": "integer",  # the last is how Spark calls 64 bits without a sign
    "string": "string",
    r"float|double|decimal\(.*\)": "real",
    "date|timestamp|timestamp_ntz": "instant",
    "boolean": "boolean",
}
_GLOB = re.compile(r"([\\*?\[\]{}])")
_MOST_DECIMALS = 6  # of decimal columns: smaller numbers are written with an exponent


@dataclass(frozen=True)
class SparkLog:
    """What was read."""

    events: Frame
    users: Frame  # None without a table of users
    files: tuple[str, ...]  # as in events, in the order of the log
    num_events: int
    user_type: RawType
    item_type: RawType


@dataclass(frozen=True)
class _Source:
    session: Session
    log: str
    lines: Frame
    columns: dict[str, Column]


def read_log(
    session: Session, log: str, config: LogConfig, *, float32_time: bool, item_type: RawType | None
) -> SparkLog:
    """The events of a log and, if `config.users` is given, the table of users.

    Args:
        log: file or folder, as a path or URL that Spark knows.
        float32_time: whether events get a column float32_time, the time in the log's unit rounded to float32.
        item_type: what raw item ids must be, if other data has some already; None takes them as the log has them.

    Raises:
        ConfigError: an option is for formats other than Parquet.
        DataError: the log is not what it must be, or further columns have values that engines write in different ways.
    """
    _check_options(config)
    names = config.names("parquet")
    of_log = (*config.event_columns, *(() if config.users else config.user_columns))
    conditions = config.conditions
    wanted = (names.user, names.item, names.timestamp, *of_log, *(condition.column for condition in conditions))
    source = _open(session, log, config.files, config.format, wanted)
    user, item, time = (source.columns[name] for name in (names.user, names.item, names.timestamp))
    seconds = _as_seconds(time, config.time_unit)
    every_rule = [*_id_rules(user), *_id_rules(item), *rules.time_rules(time, config.time_unit, seconds)]
    every_rule += [rule for name in of_log for rule in _value_rules(source.columns[name])]
    if item_type is not None:
        every_rule.append(rules.type_rule(item, item_type, "as in the data set that is extended"))
    for condition in conditions:
        _check_time_zone(source.columns[condition.column])
    kept = " AND ".join(rules.meets(told, source.columns[told.column], _text, _DOUBLE) for told in conditions) or "true"
    files, num_events = _survey(source, kept, every_rule)
    selected = {"user_id": _as_id(user), "item": _as_id(item), "timestamp": seconds}
    selected |= {"float32_time": _as_float32(time, config.time_unit, seconds)} if float32_time else {}
    selected |= {"file": "file", "row": "row"} | _as_extras(source, of_log, 0)
    users = _read_users(session, config, names.user, user) if config.users else None
    events = _selected(source.lines.where(kept), selected)
    return SparkLog(events, users, files, num_events, _raw_type(user), _raw_type(item))


def _read_users(session: Session, config: LogConfig, name: str, of_log: Column) -> Frame:
    source = _open(session, config.users, "", "auto", (name, *config.user_columns))
    user = source.columns[name]
    every_rule = [*_id_rules(user), rules.type_rule(user, _raw_type(of_log), "as in the log")]
    every_rule += [rule for told in config.user_columns for rule in _value_rules(source.columns[told])]
    _survey(source, "true", every_rule)
    extras = _as_extras(source, config.user_columns, len(config.event_columns))
    return _selected(source.lines, {"user_id": _as_id(user), **extras})


def _check_options(config: LogConfig) -> None:
    if config.format not in ("auto", "parquet"):
        raise ConfigError(
            f"the engine spark reads Parquet, got the format {config.format}; convert the log, or use the engine duckdb"
        )
    for option in _OF_TEXT:
        if getattr(config, option):
            raise ConfigError(f"{option} is for logs of text, the engine spark reads Parquet; leave it out")


def _open(session: Session, log: str, pattern: str, asked: str, wanted: Sequence[str]) -> _Source:
    with readable(log):
        files = _reader(session, pattern).schema("c INT").parquet(log).inputFiles()
    _check_files(log, files, any_name=bool(pattern) or asked != "auto")
    with readable(log):
        found = _reader(session, pattern).parquet(log)
    for name in wanted:
        if name not in found.columns:
            raise missing(log, name, found.columns)
    columns = {name: _column(log, number, name, found) for number, name in enumerate(dict.fromkeys(wanted))}
    schema = found.select(*map(_quoted, columns)).schema
    place = ["_metadata.file_path AS file", "_metadata.row_index AS row"]
    renamed = [f"{_quoted(name)} AS {column.sql}" for name, column in columns.items()]
    lines = _reader(session, pattern).schema(schema).parquet(log).selectExpr(*renamed, *place)
    return _Source(session, log, lines, columns)


def _reader(session: Session, pattern: str) -> Any:
    options = {"recursiveFileLookup": True, "ignoreCorruptFiles": False, "ignoreMissingFiles": False}
    return session.read.options(mergeSchema=False, **options, **({"pathGlobFilter": pattern} if pattern else {}))


def _check_files(log: str, files: Sequence[str], *, any_name: bool) -> None:
    if not files:
        raise DataError(f"{log} must hold Parquet files, got none; correct the path or --files")
    if any_name:
        return
    for file in files:
        if format_of(Path(file)) != "parquet":
            raise DataError(
                f"{log} must hold Parquet files for the engine spark, got {_path(file)}; choose with --files "
                "'*.parquet', give --format parquet if it is one, or convert the log, or use the engine duckdb"
            )


def _column(log: str, number: int, name: str, found: Frame) -> Column:
    kind = found.schema[name].dataType.simpleString()
    fitting: list[Kind] = [of for pattern, of in _KINDS.items() if re.fullmatch(pattern, kind)]
    return Column(name, f"c_{number}", log, fitting[0] if fitting else "unfit", kind)


def _survey(source: _Source, kept: str, every_rule: Sequence[Rule]) -> tuple[tuple[str, ...], int]:
    """Hold every line that is kept against the rules: the files in order, and how many lines are kept."""
    filled = [f"count({column.sql})" for column in source.columns.values()]
    sums = ["count(*)", *filled, *(f"count_if({sql})" for sql in (kept, *(_broken(kept, rule) for rule in every_rule)))]
    named = ", ".join(f"{sql} AS n_{number}" for number, sql in enumerate(sums))
    with readable(source.log):
        told_of = source.session.sql(f"SELECT file, {named} FROM {{lines}} GROUP BY file", lines=source.lines).collect()
    counts = {file: numbers for file, *numbers in sorted(told_of, key=lambda row: unquote(row[0]).split("/"))}
    for file, (_, *numbers) in counts.items():
        for column, number in zip(source.columns.values(), numbers, strict=False):
            if not number:
                _check_column(source, file, column)
    num_rows, num_kept = (sum(numbers[at] for numbers in counts.values()) for at in (0, 1 + len(filled)))
    if not num_rows:
        raise DataError(f"{source.log}: must hold rows, got none; correct the path")
    if not num_kept:
        raise DataError(f"{source.log}: must hold rows that --keep keeps, got none of {num_rows}; loosen --keep")
    for at, rule in enumerate(every_rule, start=2 + len(filled)):
        if count := sum(numbers[at] for numbers in counts.values()):
            raise _refusal(source, next(file for file in counts if counts[file][at]), kept, rule, count)
    return tuple(counts), num_kept


def _broken(kept: str, rule: Rule) -> str:
    return f"({kept}) AND ({rule.broken})"


def _refusal(source: _Source, file: str, kept: str, rule: Rule, count: int) -> DataError:
    there = source.lines.where(f"file = {_text(file)} AND {_broken(kept, rule)}").orderBy("row")
    with readable(source.log):
        row, value = there.selectExpr("row", rule.column.text).first()
    return refused(f"{_path(file)}, row {row}", rule, value, count)


def _check_column(source: _Source, file: str, column: Column) -> None:
    """Tell a column that is missing in a file from one that holds nothing there."""
    path = _GLOB.sub(r"\\\1", unquote(file))
    with readable(source.log):
        there = source.session.read.parquet(path).columns
    if column.name not in there:
        raise missing(_path(file), column.name, there)


def _id_rules(column: Column) -> list[Rule]:
    return [*rules.id_rules(column), *_text_rules(column)]


def _value_rules(column: Column) -> list[Rule]:
    """Values of further columns become the same text as elsewhere."""
    _check_time_zone(column)
    decimals = re.fullmatch(r"decimal\(\d+,(\d+)\)", column.type)
    if decimals and int(decimals[1]) > _MOST_DECIMALS:
        raise DataError(
            f"{column.file}: {column.name} must have at most {_MOST_DECIMALS} decimals, got {column.type}; cast it"
        )
    found = [*rules.value_rules(column), *_text_rules(column)]
    if column.type in ("float", "double"):
        same = f"abs({column.sql}) < 1000 AND CAST({_decimal(column)} AS {column.type}) = {column.sql}"
        broken = f"{column.sql} IS NOT NULL AND NOT coalesce({same}, false)"
        must = "must lie within -1000..1000 and have at most 3 decimals, as categories"
        found.append(Rule.of(column, broken, must, "cast it to strings or leave it out"))
    return found


def _text_rules(column: Column) -> list[Rule]:
    if column.kind != "string":
        return []
    broken = f"encode({column.sql}, 'UTF-8') <> CAST({column.sql} AS BINARY)"
    return [Rule.of(column, broken, "must be UTF-8 text", "write it again")]


def _check_time_zone(column: Column) -> None:
    if column.type == "timestamp":
        raise DataError(
            f"{column.file}: {column.name} must be the same text in every time zone, got {column.type}; cast it to "
            "strings or dates, or leave it out"
        )


def _raw_type(column: Column) -> RawType:
    return "int64" if column.kind == "integer" else "string"


def _as_id(column: Column) -> str:
    return f"TRY_CAST({column.sql} AS {'BIGINT' if column.kind == 'integer' else 'STRING'})"


def _as_extras(source: _Source, names: Sequence[str], first: int) -> dict[str, str]:
    return {f"extra_{n}": _as_value(source.columns[name]) for n, name in enumerate(names, start=first)}


def _as_value(column: Column) -> str:
    if column.type not in ("float", "double"):
        return rules.as_value(column)
    zeros = _text(r"(\.[0-9]+?)0+\z")
    return f"regexp_replace(CAST({_decimal(column)} AS STRING), {zeros}, '$1')"


def _decimal(column: Column) -> str:
    return f"TRY_CAST({column.sql} AS DECIMAL(7,3))"


def _as_seconds(column: Column, unit: TimeUnit) -> str:
    """SQL: unix seconds, rounded down; null where there is no time."""
    if column.type == "timestamp":
        return f"unix_seconds({column.sql})"
    if column.kind == "instant":
        return _seconds_of_clock(f"CAST({column.sql} AS TIMESTAMP_NTZ)")
    if unit == "iso":
        clock = _seconds_of_clock(f"TRY_CAST({column.sql} AS TIMESTAMP_NTZ)")
        return f"(CASE WHEN {_matches(column, rules.ISO)} THEN {clock} END)"
    per_second = rules.PER_SECOND[unit]
    whole, real = f"TRY_CAST({column.sql} AS BIGINT)", f"TRY_CAST({column.sql} AS DOUBLE)"
    as_whole = f"CASE WHEN {whole} < 0 THEN -1 ELSE {whole} div {per_second} END"
    as_real = f"CASE WHEN abs({real}) < 9e18D THEN floor({real} / {per_second}) END"
    if column.kind == "string":
        digits, number = _matches(column, r"\s*[0-9]{1,18}\s*"), _matches(column, rules.NUMBER)
        return f"(CASE WHEN {digits} THEN {as_whole} WHEN {number} THEN {as_real} END)"
    return f"({as_whole if column.kind == 'integer' else as_real})"


def _seconds_of_clock(clock: str) -> str:
    parts = f"3600 * hour({clock}) + 60 * minute({clock}) + second({clock})"
    return f"(86400L * unix_date(CAST({clock} AS DATE)) + {parts})"


def _as_float32(column: Column, unit: TimeUnit, seconds: str) -> str:
    if column.kind == "instant" or unit == "iso":
        return f"CAST({seconds} AS FLOAT)"
    return f"CAST(TRY_CAST({column.sql} AS DOUBLE) AS FLOAT)"


def _matches(column: Column, pattern: str) -> str:
    whole = _text(rf"\A(?:{pattern})\z")
    return f"{column.sql} RLIKE {whole}"


def _text(value: str) -> str:
    """SQL: text, whatever the session makes of quotes and backslashes."""
    return f"CAST(X'{value.encode().hex()}' AS STRING)"


_DOUBLE = "CASE WHEN {0} RLIKE " + _text(rf"\A(?:{rules.NUMBER})\z") + " THEN TRY_CAST({0} AS DOUBLE) END"


def _selected(lines: Frame, columns: dict[str, str]) -> Frame:
    return lines.selectExpr(*(f"{sql} AS {name}" for name, sql in columns.items()))


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _path(file: str) -> str:
    """A file as people write it."""
    return re.sub(r"^file:/+", "/", unquote(file))
