"""Users' histories as flat arrays: R rows laid end to end, cut by offsets, as they lie in a Parquet row group.

# offsets    0        3  3     5      (R+1,) int64
# item       7  3  3     9  4         (E,) int64 rows of the item table
# timestamp  5  6  6     1  2         (E,) int64 unix seconds, ascending within a row
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Jagged:
    """Values of R rows end to end."""

    values: Ints  # (E,)
    offsets: Ints  # (R+1,)

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)

    def take(self, rows: Ints) -> "Jagged":
        """The rows at these positions, in this order."""
        lengths = self.lengths[rows]
        return Jagged(self.values[ranges(self.offsets[rows], lengths)], offsets_of(lengths))

    def padded(self, rows: int) -> "Jagged":
        """With empty rows behind, so that there are `rows`."""
        return Jagged(self.values, np.pad(self.offsets, (0, rows + 1 - len(self.offsets)), mode="edge"))

    @staticmethod
    def concatenate(parts: list["Jagged"]) -> "Jagged":
        lengths = [part.lengths for part in parts]
        return Jagged(_joined([part.values for part in parts]), offsets_of(_joined(lengths)))


@dataclass(frozen=True, eq=False)
class Rows:
    """R users, one row each; context columns hold a bag of ids a user, further event columns an id an event."""

    user_id: Ints  # (R,)
    item: Ints  # (E,)
    timestamp: Ints  # (E,)
    offsets: Ints  # (R+1,) of item and timestamp
    context: dict[str, Jagged] = field(default_factory=dict)
    event_columns: dict[str, Ints] = field(default_factory=dict)  # (E,) each

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_events(self) -> int:
        return len(self.item)

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)

    def __getitem__(self, span: slice) -> "Rows":
        """Consecutive rows, as views where numpy gives them."""
        first, stop, step = span.indices(self.num_rows)
        assert step == 1, "rows are cut, not strided"
        stop = max(first, stop)
        events = slice(self.offsets[first], self.offsets[stop])
        context = {
            name: Jagged(bags.values[bags.offsets[first] : bags.offsets[stop]], _rebased(bags.offsets, first, stop))
            for name, bags in self.context.items()
        }
        return Rows(
            user_id=self.user_id[first:stop],
            item=self.item[events],
            timestamp=self.timestamp[events],
            offsets=_rebased(self.offsets, first, stop),
            context=context,
            event_columns={name: values[events] for name, values in self.event_columns.items()},
        )

    def take(self, rows: Ints, events: Ints, skipped: Ints | int = 0) -> "Rows":
        """The rows at these positions, in this order, each cut to its first `events` after those skipped."""
        there = ranges(self.offsets[rows] + skipped, events)
        context = {name: bags.take(rows) for name, bags in self.context.items()}
        return Rows(
            user_id=self.user_id[rows],
            item=self.item[there],
            timestamp=self.timestamp[there],
            offsets=offsets_of(events),
            context=context,
            event_columns={name: values[there] for name, values in self.event_columns.items()},
        )

    @staticmethod
    def concatenate(parts: list["Rows"]) -> "Rows":
        """All rows of the parts, in order; parts share their context and event columns."""
        return Rows(
            user_id=_joined([part.user_id for part in parts]),
            item=_joined([part.item for part in parts]),
            timestamp=_joined([part.timestamp for part in parts]),
            offsets=offsets_of(_joined([part.lengths for part in parts])),
            context={name: Jagged.concatenate([part.context[name] for part in parts]) for name in parts[0].context},
            event_columns={
                name: _joined([part.event_columns[name] for part in parts]) for name in parts[0].event_columns
            },
        )


def even_offsets(count: int, rows: int) -> Ints:
    """(rows+1,) offsets that lay `count` values over rows, no two of them longer or shorter by more than 1."""
    return np.arange(rows + 1) * count // rows


def offsets_of(lengths: Ints) -> Ints:
    """(R,) lengths to (R+1,) int64 offsets."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """Positions start, start+1, ..., start+length-1 of each range, end to end: (sum of lengths,) int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return shift + np.arange(len(shift))


def cut_under_budget(lengths: Ints, budget: int) -> Ints:
    """Cut consecutive rows into groups of at most `budget` events; a longer row is its own group.

    Returns:
        (groups + 1,) int64 boundaries, from 0 to R; empty rows cost nothing.
    """
    ends = offsets_of(lengths)
    cuts = [0]
    while cuts[-1] < len(lengths):
        first = cuts[-1]
        stop = int(np.searchsorted(ends, ends[first] + budget, side="right")) - 1
        cuts.append(max(stop, first + 1))
    return np.array(cuts, np.int64)


def _rebased(offsets: Ints, first: int, stop: int) -> Ints:
    return offsets[first : stop + 1] - offsets[first]


def _joined(parts: list[Ints]) -> Ints:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
