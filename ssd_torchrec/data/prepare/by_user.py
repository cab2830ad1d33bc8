"""What DuckDB hands out user after user, cut where users end and not where its batches do."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from ssd_torchrec.data.rows import Ints, Jagged, offsets_of


class ByUser:
    """Lines ordered by their column "user", which counts users from 0; held in memory until they are taken."""

    def __init__(self, reader: pa.RecordBatchReader) -> None:
        self._reader = reader
        self._held = [reader.schema.empty_table()]

    def whole_users(self, least_lines: int) -> Iterator[pa.Table]:
        """All lines, in tables of whole users; each but the last of at least so many lines."""
        while batch := next(self._reader, None):
            self._held.append(pa.Table.from_batches([batch]))
            if sum(map(len, self._held)) >= least_lines:
                table = self._take_before(int(batch["user"][-1].as_py())) if len(batch) else None
                if table is not None and len(table):
                    yield table
        rest = pa.concat_tables(self._held)
        if len(rest):
            yield rest

    def before(self, user: int) -> pa.Table:
        """The lines of the users before this one that were not taken yet."""
        while self._last() < user and (batch := next(self._reader, None)):
            self._held.append(pa.Table.from_batches([batch]))
        return self._take_before(user)

    def _last(self) -> int:
        return self._held[-1]["user"][-1].as_py() if len(self._held[-1]) else -1

    def _take_before(self, user: int) -> pa.Table:
        table = pa.concat_tables(self._held)
        stop = int(np.searchsorted(table["user"].to_numpy(), user))
        self._held = [table[stop:]]
        return table[:stop]


def lengths_of(user: Ints, first: int, stop: int) -> Ints:
    """How often each of the users first..stop-1 stands in `user`: (stop - first,) int64."""
    return np.bincount(user - first, minlength=stop - first)


def bags_of(table: pa.Table, first: int, stop: int) -> Jagged:
    """The ids of lines (user, id) of the users first..stop-1, a bag a user."""
    lengths = lengths_of(table["user"].to_numpy(), first, stop)
    return Jagged(table["id"].to_numpy(), offsets_of(lengths))
