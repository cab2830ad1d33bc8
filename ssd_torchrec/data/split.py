"""Which events train, and which event is the validation and the test target of each row.

A row is only ever cut at its end: training sees the first `training_events` events, and a stage predicts one event from
all events before it. So three numbers a row say all:

    # events of a row           e0  e1  e2  e3  e4
    # training_events  3        x   x   x                inputs e0 e1, their targets e1 e2
    # valid_target     3                    ?            from e0..e2; -1 where the row has none
    # test_target      4                        ?        from e0..e3; -1 where the row has none

A row that is too short takes part in what it can: one training event has no target, a target at position 0 has no
history and is none. Nothing is dropped unsaid: `Spans.counts()` tells how many rows each stage goes without.
"""

from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np

from ssd_torchrec.data.parquet import UserHistories
from ssd_torchrec.data.rows import Ints, Jagged
from ssd_torchrec.errors import ConfigError

Stage = Literal["valid", "test"]


@dataclass(frozen=True, eq=False)
class Spans:
    """How a split cuts each of R rows."""

    training_events: Ints  # (R,)
    valid_target: Ints  # (R,) positions in the row, -1 for none
    test_target: Ints  # (R,)

    @property
    def training_inputs(self) -> Ints:
        """(R,) events that have a next event within training; as many targets."""
        return np.maximum(self.training_events - 1, 0)

    def target(self, stage: Stage) -> Ints:
        """(R,) position of the target of this stage, which is also the length of its history; -1 for none."""
        return self.valid_target if stage == "valid" else self.test_target

    def counts(self) -> "SpanCounts":
        return SpanCounts(
            rows=len(self.training_events),
            rows_without_training=int((self.training_inputs == 0).sum()),
            rows_without_valid=int((self.valid_target < 0).sum()),
            rows_without_test=int((self.test_target < 0).sum()),
            training_targets=int(self.training_inputs.sum()),
        )

    @staticmethod
    def concatenate(parts: list["Spans"]) -> "Spans":
        none = np.zeros(0, np.int64)
        columns = zip(*((p.training_events, p.valid_target, p.test_target) for p in parts), strict=True)
        return Spans(*(np.concatenate(column) for column in columns)) if parts else Spans(none, none, none)


@dataclass(frozen=True, kw_only=True)
class SpanCounts:
    """How many rows take part in what."""

    rows: int
    rows_without_training: int
    rows_without_valid: int
    rows_without_test: int
    training_targets: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


class Split(Protocol):
    """A rule that cuts rows; it looks at timestamps only if it says so."""

    needs_timestamps: bool

    def spans(self, lengths: Ints, timestamps: Jagged | None) -> Spans:
        """Cut R rows of these lengths; `timestamps` are theirs, or none if the rule does not need them."""
        ...


@dataclass(frozen=True)
class LeaveOneOut:
    """A row's last event is its test target, the one before its validation target, the rest train.

    A row of 3 events trains nothing, one of 2 has a test target only, one of 1 takes no part.
    """

    needs_timestamps = False

    def spans(self, lengths: Ints, timestamps: Jagged | None = None) -> Spans:
        """Cut by position alone."""
        return Spans(
            training_events=np.maximum(lengths - 2, 0),
            valid_target=np.where(lengths >= 3, lengths - 2, -1),
            test_target=np.where(lengths >= 2, lengths - 1, -1),
        )


@dataclass(frozen=True)
class SplitByTime:
    """Events before `valid_from_s` train; each later period asks for a row's first event in it.

    The validation target is the first event in [valid_from_s, test_from_s), the test target the first at or after
    test_from_s, each given all events before it. Later events of a period are neither trained on nor asked for.
    """

    valid_from_s: int  # unix seconds
    test_from_s: int

    needs_timestamps = True

    def __post_init__(self) -> None:
        if not 0 <= self.valid_from_s < self.test_from_s:
            raise ConfigError(
                f"a split by time must have 0 <= valid_from_s < test_from_s in unix seconds, got {self.valid_from_s} "
                f"and {self.test_from_s}; give the later one to the test"
            )

    def spans(self, lengths: Ints, timestamps: Jagged | None) -> Spans:
        """Cut by the timestamps, which ascend in each row."""
        assert timestamps is not None, "a split by time is given timestamps"
        before_valid = _count_per_row(timestamps.values < self.valid_from_s, timestamps.offsets)
        before_test = _count_per_row(timestamps.values < self.test_from_s, timestamps.offsets)
        has_valid = (before_valid > 0) & (before_test > before_valid)
        has_test = (before_test > 0) & (lengths > before_test)
        return Spans(before_valid, np.where(has_valid, before_valid, -1), np.where(has_test, before_test, -1))


def spans_of(histories: UserHistories, split: Split) -> Spans:
    """Cut all rows of a data set; reads the timestamps once if the split needs them."""
    if not split.needs_timestamps:
        return split.spans(histories.counts, None)
    return Spans.concatenate([split.spans(r.lengths, Jagged(r.timestamp, r.offsets)) for r in histories])


def _count_per_row(true_events: np.ndarray, offsets: Ints) -> Ints:
    so_far = np.concatenate([np.zeros(1, np.int64), np.cumsum(true_events, dtype=np.int64)])
    return so_far[offsets[1:]] - so_far[offsets[:-1]]
