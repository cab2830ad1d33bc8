"""A data set as batches: this rank's share of each global batch, in an order that depends on seed and epoch alone.

Every rank plans the same global batches and reads the same windows of row groups, then keeps its own rows. So all
ranks give equally many batches, whoever got no row of one gives an empty row, and a run goes on at another world size
where it stopped. The caller counts the batches completed; `epoch(epoch, first)` begins at that count without reading
windows that lie before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ssd_torchrec.data.batch import Batch, collate
from ssd_torchrec.data.batch_plan import BatchConfig, Window, evaluation_windows, share_of_rank, training_windows
from ssd_torchrec.data.parquet import UserHistories
from ssd_torchrec.data.prefetch import prefetched
from ssd_torchrec.data.rows import Ints, Rows, ranges
from ssd_torchrec.data.split import Spans, Stage
from ssd_torchrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of each global batch is ours."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank must lie in 0..{self.world_size - 1}, got {self.rank}; take both from the launcher"
            )


class TrainingBatches:
    """All next-item targets of the training events, each once an epoch."""

    def __init__(self, histories: UserHistories, spans: Spans, config: BatchConfig, share: Share | None = None) -> None:
        self._histories, self._config = histories, config
        self._share = share or Share()
        self._lengths = spans.training_inputs

    def count(self, epoch: int) -> int:
        """Global batches of an epoch; planned from lengths, without reading."""
        return sum(len(window.batches) for window in self._windows(epoch))

    def epoch(self, epoch: int, first: int = 0, *, with_candidates: bool = True) -> Iterator[Batch]:
        """Batches of an epoch from number `first` on; every event of them has a target, unless it is unknown.

        Args:
            with_candidates: whether each batch lists the whole catalogue as candidates.

        Raises:
            ConfigError: the epoch has fewer than `first` batches.
        """
        if first > self.count(epoch):
            raise ConfigError(
                f"epoch {epoch} must have {first} batches to go on from, got {self.count(epoch)}; "
                "resume with the data set, seed and tokens_per_batch that the run began with"
            )
        return prefetched(self._batches(epoch, first, with_candidates))

    def _windows(self, epoch: int) -> Iterator[Window]:
        return training_windows(self._lengths, self._histories.row_group_offsets, self._config, epoch)

    def _batches(self, epoch: int, first: int, with_candidates: bool) -> Iterator[Batch]:
        for window in self._windows(epoch):
            skipped = min(first, len(window.batches))
            first -= skipped
            if skipped < len(window.batches):
                loaded = _Loaded.read(self._histories, self._lengths, window)
                for rows in islice(window.batches, skipped, None):
                    yield loaded.training_batch(rows, self._share, with_candidates)


class EvaluationBatches:
    """The histories that a stage asks about, each once, its target at the last event; in the same order every time."""

    def __init__(
        self, histories: UserHistories, spans: Spans, stage: Stage, config: BatchConfig, share: Share | None = None
    ) -> None:
        self._histories, self._config = histories, config
        self._share = share or Share()
        self._lengths = np.maximum(spans.target(stage), 0)

    def __len__(self) -> int:
        return sum(len(window.batches) for window in self._windows())

    def __iter__(self) -> Iterator[Batch]:
        """Batches without candidates: `target` counts from the first item of the catalogue."""
        return prefetched(self._batches())

    def _windows(self) -> Iterator[Window]:
        return evaluation_windows(self._lengths, self._histories.row_group_offsets, self._config)

    def _batches(self) -> Iterator[Batch]:
        for window in self._windows():
            loaded = _Loaded.read(self._histories, self._lengths, window)
            for rows in window.batches:
                yield loaded.evaluation_batch(rows, self._share)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A window in memory."""

    histories: UserHistories
    rows: Rows
    lengths: Ints  # (R,) events that each row brings to a batch; the event after them is there as well
    known_so_far: Ints  # (E+1,) events before each event that are items, not out-of-vocabulary rows

    @classmethod
    def read(cls, histories: UserHistories, lengths: Ints, window: Window) -> "_Loaded":
        rows = Rows.concatenate([histories.read(int(group)) for group in window.row_groups])
        bounds = histories.row_group_offsets
        here = np.concatenate([lengths[bounds[group] : bounds[group + 1]] for group in window.row_groups])
        known = np.cumsum(rows.item >= histories.meta.first_item, dtype=np.int64)
        return cls(histories, rows, here, np.concatenate([np.zeros(1, np.int64), known]))

    def training_batch(self, rows: Ints, share: Share, with_candidates: bool) -> Batch:
        first_target = self.rows.offsets[rows] + 1
        known = self.known_so_far[first_target + self.lengths[rows]] - self.known_so_far[first_target]
        ours = share_of_rank(rows, self.lengths[rows], share.rank, share.world_size)
        return collate(
            self.rows.take(ours, self.lengths[ours]),
            self.rows.item[ranges(self.rows.offsets[ours] + 1, self.lengths[ours])],
            self.histories.meta,
            global_targets=max(int(known.sum()), 1),
            with_candidates=with_candidates,
        )

    def evaluation_batch(self, rows: Ints, share: Share) -> Batch:
        asked = self._item_after(rows)
        ours = share_of_rank(rows, self.lengths[rows], share.rank, share.world_size)
        chosen = self.rows.take(ours, self.lengths[ours])
        target_item = np.full(chosen.num_events, -1)
        target_item[chosen.offsets[1:] - 1] = self._item_after(ours)
        known = int((asked >= self.histories.meta.first_item).sum())
        return collate(chosen, target_item, self.histories.meta, global_targets=max(known, 1), with_candidates=False)

    def _item_after(self, rows: Ints) -> Ints:
        return self.rows.item[self.rows.offsets[rows] + self.lengths[rows]]
