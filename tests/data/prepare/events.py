"""Logs as they lie in the database once they are read."""

from collections import Counter
from collections.abc import Sequence

import duckdb
import numpy as np
import pyarrow as pa


def events_table(
    users: Sequence[int | str], items: Sequence[int | str], timestamps: Sequence[int] | None = None, **extras: Sequence
) -> pa.Table:
    """Events in the order given; by default all at one time."""
    return pa.table(
        {
            "user_id": pa.array(users),
            "item": pa.array(items),
            "timestamp": pa.array([1000] * len(users) if timestamps is None else timestamps, pa.int64()),
            "position": pa.array(range(len(users)), pa.int64()),
            **{name: pa.array(values, pa.string()) for name, values in extras.items()},
        }
    )


def random_events(seed: int, count: int, num_users: int, num_items: int, seconds: int) -> pa.Table:
    """Skewed users and items, at times of which many are equal."""
    rng = np.random.default_rng(seed)
    users = (num_users * rng.random(count) ** 2).astype(np.int64)
    items = (num_items * rng.random(count) ** 3).astype(np.int64)
    return events_table(7 * users - 50, 3 * items + 10**12, 10**9 + rng.integers(0, seconds, count))


def database(events: pa.Table, users: pa.Table | None = None) -> duckdb.DuckDBPyConnection:
    """In memory, with what `stage` leaves."""
    connection = duckdb.connect()
    for name, table in {"events": events, "users": users}.items():
        if table is not None:
            connection.register("given", table)
            connection.execute(f"CREATE TABLE {name} AS SELECT * FROM given")
            connection.unregister("given")
    return connection


def core_by_hand(pairs: list[tuple[int, int]], k: int) -> list[tuple[int, int]]:
    """The pairs left, by taking away one weak user or item at a time."""
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        weak = [("u", u) for u in users if users[u] < k] + [("i", i) for i in items if items[i] < k]
        if not weak:
            return pairs
        kind, name = weak[0]
        pairs = [(u, i) for u, i in pairs if (u if kind == "u" else i) != name]
