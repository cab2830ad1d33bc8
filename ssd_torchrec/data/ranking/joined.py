"""Impressions as rows, with their histories: spans of all events, which lie by user and time in two files.

The files let impressions come in an order of their own, which is time, without a copy of each history in the sort.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from ssd_torchrec.data.ranking.as_of import Cuts
from ssd_torchrec.data.ranking.prepare_config import CANDIDATE, PrepareRankingConfig
from ssd_torchrec.data.ranking.rows import RankingRows
from ssd_torchrec.data.ranking.schema import Part, times_of
from ssd_torchrec.data.rows import Ints, Jagged, cut_under_budget, offsets_of, ranges

_BATCH = 2**16
_EVENTS_AT_ONCE = 2**21


class JoinedImpressions:
    """What `join_as_of` left, as rows; the events lie in two files, in which each impression has a span.

    Args:
        folder: takes the files, 16 bytes an event.
    """

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, folder: Path, config: PrepareRankingConfig, cuts: Cuts
    ) -> None:
        self._connection, self._config, self._cuts = connection, config, cuts
        events = "SELECT item, timestamp FROM told JOIN items USING (i) ORDER BY u, timestamp, position"
        files = {name: folder / f"{name}.int64" for name in ("item", "timestamp")}
        with files["item"].open("wb") as item, files["timestamp"].open("wb") as timestamp:
            for batch in connection.cursor().sql(events).to_arrow_reader(_BATCH):
                batch["item"].to_numpy().tofile(item)
                batch["timestamp"].to_numpy().tofile(timestamp)
        self._item, self._timestamp = (_mapped(file) for file in files.values())

    def blocks(self, part: Part, rows_at_once: int) -> Iterator[RankingRows]:
        """The impressions of a part by time, and of one time by their place in the files, so many at a time.

        Longer histories than are usual come in smaller blocks, for the memory that they take.
        """
        query = self._query(self._cuts.holds(part))
        for batch in self._connection.cursor().sql(query).to_arrow_reader(rows_at_once):
            boundaries = cut_under_budget(batch["events"].to_numpy(), _EVENTS_AT_ONCE).tolist()
            for first, stop in pairwise(boundaries):
                yield self._rows(batch.slice(first, stop - first))

    def _query(self, condition: str) -> str:
        categories = range(len(self._config.categorical))
        events = f"least(coalesce(known.events, 0), {self._config.max_history})"
        columns = ["label", "timestamp", "candidate", *(f"dense_{n}" for n in range(len(self._config.dense)))]
        columns += [f"coalesce(values_{n}.id, 0) AS id_{n}" for n in categories]
        columns += [f"{events} AS events", f"coalesce(start + known.events, 0) - {events} AS first"]
        joins = [f"LEFT JOIN values_{n} ON category_{n} = values_{n}.value" for n in categories]
        tables = " ".join(["shown LEFT JOIN known USING (position) LEFT JOIN starts USING (u)", *joins])
        return f"SELECT {', '.join(columns)} FROM {tables} WHERE {condition} ORDER BY timestamp, position"

    def _rows(self, lines: pa.RecordBatch) -> RankingRows:
        numbers = {name: lines[name].to_numpy() for name in lines.schema.names}
        each = np.arange(len(lines) + 1)
        offsets, there = offsets_of(numbers["events"]), ranges(numbers["first"], numbers["events"])
        dense = [numbers[f"dense_{number}"] for number in range(len(self._config.dense))]
        return RankingRows(
            label=numbers["label"],
            timestamp=numbers["timestamp"],
            dense=np.stack(dense, axis=1) if dense else np.zeros((len(lines), 0), np.float32),
            jagged={
                CANDIDATE: Jagged(numbers["candidate"], each),
                **{name: Jagged(numbers[f"id_{n}"], each) for n, name in enumerate(self._config.categorical)},
                self._config.history: Jagged(self._item[there], offsets),
                times_of(self._config.history): Jagged(self._timestamp[there], offsets),
            },
        )


def _mapped(file: Path) -> Ints:
    """Numbers of a file that the system reads as they are asked for; it maps no empty file."""
    if not file.stat().st_size:
        return np.zeros(0, np.int64)
    return np.asarray(np.memmap(file, np.int64, mode="r"))
