"""Whole histories of chosen users as batches, each user once, to ask what comes after the last event.

Rows of a data set are chosen by their place in its files. Row groups without a chosen row are not read, and of the
others no more than the chosen rows is kept. As everywhere, all ranks plan the same global batches and keep their share.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ssd_torchrec.data.batch import Batch, collate
from ssd_torchrec.data.batch_plan import BatchConfig, Window, evaluation_windows, share_of_rank
from ssd_torchrec.data.batches import Share, ending_in_mask
from ssd_torchrec.data.parquet import UserHistories
from ssd_torchrec.data.prefetch import prefetched
from ssd_torchrec.data.rows import Ints, Rows


@dataclass(frozen=True, eq=False)
class HistoryBatch:
    """A global batch of histories, and this rank's share of it."""

    batch: Batch  # this rank's rows, without candidates and targets; one empty row if it has none
    chosen: Ints  # (ours,) which of the chosen rows they are
    num_rows: int  # of the global batch


class HistoryBatches:
    """Batches of histories, whole or as long as the config has them; a row without events takes no part.

    Args:
        rows: (C,) chosen rows in the order of the files, ascending, each once.
        asks_at_mask: histories end in a hidden event, at which the next item is asked for.
    """

    def __init__(
        self,
        histories: UserHistories,
        rows: Ints,
        config: BatchConfig,
        share: Share | None = None,
        *,
        asks_at_mask: bool = False,
    ) -> None:
        assert (np.diff(rows) > 0).all(), "chosen rows ascend"
        self._histories, self._rows, self._config = histories, rows, config
        self._share, self._asks_at_mask = share or Share(), asks_at_mask
        self._lengths = histories.counts[rows]
        self._bounds = np.searchsorted(rows, histories.row_group_offsets)  # of the row groups among the chosen rows

    def __iter__(self) -> Iterator[HistoryBatch]:
        return prefetched(self._batches())

    def _batches(self) -> Iterator[HistoryBatch]:
        for window in evaluation_windows(self._lengths, self._bounds, self._config):
            if window.batches:
                yield from self._of_window(window)

    def _of_window(self, window: Window) -> Iterator[HistoryBatch]:
        groups = [int(group) for group in window.row_groups if self._bounds[group] < self._bounds[group + 1]]
        chosen = np.concatenate([np.arange(self._bounds[group], self._bounds[group + 1]) for group in groups])
        rows = Rows.concatenate([self._read(group) for group in groups])
        stretches = window.stretches
        for at in window.batches:
            ours = share_of_rank(at, stretches.length[at], self._share.rank, self._share.world_size)
            asked = stretches[ours].of(rows)
            asked = ending_in_mask(asked) if self._asks_at_mask else asked
            nothing = np.full(asked.num_events, -1)
            batch = collate(asked, nothing, self._histories.meta, global_targets=1, with_candidates=False)
            yield HistoryBatch(batch, chosen[stretches.row[ours]], len(at))

    def _read(self, group: int) -> Rows:
        rows = self._histories.read(group)
        here = self._rows[self._bounds[group] : self._bounds[group + 1]] - self._histories.row_group_offsets[group]
        return rows.take(here, rows.lengths[here])
