"""Impressions into a table of a database, as they are and in order; all refusals of bad ones on the way.

# table        columns
# impressions  user_id, item: of the type that they have in the log; timestamp: BIGINT unix seconds;
#              position: BIGINT, 0.. in the order of the files; label: BIGINT, 0 or 1;
#              dense_0, dense_1, ...: FLOAT; category_0, category_1, ...: VARCHAR, null for none
"""

from pathlib import Path

import duckdb

from ssd_torchrec.data.prepare import rules
from ssd_torchrec.data.prepare.files import log_files
from ssd_torchrec.data.prepare.rules import Rule
from ssd_torchrec.data.prepare.source import Column
from ssd_torchrec.data.prepare.source_text import Layout
from ssd_torchrec.data.prepare.stage import StagedLog, open_files, store
from ssd_torchrec.data.prepare.survey import Reading, survey
from ssd_torchrec.data.ranking.prepare_config import ImpressionsConfig
from ssd_torchrec.errors import DataError


def stage_impressions(
    connection: duckdb.DuckDBPyConnection, impressions: Path, config: ImpressionsConfig, log: StagedLog
) -> int:
    """Make the table impressions; returns how many there are.

    Args:
        connection: a database without this table; its memory limit holds.
        impressions: file or folder.
        log: whose users and items they are of.

    Raises:
        DataError: the impressions are not what they must be: as `stage` says of a log, and an id is of another type
            than in the log, a label is neither 0 nor 1, a dense value is missing or no finite number. The message names
            file, row or line, column, what is expected and the mend.
        duckdb.Error: the database cannot store it.
    """
    connection.execute("SET preserve_insertion_order = true")  # the position is the place in the files
    kind, files = log_files(impressions, config.files, config.format)
    names = config.names(kind)
    further = (config.label, *config.dense, *config.categorical, *(told.column for told in config.conditions))
    wanted = (names.user, names.item, names.timestamp, *further)
    source = open_files(files, Layout.of(kind, config.delimiter, config.columns), wanted, "--columns")
    of = source.columns
    user, item, time, label = of[names.user], of[names.item], of[names.timestamp], of[config.label]
    reading = Reading(source, tuple(rules.meets(told, of[told.column]) for told in config.conditions))
    seconds = rules.as_seconds(time, config.time_unit)
    every_rule = [rule for column in (user, item) for rule in rules.id_rules(column)]
    every_rule += [rules.type_rule(user, log.user_type, "as in the log")]
    every_rule += [rules.type_rule(item, log.item_type, "as in the log")]
    every_rule += rules.time_rules(time, config.time_unit, seconds)
    every_rule += _label_rules(label)
    every_rule += [rule for name in config.dense for rule in _dense_rules(of[name], config.fill_dense)]
    every_rule += [rule for name in config.categorical for rule in rules.value_rules(of[name])]
    found = survey(connection, reading, every_rule, [])
    filled = "NULL" if config.fill_dense is None else f"CAST({config.fill_dense!r} AS FLOAT)"
    selected = {
        "user_id": rules.as_id(user, log.user_type),
        "item": rules.as_id(item, log.item_type),
        "timestamp": seconds,
        "position": "row_number() OVER () - 1",
        "label": _as_label(label),
        **{f"dense_{number}": f"coalesce({_as_float(of[name])}, {filled})" for number, name in enumerate(config.dense)},
        **{f"category_{number}": rules.as_value(of[name]) for number, name in enumerate(config.categorical)},
    }
    store(connection, "impressions", selected, reading)
    return found.num_rows


def _label_rules(column: Column) -> list[Rule]:
    broken = f"{_as_label(column)} IS NULL"
    return [Rule.of(column, broken, "must be 0 or 1", "correct it, or name another column by --label")]


def _as_label(column: Column) -> str:
    """SQL: 0 or 1; null where there is neither."""
    word, number = f"lower({column.text})", f"TRY_CAST({column.text} AS DOUBLE)"
    return (
        f"(CASE WHEN {word} = 'true' OR {number} = 1 THEN CAST(1 AS BIGINT) "
        f"WHEN {word} = 'false' OR {number} = 0 THEN CAST(0 AS BIGINT) END)"
    )


def _dense_rules(column: Column, fill: float | None) -> list[Rule]:
    """Numbers are there, unless they are filled in, and finite."""
    if column.kind in ("instant", "unfit"):
        raise DataError(f"{column.file}: {column.name} must be numbers, got {column.type}; cast it or leave it out")
    missing, number = _no_number(column), _as_float(column)
    fits = f"coalesce(isfinite({number}), false)"
    there = [Rule.of(column, missing, "must not be missing", "fill it in, or give a number by --fill-dense")]
    finite = Rule.of(column, f"NOT {missing} AND NOT {fits}", "must be a finite number of float32", "correct it")
    return [*(there if fill is None else []), finite]


def _no_number(column: Column) -> str:
    """SQL: whether a value is missing, also as NaN, which some programs write for that."""
    # no comparison: duckdb decides those by a Parquet file's least and greatest values, which leave NaN out
    return f"regexp_full_match(coalesce({column.text}, ''), '\\s*(-?[nN][aA][nN])?\\s*')"


def _as_float(column: Column) -> str:
    """SQL: the number as float32; null where there is none, infinite if it is too large."""
    if column.kind == "boolean":
        return f"CAST({column.sql} AS FLOAT)"
    return f"(CASE WHEN regexp_full_match({column.text}, '{rules.NUMBER}') THEN TRY_CAST({column.text} AS FLOAT) END)"
