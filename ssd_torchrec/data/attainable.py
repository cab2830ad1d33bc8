"""The best scores that generated data permits: Bayes-optimal ranking of the realised targets, with and without time.

Who sees the timestamps knows every regime; the next item's distribution is then the law itself. Who does not must sum
over the regimes. They are drawn alike and apart from the items, so the last event's regime is unknown, and that of the
event before is known as far as the last item betrays it:

    q[t](k) = p(k[t-1] = k | x[0..t])
    q[t+1](k) ~ 1/R sum_j q[t](j) p(x[t+1] | k[t] = k, k[t-1] = j)

p is a sum of one term in k and one in j, so the two beliefs enter it apart and this filter is exact.

U users, V items, R regimes. Same protocol as a model's evaluation: whole catalogue, ties count against.
"""

from collections import defaultdict

import numpy as np

from ssd_torchrec.data.rows import Ints
from ssd_torchrec.data.schema import CUTOFFS, Scores
from ssd_torchrec.data.synthetic import Floats, Law, Sample

_CELLS_AT_ONCE = 2**22  # of (users, items) probabilities


class AttainableScores:
    """Sums over users the scores of the optimal ranking on their leave-one-out targets."""

    def __init__(self, law: Law, *, timed: bool) -> None:
        self._law, self._timed = law, timed
        self._ranks: dict[str, list[Ints]] = defaultdict(list)

    def update(self, sample: Sample) -> None:
        """Count these users in."""
        for stage, back in {"valid": 2, "test": 1}.items():
            self._ranks[stage].append(optimal_ranks(self._law, sample, sample.lengths - back, timed=self._timed))

    def scores(self) -> Scores:
        """Mean scores of all users so far."""
        return {stage: _scores(np.concatenate(ranks)) for stage, ranks in self._ranks.items()}


def optimal_ranks(law: Law, sample: Sample, target: Ints, *, timed: bool) -> Ints:
    """(U,) place, from 1, that the optimal ranking gives to the item at position `target` (U,) of each user."""
    at_once = max(1, _CELLS_AT_ONCE // law.config.num_items)
    ranks = [np.zeros(0, np.int64)]
    for first in range(0, len(target), at_once):
        chosen = np.arange(first, min(first + at_once, len(target)))
        probabilities = next_item_probabilities(law, sample, chosen, target[chosen], timed=timed)
        of_target = probabilities[np.arange(len(chosen)), sample.item[chosen, target[chosen]]]
        ranks.append((probabilities >= of_target[:, None]).sum(axis=1))
    return np.concatenate(ranks)


def next_item_probabilities(law: Law, sample: Sample, users: Ints, target: Ints, *, timed: bool) -> Floats:
    """(U, V) probability of each item at position `target`, given the events before it.

    Args:
        users: (U,) rows of the sample to look at.
        target: (U,) positions, each at least 1 and below the user's length.
        timed: whether the gaps are known.
    """
    probabilities = _favourites(law, sample, users) * _weight_segment(law, target)[:, None]
    for back, weight in ((1, law.config.weight_last), (2, law.config.weight_previous)):
        rows = np.flatnonzero(target >= back)  # a second event has no event before its last
        wanting = sample.item[users[rows], target[rows] - back]
        beliefs = _beliefs(law, sample, users[rows], target[rows], back=back, timed=timed)
        _add_wanted(law, probabilities, rows, wanting, weight * beliefs)
    return probabilities


def _beliefs(law: Law, sample: Sample, users: Ints, target: Ints, *, back: int, timed: bool) -> Floats:
    """(U, R) belief in the regime of the event `back` before the target, given all events before the target."""
    known = np.eye(law.config.num_regimes)
    if timed:
        return known[sample.regime[users, target - back]]
    if back == 1:
        return np.where((target == 1)[:, None], known[0], 1 / law.config.num_regimes)
    return _filtered(law, sample, users)[np.arange(len(users)), target - 2]


def _filtered(law: Law, sample: Sample, users: Ints) -> Floats:
    """(U, L-1, R) belief in the regime of event t given the items up to event t+1."""
    config = law.config
    item, longest = sample.item[users], sample.item.shape[1]
    beliefs = np.zeros((len(users), max(longest - 1, 1), config.num_regimes))
    beliefs[:, 0, 0] = 1.0
    segment = np.take_along_axis(_favourites(law, sample, users), item, axis=1)  # (U, L)
    for t in range(1, longest - 1):
        of_last, of_previous = (_likelihood(law, item[:, t - back], item[:, t + 1]) for back in (0, 1))  # (U, R)
        before = (of_previous * beliefs[:, t - 1]).sum(axis=1)
        seen = config.weight_segment * segment[:, t + 1] + config.weight_previous * before
        unnormalised = config.weight_last * of_last + seen[:, None]
        beliefs[:, t] = unnormalised / unnormalised.sum(axis=1, keepdims=True)
    return beliefs


def _likelihood(law: Law, wanting: Ints, item: Ints) -> Floats:
    """(U, R) probability of `item` within the group that event `wanting` wants in each regime."""
    size = law.config.group_size
    groups = law.interest[law.class_of_item[wanting]]
    return np.where(groups == (item // size)[:, None], law.in_group[item % size][:, None], 0.0)


def _add_wanted(law: Law, probabilities: Floats, rows: Ints, wanting: Ints, weights: Floats) -> None:
    """Add to some rows of (U, V) probabilities what an event of item `wanting` wants in each regime, times (n, R)."""
    groups = law.interest[law.class_of_item[wanting]]  # (n, R), all different
    by_group = probabilities.reshape(-1, law.config.num_groups, law.config.group_size)
    by_group[rows[:, None], groups] += weights[:, :, None] * law.in_group


def _favourites(law: Law, sample: Sample, users: Ints) -> Floats:
    """(U, V) popularity among the segments of each user."""
    bags = sample.segments.take(users)
    return np.add.reduceat(law.in_segment[bags.values], bags.offsets[:-1], axis=0) / bags.lengths[:, None]


def _weight_segment(law: Law, target: Ints) -> Floats:
    """(U,) weight of the segment's favourites; a second event has no event before its last."""
    return law.config.weight_segment + np.where(target == 1, law.config.weight_previous, 0.0)


def _scores(ranks: Ints) -> dict[str, float]:
    scores = {}
    for cutoff in CUTOFFS:
        hit = ranks <= cutoff
        scores[f"hr@{cutoff}"] = float(hit.mean())
        scores[f"ndcg@{cutoff}"] = float((hit / np.log2(ranks + 1)).mean())
        scores[f"mrr@{cutoff}"] = float((hit / ranks).mean())
    return scores
