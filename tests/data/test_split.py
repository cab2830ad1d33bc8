import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_torchrec.data.split import LeaveOneOut, Spans, SplitByTime, spans_of
from ssd_torchrec.errors import ConfigError
from tests.data.samples import FEW, dataset, jagged, random_rows, rows_of

SHORT = {0: (0, -1, -1), 1: (0, -1, -1), 2: (0, -1, 1), 3: (1, 1, 2), 4: (2, 2, 3), 9: (7, 7, 8)}


@pytest.mark.parametrize("length", SHORT)
def test_leaving_one_out_short_rows_take_part_in_what_they_can(length):
    spans = LeaveOneOut().spans(np.array([length]))
    assert (spans.training_events[0], spans.valid_target[0], spans.test_target[0]) == SHORT[length]


def test_inputs_are_the_training_events_with_a_training_event_after_them():
    spans = LeaveOneOut().spans(np.array([0, 2, 3, 4, 6]))
    assert spans.training_inputs.tolist() == [0, 0, 0, 1, 3]


PERIODS = {
    "all-periods": ([1, 5, 12, 15, 25, 30], (2, 2, 4)),
    "cuts-belong-to-the-later-period": ([1, 10, 20], (1, 1, 2)),
    "nothing-after-training": ([1, 5, 9], (3, -1, -1)),
    "no-validation": ([1, 5, 25], (2, -1, 2)),
    "no-test": ([1, 12, 15], (1, 1, -1)),
    "begins-in-validation": ([12, 15, 25], (0, -1, 2)),
    "one-event-of-validation-is-history-of-the-test": ([12, 25], (0, -1, 1)),
    "begins-in-test": ([25, 30], (0, -1, -1)),
    "events-at-once": ([5, 5, 10, 10], (2, 2, -1)),
    "empty": ([], (0, -1, -1)),
}


@pytest.mark.parametrize(("timestamps", "expected"), PERIODS.values(), ids=PERIODS)
def test_a_split_by_time_asks_for_the_first_event_of_each_period(timestamps, expected):
    row = jagged([timestamps])
    spans = SplitByTime(10, 20).spans(row.lengths, row)
    assert (spans.training_events[0], spans.valid_target[0], spans.test_target[0]) == expected


@FEW
@given(st.lists(st.lists(st.integers(0, 30), max_size=6).map(sorted), max_size=5))
def test_training_never_sees_the_time_that_is_asked_about(rows):
    timestamps = jagged(rows)
    spans = SplitByTime(10, 20).spans(timestamps.lengths, timestamps)
    for row, train, valid, test in zip(rows, spans.training_events, spans.valid_target, spans.test_target, strict=True):
        assert all(t < 10 for t in row[:train])
        assert all(t >= 10 for t in row[train:])
        assert valid == -1 or (valid > 0 and 10 <= row[valid] < 20 and all(t < 10 for t in row[:valid]))
        assert test == -1 or (test > 0 and row[test] >= 20 and all(t < 20 for t in row[:test]))


@pytest.mark.parametrize("cuts", [(20, 10), (10, 10), (-1, 10)], ids=["falling", "equal", "negative"])
def test_cut_points_that_cut_nothing_are_refused(cuts):
    with pytest.raises(ConfigError, match="must have 0 <= valid_from_s < test_from_s"):
        SplitByTime(*cuts)


def test_counts_tell_who_takes_no_part():
    counts = LeaveOneOut().spans(np.array([0, 1, 2, 3, 6])).counts()
    assert str(counts) == (
        "rows 5, rows_without_training 4, rows_without_valid 3, rows_without_test 2, training_targets 3"
    )


def test_a_data_set_is_cut_row_group_by_row_group(tmp_path):
    lengths = [5, 12, 0, 30, 45, 1, 7]
    histories = dataset(tmp_path / "set", random_rows(lengths))
    assert histories.num_row_groups > 2
    assert spans_of(histories, LeaveOneOut()).test_target.tolist() == [4, 11, -1, 29, 44, -1, 6]
    rows = random_rows(lengths)
    split = SplitByTime(int(rows.timestamp[3]), int(rows.timestamp[60]))
    spans = spans_of(histories, split)
    assert spans.training_events.tolist() == [3, 0, 0, 0, 0, 0, 0]
    assert spans.valid_target.tolist() == [3, -1, -1, -1, -1, -1, -1]
    assert spans.test_target.tolist() == [-1, -1, -1, -1, 13, -1, -1]


def test_no_rows_have_no_spans(tmp_path):
    histories = dataset(tmp_path / "set", rows_of([]))
    for split in (LeaveOneOut(), SplitByTime(1, 2)):
        assert spans_of(histories, split).counts().rows == 0
    assert Spans.concatenate([]).training_inputs.tolist() == []
