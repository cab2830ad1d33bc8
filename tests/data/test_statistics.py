import numpy as np
import pytest

from ssd_torchrec.data.rows import Rows
from ssd_torchrec.data.split import LeaveOneOut, SplitByTime, spans_of
from ssd_torchrec.data.statistics import item_counts, log_gap_statistics, unknown_targets
from ssd_torchrec.errors import DataError
from tests.data.samples import FIRST_ITEM, NUM_ITEMS, dataset, lists, random_rows, rows_of

LENGTHS = [5, 12, 0, 30, 45, 1, 7, 22, 3, 2, 4, 18]


@pytest.mark.parametrize(
    "split", [LeaveOneOut(), SplitByTime(10**9 + 40_000_000, 10**9 + 60_000_000)], ids=["leave-one-out", "by-time"]
)
def test_gaps_and_items_are_those_of_the_training_events(tmp_path, split):
    rows = random_rows(LENGTHS)
    histories = dataset(tmp_path / "set", rows)
    spans = spans_of(histories, split)
    gaps, items = [], []
    for times, ids, n in zip(
        lists(rows.timestamp, rows.offsets), lists(rows.item, rows.offsets), spans.training_events, strict=True
    ):
        gaps += np.diff(times[:n]).tolist()
        items += ids[:n]
    assert log_gap_statistics(histories, spans) == pytest.approx(
        (np.log1p(gaps).mean(), np.log1p(gaps).std()), rel=1e-12
    )
    expected = np.bincount(np.array(items) - FIRST_ITEM, minlength=NUM_ITEMS)
    assert item_counts(histories, spans).tolist() == expected.tolist()


@pytest.mark.parametrize("lengths", [[], [3, 2], [6]], ids=["no-rows", "no-gaps", "gaps-all-alike"])
def test_gaps_that_tell_nothing_are_refused(tmp_path, lengths):
    histories = dataset(tmp_path / "set", rows_of([[FIRST_ITEM] * n for n in lengths]))
    with pytest.raises(DataError, match=r'apart by different gaps .*or train with time_mode="none"'):
        log_gap_statistics(histories, spans_of(histories, LeaveOneOut()))


def test_unknown_targets_are_counted_by_stage(tmp_path):
    rows = random_rows([6, 6, 2])
    item = rows.item.copy()
    item[[0, 3, 5, 7, 10, 13]] = (
        2  # no target; training and test of row 0; training, validation of row 1; test of row 2
    )
    histories = dataset(tmp_path / "set", Rows(rows.user_id, item, rows.timestamp, rows.offsets, rows.context))
    assert unknown_targets(histories, spans_of(histories, LeaveOneOut())) == {"training": 2, "valid": 1, "test": 2}
