"""A ranking data set as torchrec's batches: this rank's share of each global batch, ordered by seed and epoch alone.

Every rank reads the same windows of row groups and keeps its own rows of every batch, as many as the others. A run goes
on at another world size where it stopped: the caller counts the batches completed and begins at that count, without
reading windows that lie before it.
"""

from collections.abc import Iterator

import numpy as np
from torchrec.datasets.utils import Batch

from ssd_torchrec.data.batches import Share
from ssd_torchrec.data.prefetch import prefetched
from ssd_torchrec.data.ranking.folder import RankingPart
from ssd_torchrec.data.ranking.rows import RankingRows
from ssd_torchrec.data.rows import Ints, offsets_of
from ssd_torchrec.errors import ConfigError

GROUPS_PER_WINDOW = 16  # row groups that are shuffled together


class RankingBatches:
    """Batches of one part.

    Args:
        part: where the rows come from.
        rows_per_batch: of a global batch; each rank gets as many of them.
        share: which rows are ours.
        seed: decides the order of training.

    Raises:
        ConfigError: the ranks cannot get equally many rows, or there are too few for one batch to train on.
    """

    def __init__(self, part: RankingPart, rows_per_batch: int, share: Share | None = None, seed: int = 0) -> None:
        share = share or Share()
        if rows_per_batch < 1 or rows_per_batch % share.world_size:
            raise ConfigError(
                f"rows_per_batch must be a multiple of the {share.world_size} ranks, so that each gets as many, got "
                f"{rows_per_batch}; raise it to {-(-max(rows_per_batch, 1) // share.world_size) * share.world_size}"
            )
        self._part, self._rows, self._share, self._seed = part, rows_per_batch, share, seed

    def count(self) -> int:
        """Global batches of an epoch of training; what does not fill one is left to the next epoch's order."""
        return len(self._part) // self._rows

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Training batches from number `first` on, shuffled.

        Raises:
            ConfigError: the epoch has fewer than `first` batches, or none.
        """
        if not self.count():
            raise ConfigError(
                f"there must be {self._rows} rows for a batch, got {len(self._part)}; lower rows_per_batch"
            )
        if first > self.count():
            raise ConfigError(
                f"an epoch must have {first} batches to go on from, got {self.count()}; resume with the data set and "
                "rows_per_batch that the run began with"
            )
        return prefetched(self._ours(self._windows(epoch, first * self._rows), whole=True))

    def in_order(self) -> Iterator[Batch]:
        """All rows as they lie; the last batch is smaller, and a rank without a row of it gets one of label -1."""
        groups = (self._part.read(group) for group in range(len(self._part.group_sizes)))
        return prefetched(self._ours(groups, whole=False))

    def _ours(self, blocks: Iterator[RankingRows], whole: bool) -> Iterator[Batch]:
        rest: RankingRows | None = None
        for block in blocks:
            rows = block if rest is None else RankingRows.concatenate([rest, block])
            cut = len(rows) // self._rows * self._rows
            for begin in range(0, cut, self._rows):
                yield self._batch(rows, begin, begin + self._rows)
            rest = rows.take(np.arange(cut, len(rows)))
        if rest is not None and len(rest) and not whole:
            yield self._batch(rest, 0, len(rest))

    def _batch(self, rows: RankingRows, begin: int, stop: int) -> Batch:
        mine = np.arange(begin + self._share.rank, stop, self._share.world_size)
        return (rows.take(mine) if len(mine) else RankingRows.filler(self._part.meta)).batch()

    def _windows(self, epoch: int, skipped: int) -> Iterator[RankingRows]:
        """Shuffled rows of an epoch but for the first `skipped`."""
        sizes = self._part.group_sizes
        order = np.random.default_rng([self._seed, epoch]).permutation(len(sizes))
        ends = offsets_of(sizes[order])
        for window, begin in enumerate(range(0, len(order), GROUPS_PER_WINDOW)):
            stop = min(begin + GROUPS_PER_WINDOW, len(order))
            before, rows = int(ends[begin]), int(ends[stop] - ends[begin])
            if before + rows <= skipped:
                continue
            shuffled = np.random.default_rng([self._seed, epoch, window]).permutation(rows)
            yield self._read(order[begin:stop]).take(shuffled[max(0, skipped - before) :])

    def _read(self, groups: Ints) -> RankingRows:
        return RankingRows.concatenate([self._part.read(int(group)) for group in groups])
