"""A raw log into the tables of a database: events as they are, in order; all refusals of bad logs on the way.

    # table   columns
    # events  user_id, item: BIGINT or VARCHAR; timestamp: BIGINT unix seconds; position: BIGINT, 0.. in the order of
    #         the log, files by name and lines as they come; further columns: VARCHAR
    # users   user_id as in events; further columns: VARCHAR

The log is read twice, first to hold every value against its rules, then to store it; nothing of its size is held in
memory. Ids are integers where the log says so by its types (Parquet, JSON), and where it has no types (CSV, TSV, .dat,
.inter) if all of them in all files are whole numbers of 64 bits as one would write them: 007, +7 and 7.0 are strings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from ssd_torchrec.data.prepare import rules
from ssd_torchrec.data.prepare.files import check_gzip, is_gzip, log_files
from ssd_torchrec.data.prepare.log import MOVIELENS_RATINGS, MOVIELENS_USERS, LogConfig
from ssd_torchrec.data.prepare.source import Column, Source, quoted_name
from ssd_torchrec.data.prepare.source_json import open_json
from ssd_torchrec.data.prepare.source_parquet import open_parquet
from ssd_torchrec.data.prepare.source_text import Layout, open_text
from ssd_torchrec.data.prepare.survey import Reading, refusal, survey
from ssd_torchrec.data.schema import RawType
from ssd_torchrec.errors import ConfigError

_STAGED = ("user_id", "item", "timestamp", "position", "float32_time")


@dataclass(frozen=True)
class StagedLog:
    """What lies in the database."""

    num_events: int
    user_type: RawType
    item_type: RawType
    columns: tuple[str, ...]  # of events
    files: tuple[Path, ...]  # of the log, in order


def stage(
    connection: duckdb.DuckDBPyConnection,
    log: Path,
    config: LogConfig,
    *,
    float32_time: bool = False,
    item_type: RawType | None = None,
) -> StagedLog:
    """Make the table events of a log and, if `config.users` is given, the table users.

    Args:
        connection: a database without these tables; its memory limit holds.
        log: file or folder.
        float32_time: whether events get a column float32_time, the time in the log's unit rounded to float32.
        item_type: what raw item ids must be, if other data has some already; None takes them as the log has them.

    Raises:
        ConfigError: a further column has a name that the tables cannot have.
        DataError: the log is not what it must be: missing, empty, cut short, corrupt or not UTF-8; a line is malformed;
            a column is missing, null or of another type; an id is beyond 64 bits; a time is negative, or not of its
            unit. The message names file, row or line, column, what is expected and the mend.
        duckdb.Error: the database cannot store it.
    """
    _check_names(config)
    connection.execute("SET preserve_insertion_order = true")  # the position is the place in the log
    kind, files = log_files(log, config.files, config.format)
    names = config.names(kind)
    of_log = (*config.event_columns, *(() if config.users else config.user_columns))
    wanted = (names.user, names.item, names.timestamp, *of_log, *(told.column for told in config.conditions))
    layout = Layout.of(kind, config.delimiter, config.columns or (MOVIELENS_RATINGS if kind == "dat" else ()))
    source = open_files(files, layout, wanted, "--columns")
    user, item, time = (source.columns[name] for name in (names.user, names.item, names.timestamp))
    reading = Reading(source, tuple(rules.meets(told, source.columns[told.column]) for told in config.conditions))
    seconds = rules.as_seconds(time, config.time_unit)
    every_rule = [*rules.id_rules(user), *rules.id_rules(item), *rules.time_rules(time, config.time_unit, seconds)]
    every_rule += [rule for name in of_log for rule in rules.value_rules(source.columns[name])]
    if item_type is not None:
        every_rule.append(rules.type_rule(item, item_type, "as in the data set that is extended"))
    found = survey(connection, reading, every_rule, [rules.is_integer(user), rules.is_integer(item)])
    user_type = _raw_type(connection, reading, user, found.num_rows, found.counts[0])
    item_type = item_type or _raw_type(connection, reading, item, found.num_rows, found.counts[1])
    selected = {
        "user_id": rules.as_id(user, user_type),
        "item": rules.as_id(item, item_type),
        "timestamp": seconds,
        "position": "row_number() OVER () - 1",
        **({"float32_time": rules.as_float32(time, config.time_unit)} if float32_time else {}),
        **{name: rules.as_value(source.columns[name]) for name in of_log},
    }
    store(connection, "events", selected, reading)
    if config.users:
        _stage_users(connection, Path(config.users), config, names.user, user_type)
    return StagedLog(found.num_rows, user_type, item_type, tuple(selected), files)


def _stage_users(
    connection: duckdb.DuckDBPyConnection, users: Path, config: LogConfig, name: str, user_type: RawType
) -> None:
    kind, files = log_files(users, "", "auto")
    layout = Layout.of(kind, "", config.columns_of_users or (MOVIELENS_USERS if kind == "dat" else ()))
    source = open_files(files, layout, (name, *config.user_columns), "--columns-of-users")
    reading, user = Reading(source), source.columns[name]
    every_rule = [*rules.id_rules(user), rules.type_rule(user, user_type, "as in the log")]
    every_rule += [rule for told in config.user_columns for rule in rules.value_rules(source.columns[told])]
    survey(connection, reading, every_rule, [])
    values = {told: rules.as_value(source.columns[told]) for told in config.user_columns}
    store(connection, "users", {"user_id": rules.as_id(user, user_type), **values}, reading)


def _check_names(config: LogConfig) -> None:
    folded = [name.lower() for name in (*_STAGED, *config.event_columns, *config.user_columns)]
    if twice := sorted({name for name in folded if folded.count(name) > 1}):
        raise ConfigError(
            f"event_columns and user_columns must differ from each other and from {list(_STAGED)}, upper and lower "
            f"case alike, got {twice} twice; rename them in the log or leave them out"
        )


def open_files(files: tuple[Path, ...], layout: Layout, wanted: Sequence[str], option: str) -> Source:
    """The columns of files, each once; text that is compressed is whole."""
    wanted = tuple(dict.fromkeys(wanted))
    if layout.format == "parquet":
        return open_parquet(files, wanted)
    for file in filter(is_gzip, files):
        check_gzip(file)
    return open_json(files, wanted) if layout.format == "jsonl" else open_text(files, layout, wanted, option)


def _raw_type(
    connection: duckdb.DuckDBPyConnection, reading: Reading, column: Column, num_rows: int, integers: int
) -> RawType:
    """What the ids of a column are, of whose rows so many are integers."""
    if integers == num_rows:
        return "int64"
    if integers and column.kind == "json":
        few: RawType = "string" if 2 * integers < num_rows else "int64"
        raise refusal(
            connection, reading, rules.type_rule(column, few, "as in other rows"), min(integers, num_rows - integers)
        )
    return "string"


def store(connection: duckdb.DuckDBPyConnection, table: str, selected: dict[str, str], reading: Reading) -> None:
    """Make a table of the rows that are read.

    Args:
        selected: SQL of each of its columns.
    """
    columns = ", ".join(f"{sql} AS {quoted_name(name)}" for name, sql in selected.items())
    connection.execute(f"CREATE TABLE {table} AS SELECT {columns} FROM {reading.sql}")
