"""Items that all queries of a batch are told from: the same on every rank, whoever works them out.

    p[v]           chance of item v in one draw
    uniform        1 / V
    popularity     counts[v] / sum of counts
    log_uniform    log((r + 2) / (r + 1)) / log(V + 1), where v is the item with the r-th highest count, r from 0
    in_batch       that of popularity; nothing is drawn, the batch's targets are taken for as many draws

    log_q[v] = log(1 - (1 - p[v])^n)         n draws with replacement, made unique, have v among them

Items are numbers 0..V-1, counted from the first item of the table.
Source: Bengio & Senécal 2008, Adaptive importance sampling; Jean et al. 2015, arXiv:1412.2007; Yi et al. 2019,
Sampling-bias-corrected neural modeling, RecSys, for in_batch; TensorFlow's `log_uniform_candidate_sampler` and its
expected counts of unique candidates.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ssd_torchrec.data.draws import uniform
from ssd_torchrec.data.objective import Negatives
from ssd_torchrec.data.rows import Ints
from ssd_torchrec.errors import DataError


@dataclass(frozen=True, eq=False)
class NegativeSampler:
    """Draws items, and tells how likely each was to come."""

    kind: Negatives
    num_negatives: int  # draws for a global batch; in_batch has its targets instead
    counts: Ints  # (V,) training events of each item

    def __post_init__(self) -> None:
        if self._by_popularity and not self.counts.any():
            raise DataError(
                f"{self.kind} negatives must have training events of known items to go by, got none; "
                "take uniform ones, or prepare the log again"
            )

    def shared(self, *words: int) -> "SharedNegatives":
        """What all ranks draw who name the same integers: seed, epoch, window, and batch of the window."""
        return SharedNegatives(self, self.draw(*words), self.num_negatives)

    def among(self, targets: Ints) -> "SharedNegatives":
        """The (n,) targets of a global batch for its negatives; where it has none, the item with the highest count."""
        found = np.unique(targets) if len(targets) else np.array([self.counts.argmax()])
        return SharedNegatives(self, found, max(len(targets), 1))

    def draw(self, *words: int) -> Ints:
        """The different items among `num_negatives` draws with replacement, ascending; a function of the words."""
        assert self.kind != "in_batch", "the batch has them"
        drawn = uniform(*words, np.arange(self.num_negatives))
        if self.kind == "popularity":
            # a draw is one of all events: an item has those from the events of the items before it to its own
            return np.unique(np.searchsorted(self._events_so_far, _below(drawn, self.counts.sum()), side="right"))
        if self.kind == "log_uniform":
            rank = np.exp(drawn * np.log1p(len(self.counts))).astype(np.int64) - 1
            return np.unique(self._by_rank[np.minimum(rank, len(self.counts) - 1)])
        return np.unique(_below(drawn, len(self.counts)))

    def log_q(self, item: Ints, num_draws: int) -> NDArray[np.float32]:
        """Natural log of the chance that items are among so many draws: fp32, at most 0.

        Raises:
            DataError: an item can never come, since it is not in training.
        """
        chance = self.chance(item)
        if not chance.all():
            raise DataError(
                f"a candidate must be in the training events, got item {item[chance == 0][0]}, which is not; "
                "count them on the data set that is trained on"
            )
        with np.errstate(divide="ignore"):  # an only item comes for certain: log1p(-1) is -inf, and log_q 0
            return np.log(-np.expm1(num_draws * np.log1p(-chance))).astype(np.float32)

    def chance(self, item: Ints) -> NDArray[np.float64]:
        """Chance p of each of these items in one draw; 0 for one by popularity that is not in training."""
        if self._by_popularity:
            return self.counts[item] / self.counts.sum()
        if self.kind == "log_uniform":
            return np.log1p(1 / (self._rank[item] + 1)) / np.log1p(len(self.counts))
        return np.full(len(item), 1 / len(self.counts))

    @property
    def _by_popularity(self) -> bool:
        return self.kind in ("popularity", "in_batch")

    @cached_property
    def _events_so_far(self) -> Ints:
        return np.cumsum(self.counts)

    @cached_property
    def _by_rank(self) -> Ints:
        return np.argsort(-self.counts, kind="stable")

    @cached_property
    def _rank(self) -> Ints:
        rank = np.empty_like(self._by_rank)
        rank[self._by_rank] = np.arange(len(rank))
        return rank


@dataclass(frozen=True, eq=False)
class SharedNegatives:
    """What a global batch has all its queries told from."""

    sampler: NegativeSampler
    item: Ints  # (N,) ascending, at least one
    num_draws: int

    def log_q(self, item: Ints) -> NDArray[np.float32]:
        """Natural log of the chance that items, drawn or not, are among the negatives of such a batch."""
        return self.sampler.log_q(item, self.num_draws)


def _below(drawn: NDArray[np.float64], stop: int) -> Ints:
    """Numbers in [0, 1) to integers in [0, stop)."""
    return (drawn * stop).astype(np.int64)
