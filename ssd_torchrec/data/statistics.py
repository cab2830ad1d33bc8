"""What is counted before training, each in one streaming pass; of later events only whether they are known items."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ssd_torchrec.data.parquet import UserHistories
from ssd_torchrec.data.rows import Ints, Rows, ranges
from ssd_torchrec.data.split import Spans
from ssd_torchrec.errors import DataError


def log_gap_statistics(histories: UserHistories, spans: Spans) -> tuple[float, float]:
    """Mean and standard deviation of log1p(seconds since the previous event) over training events.

    A row's first event has no gap and is left out. Summed in fp64, row group after row group: deterministic.

    Raises:
        DataError: fewer than two different gaps, so there is nothing to normalise by.
    """
    count, mean, squares = 0, 0.0, 0.0
    for rows, events in _row_groups(histories, spans.training_events):
        later = ranges(rows.offsets[:-1] + 1, np.maximum(events - 1, 0))
        log_gaps = np.log1p((rows.timestamp[later] - rows.timestamp[later - 1]).astype(np.float64))
        if not len(log_gaps):
            continue
        here, total = float(log_gaps.mean()), count + len(log_gaps)
        squares += float(((log_gaps - here) ** 2).sum()) + (here - mean) ** 2 * count * len(log_gaps) / total
        mean += (here - mean) * len(log_gaps) / total
        count = total
    if not squares:
        raise DataError(
            f"training events must be apart by different gaps for a time-aware model, got {count} gaps all alike; "
            'give the log its timestamps, or train with time_mode="none"'
        )
    return mean, float(np.sqrt(squares / count))


def item_counts(histories: UserHistories, spans: Spans) -> Tensor:
    """(V,) int64 training events of each item, counted from the first item; what most-popular recommends by."""
    meta = histories.meta
    counts = np.zeros(meta.num_table_rows, np.int64)
    for rows, events in _row_groups(histories, spans.training_events):
        counts += np.bincount(rows.item[ranges(rows.offsets[:-1], events)], minlength=meta.num_table_rows)
    return torch.from_numpy(counts[meta.first_item :])


def unknown_targets(histories: UserHistories, spans: Spans) -> dict[str, int]:
    """Targets of "training", "valid" and "test" that are out-of-vocabulary rows, which no batch asks for."""
    unknown: dict[str, int] = dict.fromkeys(("training", "valid", "test"), 0)
    stages = np.stack([spans.training_inputs, spans.valid_target, spans.test_target], axis=1)
    for rows, (inputs, valid, test) in ((r, s.T) for r, s in _row_groups(histories, stages)):
        is_unknown = rows.item < histories.meta.first_item
        begins = rows.offsets[:-1]
        unknown["training"] += int(is_unknown[ranges(begins + 1, inputs)].sum())
        unknown["valid"] += int(is_unknown[(begins + valid)[valid >= 0]].sum())
        unknown["test"] += int(is_unknown[(begins + test)[test >= 0]].sum())
    return unknown


def _row_groups(histories: UserHistories, of_row: Ints) -> Iterator[tuple[Rows, Ints]]:
    """Each row group with its part of an (R, ...) array."""
    bounds = histories.row_group_offsets
    for number, rows in enumerate(histories):
        yield rows, of_row[bounds[number] : bounds[number + 1]]
