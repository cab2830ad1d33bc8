"""Which rows go together: global batches formed from lengths, seed and epoch alone, whatever the number of ranks.

    row groups, shuffled ─► windows of row groups ─► stretches of rows by noisy length ─► batches, shuffled

A window is what is held in memory at once. A stretch is what a batch takes of a row: its newest events up to where the
objective cuts it. Those of a batch are of similar length and under the token budget together; the noise on the length
changes the company a row keeps from epoch to epoch. Evaluation does the same without chance: row groups in order, rows
by length.

Lengths are enough to plan, so a position (epoch, batch) is found again without reading what lies before it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ssd_torchrec.data.rows import Ints, Rows, cut_under_budget
from ssd_torchrec.errors import ConfigError

_GROUPS, _ROWS, _CUTS = 0, 1, 2  # streams of random numbers that (seed, epoch) gives


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How rows are put together."""

    tokens_per_batch: int = 4096
    """Events of a global batch, over all ranks, at most. A longer row is a batch of its own; nothing is cut."""

    window_events: int = 2**22
    """Events held in memory at once, about: row groups are taken until there are so many."""

    length_noise: float = 0.25
    """Standard deviation of the noise on the logarithm of a row's length before rows are sorted by it."""

    max_length: int = 0
    """Events of the longest stretch: of a longer row the newest are taken; 0 for whole rows."""

    seed: int = 0
    """With the epoch it decides the order of everything."""

    def __post_init__(self) -> None:
        least_of = {"tokens_per_batch": 1, "window_events": 1, "length_noise": 0, "max_length": 0, "seed": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}; raise it")


@dataclass(frozen=True, eq=False)
class Stretches:
    """What batches take of the rows of a window; a row may give none, one or several."""

    row: Ints  # (S,) position of the row in the window
    stop: Ints  # (S,) events of the row up to the stretch's end
    length: Ints  # (S,) at least 1

    @classmethod
    def newest(cls, row: Ints, stop: Ints, max_length: int) -> "Stretches":
        """The newest events before each `stop`."""
        return cls(row, stop, np.minimum(stop, max_length) if max_length else stop)

    def __getitem__(self, at: Ints) -> "Stretches":
        return Stretches(self.row[at], self.stop[at], self.length[at])

    def of(self, rows: Rows) -> Rows:
        """These stretches of the rows of their window, as rows of their own."""
        return rows.take(self.row, self.length, self.stop - self.length)


@dataclass(frozen=True, eq=False)
class Window:
    """Row groups to be held in memory together, and the global batches of their rows."""

    number: int
    row_groups: Ints  # in the order in which their rows are laid end to end
    stretches: Stretches
    batches: list[Ints]  # each the positions of its stretches


Cut = Callable[[Ints, np.random.Generator], tuple[Ints, Ints]]
"""From the (R,) events of rows: the row of each stretch, and how many of its events come before the stretch's end."""


def whole_rows(lengths: Ints, rng: np.random.Generator | None = None) -> tuple[Ints, Ints]:
    """Each row with events once, with all of them."""
    rows = np.flatnonzero(lengths > 0)
    return rows, lengths[rows]


def training_windows(
    lengths: Ints, row_group_offsets: Ints, config: BatchConfig, epoch: int, cut: Cut = whole_rows
) -> Iterator[Window]:
    """All windows of an epoch, in order; each stretch is in exactly one batch.

    Args:
        lengths: (R,) events of each row that training shows; rows of 0 take no part.
        row_group_offsets: (row groups + 1,) where the row groups begin among the rows.
        cut: which stretches an epoch takes of the rows.
    """
    order = np.random.default_rng([config.seed, epoch, _GROUPS]).permutation(len(row_group_offsets) - 1)
    for number, groups in enumerate(_by_size(order, lengths, row_group_offsets, config.window_events)):
        rng = np.random.default_rng([config.seed, epoch, _ROWS, number])
        here = _lengths_of(groups, lengths, row_group_offsets)
        cuts = cut(here, np.random.default_rng([config.seed, epoch, _CUTS, number]))
        stretches = Stretches.newest(*cuts, config.max_length)
        noisy = np.log(stretches.length) + config.length_noise * rng.standard_normal(len(stretches.length))
        batches = _cut(np.argsort(noisy, kind="stable"), stretches.length, config.tokens_per_batch)
        yield Window(number, groups, stretches, [batches[at] for at in rng.permutation(len(batches))])


def evaluation_windows(lengths: Ints, row_group_offsets: Ints, config: BatchConfig) -> Iterator[Window]:
    """The same without chance, for histories of these lengths; rows of length 0 or less take no part."""
    order = np.arange(len(row_group_offsets) - 1)
    for number, groups in enumerate(_by_size(order, lengths, row_group_offsets, config.window_events)):
        here = _lengths_of(groups, lengths, row_group_offsets)
        stretches = Stretches.newest(*whole_rows(here), config.max_length)
        by_length = np.argsort(stretches.length, kind="stable")
        yield Window(number, groups, stretches, _cut(by_length, stretches.length, config.tokens_per_batch))


def share_of_rank(rows: Ints, lengths: Ints, rank: int, world_size: int) -> Ints:
    """The rows of a global batch that a rank takes: longest first, dealt back and forth so that events balance.

    # lengths  9 8 7 6 5 4      rank 0: 9 6 5      rank 1: 8 7 4

    No rank has more events than another by more than the longest row.

    Args:
        rows: (n,) the global batch.
        lengths: (n,) their events.
    """
    by_length = rows[np.argsort(-lengths, kind="stable")]
    there, back = by_length[rank :: 2 * world_size], by_length[2 * world_size - 1 - rank :: 2 * world_size]
    return np.concatenate([there, back])


def _by_size(order: Ints, lengths: Ints, row_group_offsets: Ints, events: int) -> Iterator[Ints]:
    so_far = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(lengths, 0), dtype=np.int64)])
    sizes = np.diff(so_far[row_group_offsets])[order]
    cuts = cut_under_budget(sizes, events)
    yield from (order[first:stop] for first, stop in pairwise(cuts))


def _lengths_of(groups: Ints, lengths: Ints, row_group_offsets: Ints) -> Ints:
    return np.concatenate([lengths[row_group_offsets[g] : row_group_offsets[g + 1]] for g in groups])


def _cut(order: Ints, lengths: Ints, budget: int) -> list[Ints]:
    """Cut under the budget, no finer than that needs, and as evenly as that allows: no rest makes a tiny last batch."""
    lengths = lengths[order]
    fewest = len(cut_under_budget(lengths, budget))
    least, most = 1, budget  # `most` always gives the fewest batches
    while least < most:
        middle = (least + most) // 2
        if len(cut_under_budget(lengths, middle)) == fewest:
            most = middle
        else:
            least = middle + 1
    return [order[first:stop] for first, stop in pairwise(cut_under_budget(lengths, most))]
