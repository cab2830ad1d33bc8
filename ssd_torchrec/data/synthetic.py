"""Generated histories whose next item hangs on recent items and on the gaps between them.

    k[t]   = regime of the gap before event t (minutes, hours, days, weeks), drawn without regard to the items; k[0] = 0
    i[t]   = interest(class(x[t]), k[t])             what event t leaves the user wanting: a group of items
    x[t+1] ~ a of group i[t],  b of group i[t-1],  1 - a - b of the user's segment favourites

Items of a group are of one class, and each class has as many groups as there are regimes. `interest` is a one-to-one
map from (class, regime) onto the groups: whoever does not see the gaps knows the class and must guess among as many
groups as there are regimes. The gap before x[t+1] tells nothing about x[t+1], so no gap to the target need be known.
The law is known, and so is the best score: `attainable.py`.

U users, V items, S segments, R regimes, c classes; groups = c * R.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ssd_torchrec.data.rows import Ints, Jagged, Rows, offsets_of
from ssd_torchrec.errors import ConfigError

_USERS_AT_ONCE = 20_000
_MAX_DEVIATIONS = 3.0  # jitter of a gap is cut there, so that regimes never overlap
_YEAR_S = 365 * 86_400
_LAW, _USERS = 0, 1  # streams of random numbers that one seed gives

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """How much to generate, and by which law."""

    num_users: int = 4000
    """Rows to generate."""

    shortest: int = 10
    """Events a user has at least; 3 or more, so that each has a validation and a test target."""

    longest: int = 60
    """Events a user has at most."""

    median_length: float = 24.0
    """Median of the log-normal number of events, before it is held between shortest and longest."""

    length_spread: float = 0.5
    """Standard deviation of the logarithm of the number of events."""

    num_classes: int = 25
    """Classes that groups of items are drawn into; with the regimes they make num_classes * regimes groups."""

    group_size: int = 10
    """Items of a group; the catalogue holds num_classes * regimes * group_size items."""

    gap_centres_s: tuple[float, ...] = (300.0, 10_800.0, 172_800.0, 1_814_400.0)
    """Median gap of each regime in seconds, ascending."""

    gap_spread: float = 0.35
    """Standard deviation of the logarithm of a gap within its regime, cut at three deviations."""

    weight_last: float = 0.75
    """Probability that the next item comes from the interest of the last event."""

    weight_previous: float = 0.12
    """Probability that it comes from the interest of the event before; the rest goes to the segment's favourites."""

    group_exponent: float = 0.5
    """Zipf exponent of popularity inside a group."""

    num_segments: int = 8
    """Segments, each with its own favourites; a user is in one or two."""

    segment_exponent: float = 1.0
    """Zipf exponent of popularity among a segment's favourites."""

    num_oov_buckets: int = 4
    """Table rows kept for ids that the catalogue does not know."""

    seed: int = 0
    """Decides everything that is drawn."""

    def __post_init__(self) -> None:
        for name in ("num_users", "num_classes", "group_size", "num_segments", "num_oov_buckets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("group_exponent", "segment_exponent", "gap_spread", "length_spread", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}; raise it")
        if not 3 <= self.shortest <= self.longest:
            raise ConfigError(
                f"lengths must hold 3 <= shortest <= longest, got {self.shortest} and {self.longest}; "
                "a user needs a history, a validation and a test target"
            )
        if self.median_length <= 0:
            raise ConfigError(f"median_length must be above 0, got {self.median_length}; raise it")
        if min(self.weight_last, self.weight_previous, self.weight_segment) < 0:
            raise ConfigError(
                f"weight_last and weight_previous must be at least 0 and at most 1 together, got {self.weight_last} "
                f"and {self.weight_previous}; lower one"
            )
        self._check_gaps()

    def _check_gaps(self) -> None:
        reach = float(np.exp(_MAX_DEVIATIONS * self.gap_spread))
        if not self.gap_centres_s or self.gap_centres_s[0] < 2 * reach:
            raise ConfigError(
                f"gap_centres_s must begin at {2 * reach:.0f} s or later, got {self.gap_centres_s}; "
                "gaps are whole seconds"
            )
        for near, far in pairwise(self.gap_centres_s):
            if far <= near * reach**2:
                raise ConfigError(
                    f"regimes must not overlap: gap_centres_s {near} and {far} are less than a factor {reach**2:.1f} "
                    "apart; spread them or lower gap_spread"
                )

    @property
    def num_regimes(self) -> int:
        return len(self.gap_centres_s)

    @property
    def num_groups(self) -> int:
        return self.num_classes * self.num_regimes

    @property
    def num_items(self) -> int:
        return self.num_groups * self.group_size

    @property
    def first_item(self) -> int:
        """Table row of item 0."""
        return 1 + self.num_oov_buckets

    @property
    def weight_segment(self) -> float:
        return 1.0 - self.weight_last - self.weight_previous


@dataclass(frozen=True, eq=False)
class Law:
    """What the seed decided for all users. Items are 0..V-1; item v is in group v // group_size."""

    config: SyntheticConfig
    class_of_item: Ints  # (V,) the same for all items of a group
    interest: Ints  # (classes, regimes) -> group
    favourites: Ints  # (S, V) items of each segment, most popular first

    @classmethod
    def draw(cls, config: SyntheticConfig) -> "Law":
        """The law of this seed."""
        rng = np.random.default_rng([config.seed, _LAW])
        groups = np.arange(config.num_groups)
        return cls(
            config=config,
            class_of_item=np.repeat(rng.permutation(groups % config.num_classes), config.group_size),
            interest=rng.permutation(config.num_groups).reshape(config.num_classes, config.num_regimes),
            favourites=rng.permuted(np.tile(np.arange(config.num_items), (config.num_segments, 1)), axis=1),
        )

    @cached_property
    def in_group(self) -> Floats:
        """(group_size,) probability of each item inside its group."""
        return _zipf(self.config.group_size, self.config.group_exponent)

    @cached_property
    def by_rank(self) -> Floats:
        """(V,) probability of a segment's most popular item, its second, and so on."""
        return _zipf(self.config.num_items, self.config.segment_exponent)

    @cached_property
    def in_segment(self) -> Floats:
        """(S, V) probability of each item among a segment's favourites."""
        popularity = np.empty(self.favourites.shape)
        np.put_along_axis(popularity, self.favourites, self.by_rank[None, :], axis=1)
        return popularity


@dataclass(frozen=True, eq=False)
class Sample:
    """Users drawn by a law, laid out to the longest: whatever lies past a user's length was never there."""

    lengths: Ints  # (U,)
    item: Ints  # (U, L) items 0..V-1
    regime: Ints  # (U, L)
    timestamp: Ints  # (U, L) unix seconds
    segments: Jagged  # one or two different segments a user
    first_user: int

    def rows(self, first_item: int) -> Rows:
        """As rows of a data set, items moved up to `first_item`."""
        there = np.arange(self.item.shape[1]) < self.lengths[:, None]
        return Rows(
            user_id=self.first_user + np.arange(len(self.lengths)),
            item=self.item[there] + first_item,
            timestamp=self.timestamp[there],
            offsets=offsets_of(self.lengths),
            context={"segment": self.segments},
        )


def sample_users(law: Law) -> Iterator[Sample]:
    """All users of the configuration, some thousands at a time; the same ones whenever it is called."""
    total = law.config.num_users
    for block, first in enumerate(range(0, total, _USERS_AT_ONCE)):
        rng = np.random.default_rng([law.config.seed, _USERS, block])
        yield _sample(law, rng, first, min(_USERS_AT_ONCE, total - first))


def _sample(law: Law, rng: np.random.Generator, first_user: int, users: int) -> Sample:
    config = law.config
    drawn = config.median_length * np.exp(config.length_spread * rng.standard_normal(users))
    lengths = np.clip(np.rint(drawn), config.shortest, config.longest).astype(np.int64)
    segments = _draw_segments(config, rng, users)
    shape = (users, int(lengths.max()))
    regime = rng.integers(config.num_regimes, size=shape)
    regime[:, 0] = 0
    item = np.zeros(shape, np.int64)
    for t in range(shape[1]):
        active = np.flatnonzero(lengths > t)
        recent = slice(max(t - 2, 0), t)
        item[active, t] = _draw_next(law, rng, item[active, recent], regime[active, recent], segments.take(active))
    return Sample(lengths, item, regime, _draw_timestamps(config, rng, regime), segments, first_user)


def _draw_segments(config: SyntheticConfig, rng: np.random.Generator, users: int) -> Jagged:
    one = rng.integers(config.num_segments, size=users)
    other = rng.integers(config.num_segments, size=users)
    both = np.stack([one, other], axis=1)
    taken = np.stack([np.ones(users, bool), (rng.random(users) < 0.5) & (one != other)], axis=1)
    return Jagged(both[taken], offsets_of(taken.sum(axis=1)))


def _draw_timestamps(config: SyntheticConfig, rng: np.random.Generator, regime: Ints) -> Ints:
    deviation = np.clip(rng.standard_normal(regime.shape), -_MAX_DEVIATIONS, _MAX_DEVIATIONS)
    gap_s = np.rint(np.array(config.gap_centres_s)[regime] * np.exp(config.gap_spread * deviation)).astype(np.int64)
    gap_s[:, 0] = 1_600_000_000 + rng.integers(_YEAR_S, size=len(regime))  # a user begins some time in one year
    return gap_s.cumsum(axis=1)


def _draw_next(law: Law, rng: np.random.Generator, item: Ints, regime: Ints, segments: Jagged) -> Ints:
    """The next item after (U, 0..2) most recent items and regimes, oldest first."""
    config, (users, recent) = law.config, item.shape
    wanted = np.full((users, 3), -1)  # groups of the last and the previous event; -1 leaves it to the segment
    wanted[:, :recent] = law.interest[law.class_of_item[item], regime][:, ::-1]
    source = np.searchsorted(np.cumsum([config.weight_last, config.weight_previous]), rng.random(users), side="right")
    group = wanted[np.arange(users), source]
    from_group = group * config.group_size + _draw(rng, law.in_group, users)
    chosen = segments.offsets[:-1] + (rng.random(users) * segments.lengths).astype(np.int64)
    from_segment = law.favourites[segments.values[chosen], _draw(rng, law.by_rank, users)]
    return np.where(group >= 0, from_group, from_segment)


def _draw(rng: np.random.Generator, probabilities: Floats, size: int) -> Ints:
    return np.minimum(np.searchsorted(np.cumsum(probabilities), rng.random(size)), len(probabilities) - 1)


def _zipf(count: int, exponent: float) -> Floats:
    weights = np.arange(1, count + 1) ** -exponent
    return weights / weights.sum()
