"""A data set as batches: this rank's share of each global batch, in an order that depends on seed and epoch alone.

Every rank plans the same global batches and reads the same windows of row groups, then keeps its own rows. So all
ranks give equally many batches, whoever got no row of one gives an empty row, and a run goes on at another world size
where it stopped. The caller counts the batches completed; `epoch(epoch, first)` begins at that count without reading
windows that lie before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from ssd_torchrec.data.batch import Batch, collate
from ssd_torchrec.data.batch_plan import (
    BatchConfig,
    Stretches,
    Window,
    evaluation_windows,
    share_of_rank,
    training_windows,
)
from ssd_torchrec.data.negatives import NegativeSampler, SharedNegatives
from ssd_torchrec.data.objective import MASK, ObjectiveConfig
from ssd_torchrec.data.parquet import UserHistories
from ssd_torchrec.data.prefetch import prefetched
from ssd_torchrec.data.questions import Questions
from ssd_torchrec.data.rows import Ints, Rows, offsets_of
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
    """All that an objective asks of the training events, each once an epoch."""

    def __init__(
        self,
        histories: UserHistories,
        spans: Spans,
        config: BatchConfig,
        share: Share | None = None,
        objective: ObjectiveConfig | None = None,
        counts: Ints | None = None,
    ) -> None:
        """`counts`: (V,) training events of each item, which negatives for the whole batch are drawn by."""
        self._histories, self._config = histories, config
        self._share = share or Share()
        self._objective = objective or ObjectiveConfig()
        self._lengths = self._objective.events(spans)
        self._training_events = spans.training_events
        self._sampler = _sampler(self._objective, counts)

    def count(self, epoch: int) -> int:
        """Global batches of an epoch; planned from lengths, without reading."""
        return sum(len(window.batches) for window in self._windows(epoch))

    def epoch(self, epoch: int, first: int = 0, *, with_candidates: bool = True) -> Iterator[Batch]:
        """Batches of an epoch from number `first` on.

        Args:
            with_candidates: whether each batch lists the whole catalogue as candidates, if the loss is over it.

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
        bounds = self._histories.row_group_offsets
        return training_windows(self._lengths, bounds, self._config, epoch, self._objective.cut)

    def _batches(self, epoch: int, first: int, with_candidates: bool) -> Iterator[Batch]:
        for window in self._windows(epoch):
            skipped = min(first, len(window.batches))
            first -= skipped
            if skipped < len(window.batches):
                rows, training_events = _read(self._histories, window, self._training_events)
                questions = Questions(
                    self._objective,
                    rows,
                    training_events,
                    window.stretches,
                    self._histories.meta,
                    draw=(self._config.seed, epoch, window.number),
                )
                for number, batch in enumerate(islice(window.batches, skipped, None), skipped):
                    shared = self._shared_negatives(questions, number, batch)
                    yield self._batch(questions, batch, with_candidates, shared)

    def _batch(self, questions: Questions, batch: Ints, with_candidates: bool, shared: SharedNegatives | None) -> Batch:
        stretches = questions.stretches
        ours = share_of_rank(batch, stretches.length[batch], self._share.rank, self._share.world_size)
        asked = questions.of(ours)
        return collate(
            replace(stretches[ours].of(questions.rows), item=asked.item),
            asked.target_item,
            self._histories.meta,
            global_targets=max(questions.count(batch), 1),
            with_candidates=with_candidates,
            negative_item=asked.negative_item,
            shared=shared,
        )

    def _shared_negatives(self, questions: Questions, number: int, batch: Ints) -> SharedNegatives | None:
        """Those of a global batch, of which this is the number in its window."""
        if self._sampler is None:
            return None
        if self._sampler.kind != "in_batch":
            return self._sampler.shared(*questions.draw, number)
        first_item = self._histories.meta.first_item
        targets = questions.target_items(batch)
        return self._sampler.among(targets[targets >= first_item] - first_item)


class EvaluationBatches:
    """The histories that a stage asks about, each once, its target at the last event; in the same order every time."""

    def __init__(
        self,
        histories: UserHistories,
        spans: Spans,
        stage: Stage,
        config: BatchConfig,
        share: Share | None = None,
        *,
        asks_at_mask: bool = False,
    ) -> None:
        """`asks_at_mask`: histories end in a hidden event, at which the target stands."""
        self._histories, self._config = histories, config
        self._share, self._asks_at_mask = share or Share(), asks_at_mask
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
            rows, _ = _read(self._histories, window, self._lengths)
            after = rows.item[rows.offsets[window.stretches.row] + window.stretches.stop]
            for batch in window.batches:
                yield self._batch(rows, window.stretches, after, batch)

    def _batch(self, rows: Rows, stretches: Stretches, after: Ints, batch: Ints) -> Batch:
        ours = share_of_rank(batch, stretches.length[batch], self._share.rank, self._share.world_size)
        chosen = stretches[ours].of(rows)
        chosen = ending_in_mask(chosen) if self._asks_at_mask else chosen
        target_item = np.full(chosen.num_events, -1)
        target_item[chosen.offsets[1:] - 1] = after[ours]
        meta = self._histories.meta
        known = int((after[batch] >= meta.first_item).sum())
        return collate(chosen, target_item, meta, global_targets=max(known, 1), with_candidates=False)


def _sampler(objective: ObjectiveConfig, counts: Ints | None) -> NegativeSampler | None:
    if objective.loss != "sampled_softmax":
        return None
    if counts is None:
        raise ConfigError("counts of items must be given for sampled_softmax, got none; take them from item_counts()")
    return NegativeSampler(objective.negatives, objective.num_negatives, counts)


def _read(histories: UserHistories, window: Window, of_row: Ints) -> tuple[Rows, Ints]:
    """The rows of a window, and their part of an (R,) array of the data set."""
    rows = Rows.concatenate([histories.read(int(group)) for group in window.row_groups])
    bounds = histories.row_group_offsets
    return rows, np.concatenate([of_row[bounds[group] : bounds[group + 1]] for group in window.row_groups])


def ending_in_mask(rows: Rows) -> Rows:
    """Each row with one more event after its last: at the same time, its item hidden. Rows have events.

    Its event columns are the last event's, and hidden by `collate`.
    """
    lengths = rows.lengths + 1
    ends = np.cumsum(lengths)
    there = np.arange(ends[-1] if len(ends) else 0) - np.repeat(np.arange(len(lengths)), lengths)
    there[ends - 1] -= 1
    item = rows.item[there]
    item[ends - 1] = MASK
    return replace(
        rows,
        item=item,
        timestamp=rows.timestamp[there],
        offsets=offsets_of(lengths),
        event_columns={name: values[there] for name, values in rows.event_columns.items()},
    )
