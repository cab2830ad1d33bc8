"""Which events of its user each impression may know: parts, ids and spans of events, as tables of a database.

# table     columns                    lines
# items     i, item                    items of the log and their table rows
# shown     u, timestamp, position, label, candidate, dense_0, ..., category_0, ...
#                                      impressions that are kept; u is null where the log has no such user
# known     position, events           how many events of its user an impression may know of, if any
# told      u, i, position, timestamp  events of users to whom something is shown, a view
# starts    u, start                   where a user's events begin among all, by user, time and position
# values_0  value, id                  what the ids of the first categorical column mean; values_1, ... likewise

They are made of impressions, as `stage_impressions` leaves it, and of coded, raw_users and raw_items, as `code_events`
leaves them. An impression meets its user's events in one pass over both, ordered by time: nothing is made of pairs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from ssd_torchrec.data.draws import uniform
from ssd_torchrec.data.ranking.prepare_config import PrepareRankingConfig
from ssd_torchrec.data.ranking.schema import PARTS, Part
from ssd_torchrec.data.values import Values
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.errors import DataError

_ARROW: Any = "arrow"  # versions of duckdb have a name for it in different places


@dataclass(frozen=True)
class Cuts:
    """When the parts begin, in unix seconds."""

    valid_from: int
    test_from: int

    def holds(self, part: Part) -> str:
        """SQL: whether an impression is of a part."""
        return {
            "train": f"timestamp < {self.valid_from}",
            "valid": f"timestamp >= {self.valid_from} AND timestamp < {self.test_from}",
            "test": f"timestamp >= {self.test_from}",
        }[part]


def cut_parts(connection: duckdb.DuckDBPyConnection, impressions: Path, config: PrepareRankingConfig) -> Cuts:
    """When the parts of impressions begin.

    Raises:
        DataError: a part would hold none.
    """
    if config.valid_from is not None and config.test_from is not None:
        cuts = Cuts(config.valid_from, config.test_from)
    else:
        cuts = Cuts(*_cuts_of_shares(connection, config))
    counts = ", ".join(f"count(*) FILTER (WHERE {cuts.holds(part)})" for part in PARTS)
    found = dict(zip(PARTS, connection.execute(f"SELECT {counts} FROM impressions").fetchall()[0], strict=True))
    if not all(found.values()):
        raise DataError(
            f"{impressions}: each part must hold impressions, got {found} with validation from {cuts.valid_from} and "
            f"the test part from {cuts.test_from}; give other times by --valid-from and --test-from"
        )
    return cuts


def _cuts_of_shares(connection: duckdb.DuckDBPyConnection, config: PrepareRankingConfig) -> list[int]:
    (rows,) = connection.execute("SELECT count(*) FROM impressions").fetchall()[0]
    test = max(1, round(rows * config.test_share))
    valid = max(1, round(rows * config.valid_share))
    by_time = "SELECT timestamp, sum(count(*)) OVER (ORDER BY timestamp) AS upto FROM impressions GROUP BY timestamp"
    firsts = ", ".join(f"min(timestamp) FILTER (WHERE upto > {max(0, rows - later)})" for later in (valid + test, test))
    return list(connection.execute(f"SELECT {firsts} FROM ({by_time})").fetchall()[0])


def count_items(
    connection: duckdb.DuckDBPyConnection, log: Path, config: PrepareRankingConfig, cuts: Cuts
) -> Vocabulary:
    """The items that have enough events before validation begins, in ascending order.

    Raises:
        DataError: there is none.
    """
    enough = f"HAVING count(*) >= {config.min_count}"
    raw = connection.sql(
        f"SELECT raw FROM raw_items JOIN (SELECT i FROM coded WHERE timestamp < {cuts.valid_from} GROUP BY i {enough}) "
        "USING (i) ORDER BY i"
    ).to_arrow_table()["raw"]
    if not len(raw):
        raise DataError(
            f"{log}: some item must have {config.min_count} events before validation begins at {cuts.valid_from}, none "
            "has; give a log that goes further back, a later --valid-from or a smaller --min-count"
        )
    return Vocabulary(raw, config.num_oov_buckets)


def join_as_of(
    connection: duckdb.DuckDBPyConnection, config: PrepareRankingConfig, cuts: Cuts, vocabulary: Vocabulary
) -> None:
    """Make the tables of coded, raw_users, raw_items and impressions, which is dropped; but for those of values."""
    _offer_functions(connection, vocabulary, config.seed)
    connection.execute("CREATE TABLE items AS SELECT i, row_of(raw) AS item FROM raw_items")
    further = [f"dense_{number}" for number in range(len(config.dense))]
    further += [f"category_{number}" for number in range(len(config.categorical))]
    columns = ", ".join(["u", "timestamp", "position", "label", "row_of(item) AS candidate", *further])
    kept = f"label = 1 OR NOT {cuts.holds('train')} OR drawn(position) < {config.negative_share!r}"
    connection.execute(
        f"CREATE TABLE shown AS SELECT {columns} FROM impressions LEFT JOIN raw_users ON user_id = raw "
        f"WHERE {kept if config.negative_share < 1 else 'true'}"
    )
    connection.execute("DROP TABLE impressions")
    connection.execute("CREATE VIEW told AS SELECT u, i, position, timestamp FROM coded SEMI JOIN shown USING (u)")
    connection.execute(
        "CREATE TABLE starts AS SELECT u, CAST(sum(count(*)) OVER (ORDER BY u) - count(*) AS BIGINT) AS start "
        "FROM told GROUP BY u"
    )
    # at_s of an event is when it is known, and ahead of the impressions of that second: the next one at the earliest
    both = (
        f"SELECT u, timestamp + {max(config.delay_s, 1)} AS at_s, NULL AS position FROM told "
        "UNION ALL SELECT u, timestamp, position FROM shown WHERE u IS NOT NULL"
    )
    before = "PARTITION BY u ORDER BY at_s, position IS NOT NULL ROWS UNBOUNDED PRECEDING"
    connection.execute(
        "CREATE TABLE known AS SELECT position, events FROM (SELECT position, "
        f"count(*) FILTER (WHERE position IS NULL) OVER ({before}) AS events FROM ({both})) "
        "WHERE position IS NOT NULL AND events > 0"
    )


def _offer_functions(connection: duckdb.DuckDBPyConnection, vocabulary: Vocabulary, seed: int) -> None:
    """SQL's row_of, the table row of an item, and drawn, a number in [0, 1) for a place among the impressions."""

    def row_of(raw: pa.ChunkedArray) -> pa.Array:
        return pa.array(vocabulary.rows_of(raw))

    def drawn(position: pa.ChunkedArray) -> pa.Array:
        return pa.array(uniform(seed, position.to_numpy()))

    raw_type = "BIGINT" if pa.types.is_int64(vocabulary.ids.type) else "VARCHAR"
    connection.create_function("row_of", row_of, [raw_type], "BIGINT", type=_ARROW)
    connection.create_function("drawn", drawn, ["BIGINT"], "DOUBLE", type=_ARROW)


def number_values(
    connection: duckdb.DuckDBPyConnection, impressions: Path, config: PrepareRankingConfig, cuts: Cuts
) -> Values:
    """Make the tables of values, of shown; id 0 is for no value and for those that training does not have.

    Raises:
        DataError: a column has no value in the training part.
    """
    found = {}
    for number, name in enumerate(config.categorical):
        connection.execute(
            f"CREATE TABLE values_{number} AS SELECT value, row_number() OVER (ORDER BY value) AS id FROM (SELECT "
            f"DISTINCT category_{number} AS value FROM shown WHERE {cuts.holds('train')}) WHERE value IS NOT NULL"
        )
        values = connection.sql(f"SELECT value FROM values_{number} ORDER BY id").to_arrow_table()["value"]
        if not len(values):
            raise DataError(
                f"{impressions}: {name} must hold a value for some impression of the training part, got none; leave it "
                "out"
            )
        nothing = pa.nulls(1, pa.large_string())
        found[name] = pa.concat_arrays([nothing, values.combine_chunks().cast(pa.large_string())])
    return found
