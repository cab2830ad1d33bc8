"""The k-core of a log: what is left when every user and every item has at least k interactions, repetitions counted.

Weak users and weak items leave together, which makes others weak, until none is. What is left does not depend on the
order in which they leave.

    # table      columns                    lines
    # events     user_id, item, ...         the log, given; dropped once it is coded
    # raw_users  raw, u                     users of the log; u counts them in ascending order
    # raw_items  raw, i                     items likewise
    # coded      u, i, position, timestamp, extra_0, extra_1, ...
    #                                       the log with numbers for names
    # pairs      u, i                       what is left of coded; the k-core in the end
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import duckdb

from ssd_torchrec.data.prepare.source import quoted_name
from ssd_torchrec.errors import DataError


@dataclass(frozen=True)
class Counts:
    """How much there is."""

    users: int
    items: int
    events: int

    def __str__(self) -> str:
        return f"{self.users} users, {self.items} items, {self.events} interactions"


def code_events(
    connection: duckdb.DuckDBPyConnection, extras: Sequence[str], *, time: Sequence[str] = ("timestamp",)
) -> None:
    """Make raw_users, raw_items and coded of events, which is dropped.

    Args:
        extras: further columns of events, called extra_0, extra_1, ... from here on.
        time: columns of events that tell their time.
    """
    for table, column, number in (("raw_users", "user_id", "u"), ("raw_items", "item", "i")):
        connection.execute(
            f"CREATE TABLE {table} AS SELECT raw, row_number() OVER (ORDER BY raw) - 1 AS {number} "
            f"FROM (SELECT DISTINCT {column} AS raw FROM events)"
        )
    columns = ["raw_users.u", "raw_items.i", "events.position", *(f"events.{name}" for name in time)]
    columns += [f"events.{quoted_name(name)} AS extra_{number}" for number, name in enumerate(extras)]
    connection.execute(
        f"CREATE TABLE coded AS SELECT {', '.join(columns)} FROM events "
        "JOIN raw_users ON events.user_id = raw_users.raw JOIN raw_items ON events.item = raw_items.raw"
    )
    connection.execute("DROP TABLE events")


def k_core(connection: duckdb.DuckDBPyConnection, k: int) -> Iterator[Counts]:
    """Make pairs of coded; yields the counts of the log, then those after each round.

    Args:
        k: least number of interactions of a user and of an item; 0 and 1 keep all.

    Raises:
        DataError: nothing is left.
    """
    connection.execute("CREATE VIEW pairs AS SELECT u, i FROM coded")
    is_view = iter([True])
    yield from rounds(k, lambda: _count(connection), lambda: _drop_weak(connection, k, next(is_view, False)))


def rounds(k: int, count: Callable[[], Counts], drop_weak: Callable[[], bool]) -> Iterator[Counts]:
    """The counts of the log, then those after each round of its k-core.

    Args:
        count: counts what is left.
        drop_weak: takes the interactions of users and items with fewer than k away; False where there are none.

    Raises:
        DataError: nothing is left.
    """
    kept = [count()]
    yield kept[0]
    while drop_weak():
        kept.append(count())
        if not kept[-1].events:
            told = "; ".join(f"round {number}: {counts}" for number, counts in enumerate(kept) if number)
            raise DataError(
                f"the {k}-core of a log must hold something, got nothing of {kept[0]}; {told}; "
                "give a smaller --k-core (0 keeps all), or a larger part of the log"
            )
        yield kept[-1]


def _count(connection: duckdb.DuckDBPyConnection) -> Counts:
    """Count pairs; leaves the tables of_user (u, n) and of_item (i, n)."""
    for table, number in (("of_user", "u"), ("of_item", "i")):
        connection.execute(
            f"CREATE OR REPLACE TABLE {table} AS SELECT {number}, count(*) AS n FROM pairs GROUP BY {number}"
        )
    counts = "SELECT (SELECT count(*) FROM of_user), (SELECT count(*) FROM of_item), (SELECT count(*) FROM pairs)"
    users, items, events = connection.execute(counts).fetchall()[0]
    return Counts(users, items, events)


def _drop_weak(connection: duckdb.DuckDBPyConnection, k: int, is_view: bool) -> bool:
    """Take the pairs of users and items with fewer than k away; False where there are none."""
    weak = "SELECT (SELECT count(*) FROM of_user WHERE n < ?) + (SELECT count(*) FROM of_item WHERE n < ?)"
    if not connection.execute(weak, [k, k]).fetchall()[0][0]:
        return False
    connection.execute(
        "CREATE TABLE fewer AS SELECT u, i FROM pairs "
        f"WHERE u IN (SELECT u FROM of_user WHERE n >= {k:d}) AND i IN (SELECT i FROM of_item WHERE n >= {k:d})"
    )
    connection.execute("DROP VIEW pairs" if is_view else "DROP TABLE pairs")
    connection.execute("ALTER TABLE fewer RENAME TO pairs")
    return True
