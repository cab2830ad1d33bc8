"""What is left of a log as rows: users in ascending order, their events in time, ids for the values of other columns.

# table          columns           lines
# left_users     u, user           users of the k-core; user counts them from 0
# known_items    raw, item         items that have table rows from before, in the k-core or not
# left_items     i, item           items of the k-core and their table rows
# left_events    user, item, ...   events of the k-core, a view
# known_values_0 value, id         values of the first further column that have ids from before
# values_0       value, id         what its ids mean; values_1, ... likewise
# bags_0         user, value       the distinct values that a user has of it, if it is a user column
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa

from ssd_torchrec.data.prepare.by_user import ByUser, bags_of, lengths_of
from ssd_torchrec.data.prepare.known import Known
from ssd_torchrec.data.prepare.source import quoted_name
from ssd_torchrec.data.rows import Ints, Rows, offsets_of
from ssd_torchrec.data.values import Values
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.errors import DataError

Order = Literal["int64", "float32-stable"]
TIME: dict[Order, str] = {"int64": "timestamp", "float32-stable": "float32_time"}  # column of coded to order by
_LINES_AT_ONCE = 2**18
_BATCH = 2**16


@dataclass(frozen=True, kw_only=True)
class Extras:
    """The further columns of a log."""

    event: tuple[str, ...] = ()
    """One value an event."""

    user: tuple[str, ...] = ()
    """The distinct values that a user has."""

    of_users_table: bool = False
    """Whether user columns are those of the table users, by user_id, instead of the log's."""

    @property
    def names(self) -> tuple[str, ...]:
        """Columns in the order of their numbers."""
        return (*self.event, *self.user)

    @property
    def of_log(self) -> tuple[str, ...]:
        """Those that lie in the log: extra_0, extra_1, ... of coded."""
        return self.event if self.of_users_table else self.names


@dataclass(frozen=True)
class Left(ABC):
    """What is left, numbered; the rows themselves are read when asked for."""

    extras: Extras
    order: Order
    vocabulary: Vocabulary
    values: Values  # context columns, then event columns
    raw_user_is_string: bool

    @property
    def context(self) -> dict[str, int]:
        return {name: len(self.values[name]) for name in self.extras.user}

    @property
    def event_columns(self) -> dict[str, int]:
        return {name: len(self.values[name]) for name in self.extras.event}

    @abstractmethod
    def blocks(self) -> Iterator[tuple[Rows, pa.Array | None]]:
        """All users in order, some at a time, with their raw names if those are strings."""


@dataclass(frozen=True)
class Assembled(Left):
    """What is left, in the tables above."""

    connection: duckdb.DuckDBPyConnection

    def blocks(self) -> Iterator[tuple[Rows, pa.Array | None]]:
        users = self._by_user('SELECT "user", raw FROM left_users JOIN raw_users USING (u) ORDER BY "user"')
        first_user_column = len(self.extras.event)
        bags = {
            name: self._by_user(
                f'SELECT "user", id FROM bags_{number} JOIN values_{number} USING (value) ORDER BY "user", id'
            )
            for number, name in enumerate(self.extras.user, start=first_user_column)
        }
        for events in self._by_user(self._events()).whole_users(_LINES_AT_ONCE):
            user = events["user"].to_numpy()
            first, stop = int(user[0]), int(user[-1]) + 1
            offsets = offsets_of(lengths_of(user, first, stop))
            timestamp = events["timestamp"].to_numpy()
            raw = users.before(stop)["raw"].combine_chunks()
            rows = Rows(
                user_id=np.arange(first, stop) if self.raw_user_is_string else raw.to_numpy(),
                item=events["item"].to_numpy(),
                timestamp=timestamp if self.order == "int64" else rising(timestamp, offsets),
                offsets=offsets,
                context={name: bags_of(lines.before(stop), first, stop) for name, lines in bags.items()},
                event_columns={name: events[f"id_{n}"].to_numpy() for n, name in enumerate(self.extras.event)},
            )
            yield rows, raw.cast(pa.large_string()) if self.raw_user_is_string else None

    def _events(self) -> str:
        numbers = range(len(self.extras.event))
        ids = "".join(f", coalesce(values_{n}.id, 0) AS id_{n}" for n in numbers)
        joins = "".join(f" LEFT JOIN values_{n} ON extra_{n} = values_{n}.value" for n in numbers)
        order = f'"user", {TIME[self.order]}, position'
        return f'SELECT "user", item, timestamp{ids} FROM left_events{joins} ORDER BY {order}'

    def _by_user(self, query: str) -> ByUser:
        return ByUser(self.connection.cursor().sql(query).to_arrow_reader(_BATCH))


def assemble(
    connection: duckdb.DuckDBPyConnection,
    extras: Extras,
    order: Order,
    num_oov_buckets: int,
    known: Known | None = None,
) -> Assembled:
    """Number what `code_events` and `k_core` left: first what is known, then the rest in ascending order.

    Args:
        known: whose items and values keep their ids; it has the same further columns and `num_oov_buckets`.

    Raises:
        DataError: a further column holds no value for what is left, and none is known.
    """
    connection.execute('CREATE TABLE left_users AS SELECT u, row_number() OVER (ORDER BY u) - 1 AS "user" FROM of_user')
    vocabulary = _number_items(connection, num_oov_buckets, known.vocabulary if known else None)
    connection.execute(
        "CREATE VIEW left_events AS SELECT * FROM coded JOIN left_users USING (u) JOIN left_items USING (i)"
    )
    raw_user_type = connection.sql("SELECT raw FROM raw_users LIMIT 0").to_arrow_table().schema.field("raw").type
    values = known.values if known else {}
    of_event = {name: _event_values(connection, n, name, values.get(name)) for n, name in enumerate(extras.event)}
    of_user = {
        name: _user_values(connection, n, name, values.get(name), extras)
        for n, name in enumerate(extras.user, len(extras.event))
    }
    return Assembled(extras, order, vocabulary, of_user | of_event, not pa.types.is_integer(raw_user_type), connection)


def rising(timestamp: Ints, offsets: Ints) -> Ints:
    """The latest time so far within each row: (E,) int64 that ascends there; what ascends already is left as it is.

    Events in the order of float32 times may fall by up to a float32 step (128 s today, 131 s of a log in ms): they keep
    their order, and an event that is earlier than the one before takes its time.
    """
    if not len(timestamp):
        return timestamp
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    apart = row * (int(timestamp.max()) - int(timestamp.min()) + 1)
    return np.maximum.accumulate(timestamp + apart) - apart


def no_values(name: str) -> DataError:
    """A further column without any."""
    return DataError(f"column {name} must hold a value for some event or user that is left, got none; leave it out")


def _number_items(connection: duckdb.DuckDBPyConnection, num_oov_buckets: int, known: Vocabulary | None) -> Vocabulary:
    """Make left_items."""
    connection.execute("CREATE TABLE known_items AS SELECT raw, 0 AS item FROM raw_items LIMIT 0")
    first = 1 + num_oov_buckets
    if known is not None:
        _insert(connection, "known_items", {"raw": known.ids, "item": np.arange(first, first + len(known))})
        first += len(known)
    connection.execute(
        f"CREATE TABLE left_items AS SELECT i, {_known_or_next('item', first, 'i')} AS item "
        "FROM of_item JOIN raw_items USING (i) LEFT JOIN known_items USING (raw)"
    )
    more = connection.sql(
        f"SELECT raw FROM left_items JOIN raw_items USING (i) WHERE item >= {first} ORDER BY item"
    ).to_arrow_table()["raw"]
    return Vocabulary(more, num_oov_buckets) if known is None else known.extended_by(more)


def _insert(connection: duckdb.DuckDBPyConnection, table: str, columns: dict[str, Any]) -> None:
    connection.register("lines", pa.table(columns))
    connection.execute(f"INSERT INTO {table} SELECT {', '.join(columns)} FROM lines")
    connection.unregister("lines")


def _known_or_next(known: str, first: int, order: str) -> str:
    """SQL: the known id, or for want of one the next from `first` on."""
    return f"coalesce({known}, {first - 1} + row_number() OVER (PARTITION BY {known} IS NULL ORDER BY {order}))"


def _event_values(connection: duckdb.DuckDBPyConnection, number: int, name: str, known: pa.Array | None) -> pa.Array:
    """Make values_{number}; id 0 is for events without a value."""
    connection.execute(f"CREATE VIEW given_{number} AS SELECT extra_{number} AS value FROM left_events")
    nothing = pa.nulls(1, pa.large_string())
    values = _number_values(connection, number, name, first=1, known=nothing[:0] if known is None else known[1:])
    return pa.concat_arrays([nothing, values])


def _user_values(
    connection: duckdb.DuckDBPyConnection, number: int, name: str, known: pa.Array | None, extras: Extras
) -> pa.Array:
    """Make bags_{number} and values_{number}."""
    if extras.of_users_table:
        told = (
            f'SELECT DISTINCT left_users."user", users.{quoted_name(name)} AS value FROM users '
            "JOIN raw_users ON users.user_id = raw_users.raw JOIN left_users ON raw_users.u = left_users.u"
        )
    else:
        told = f'SELECT DISTINCT "user", extra_{number} AS value FROM left_events'
    connection.execute(f"CREATE TABLE bags_{number} AS {told}")
    connection.execute(f"CREATE VIEW given_{number} AS SELECT value FROM bags_{number}")
    none = pa.nulls(0, pa.large_string())
    return _number_values(connection, number, name, first=0, known=none if known is None else known)


def _number_values(
    connection: duckdb.DuckDBPyConnection, number: int, name: str, *, first: int, known: pa.Array
) -> pa.Array:
    connection.execute(f"CREATE TABLE known_values_{number} (value VARCHAR, id BIGINT)")
    _insert(connection, f"known_values_{number}", {"value": known, "id": np.arange(first, first + len(known))})
    connection.execute(
        f"CREATE TABLE values_{number} AS SELECT value, {_known_or_next('id', first + len(known), 'value')} AS id "
        f"FROM (SELECT DISTINCT value FROM given_{number} WHERE value IS NOT NULL) "
        f"FULL JOIN known_values_{number} USING (value)"
    )
    values = connection.sql(f"SELECT value FROM values_{number} ORDER BY id").to_arrow_table()["value"]
    if not len(values):
        raise no_values(name)
    return values.combine_chunks().cast(pa.large_string())
