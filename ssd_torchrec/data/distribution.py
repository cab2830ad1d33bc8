"""How a stream of whole numbers is spread: quantiles and bars in constant memory, the same in whatever order they come.

Values are counted in buckets: one a value below 256, then 64 an octave, so that a quantile is off by less than 1/128 of
itself. Number, least, greatest and mean are exact.

    # bucket     0 1 2 ... 255 | 256..259  260..263 ... 508..511 | 512..519 ...
"""

from dataclasses import dataclass

import numpy as np

from ssd_torchrec.data.rows import Ints, ranges
from ssd_torchrec.errors import ConfigError, DataError

_PER_OCTAVE = 64
_EXACT_OCTAVES = 8  # below 2**8 each value has its own bucket
_QUANTILES = {"p10": 0.10, "p25": 0.25, "p50": 0.50, "p75": 0.75, "p90": 0.90, "p99": 0.99}
_LOW_BITS = 32
_LOW = 2**_LOW_BITS - 1


@dataclass(frozen=True)
class Bar:
    """How many values lie in a range."""

    least: int
    greatest: int  # inclusive
    count: int


class Distribution:
    """Counts non-negative int64 values as they pass.

    spread = Distribution()
    for rows in histories:
        spread.add(rows.lengths)
    spread.quantile(0.5), spread.summary(), spread.bars()
    """

    def __init__(self) -> None:
        self._buckets = np.zeros(len(_STARTS), np.int64)
        self._sum = 0  # a Python int: seconds of 10**10 gaps pass 2**63
        self._least, self._greatest = 2**63 - 1, 0

    def add(self, values: Ints) -> None:
        """Count these, any shape, none among them.

        Raises:
            DataError: one is negative, or they are no whole numbers.
        """
        if values.dtype.kind != "i":
            raise DataError(
                f"values to be counted must be whole numbers of a signed type, got {values.dtype}; cast them"
            )
        values = values.reshape(-1).astype(np.int64, copy=False)
        if not len(values):
            return
        least = int(values.min())
        if least < 0:
            raise DataError(f"values to be counted must be at least 0, got {least}; check rows before counting them")
        self._least, self._greatest = min(self._least, least), max(self._greatest, int(values.max()))
        self._sum += (int((values >> _LOW_BITS).sum()) << _LOW_BITS) + int((values & _LOW).sum())
        self._buckets += np.bincount(_bucket_of(values), minlength=len(_STARTS))

    @property
    def count(self) -> int:
        """Values added."""
        return int(self._buckets.sum())

    @property
    def mean(self) -> float:
        """Exact up to the rounding of the result; NaN of nothing."""
        return self._sum / self.count if self.count else float("nan")

    def quantile(self, share: float) -> float:
        """The least value that at least this share of the values does not pass; NaN of nothing.

        Below 256 and at the ends it is the value itself, elsewhere the middle of its bucket.

        Raises:
            ConfigError: `share` lies outside 0..1.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"the share of a quantile must be 0..1, got {share}; divide percent by 100")
        if not self.count:
            return float("nan")
        rank = max(int(np.ceil(share * self.count)), 1)  # 1 is the least value
        if rank == self.count:
            return float(self._greatest)
        bucket = int(np.searchsorted(np.cumsum(self._buckets), rank))
        middle = (int(_STARTS[bucket]) + _last_of(bucket)) / 2
        return float(min(max(middle, self._least), self._greatest))

    def summary(self) -> dict[str, float]:
        """Least, quantiles, greatest and mean by name (min, p10, p25, p50, p75, p90, p99, max, mean); {} of nothing."""
        if not self.count:
            return {}
        quantiles = {name: self.quantile(share) for name, share in _QUANTILES.items()}
        return {"min": float(self._least), **quantiles, "max": float(self._greatest), "mean": self.mean}

    def bars(self, per_octave: int = 1) -> list[Bar]:
        """Counts by range, from the least value's to the greatest value's; none of nothing.

        Zero is a bar of its own, then each doubling is cut into `per_octave` ranges, or into single values where it
        holds fewer.

        Raises:
            ConfigError: `per_octave` is none of 1, 2, 4, ..., 64.
        """
        if per_octave not in (allowed := [2**power for power in range(7)]):
            raise ConfigError(f"per_octave must be one of {allowed}, got {per_octave}; take the next lower one")
        if not self.count:
            return []
        cut = np.concatenate([_starts(per_octave, exact_octaves=0), [2**63]], dtype=object)
        counts = np.add.reduceat(self._buckets, _bucket_of(cut[:-1].astype(np.int64)))
        filled = np.flatnonzero(counts)
        shown = range(int(filled[0]), int(filled[-1]) + 1)
        return [Bar(int(cut[at]), int(cut[at + 1]) - 1, int(counts[at])) for at in shown]


def gaps_of(timestamp: Ints, offsets: Ints) -> Ints:
    """Time from each event to the next of its row, row after row: int64, one fewer than events for each row with any.

    Args:
        timestamp: (E,) of rows laid end to end.
        offsets: (R+1,) where the rows begin.
    """
    lengths = np.diff(offsets)
    later = ranges(offsets[:-1] + 1, np.maximum(lengths - 1, 0))
    return timestamp[later] - timestamp[later - 1]


def _starts(per_octave: int, exact_octaves: int) -> Ints:
    """First value of each range: 0, then `per_octave` an octave; every value has its own below 2**exact_octaves."""
    starts = [0]
    for octave in range(63):
        parts = min(2**octave, per_octave) if octave >= exact_octaves else 2**octave
        starts += [2**octave + part * 2**octave // parts for part in range(parts)]
    return np.array(starts, np.int64)


_STARTS = _starts(_PER_OCTAVE, _EXACT_OCTAVES)


def _bucket_of(values: Ints) -> Ints:
    return np.searchsorted(_STARTS, values, side="right") - 1


def _last_of(bucket: int) -> int:
    return int(_STARTS[bucket + 1]) - 1 if bucket + 1 < len(_STARTS) else 2**63 - 1
