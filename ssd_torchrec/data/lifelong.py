"""Generated histories of thousands of events, in which some items hang on an event more than a thousand back.

    block    b c  n n n ... n  ?  first[b] second[c]       at least `distance` events n between c and the question
    row      block block ... block                          each block draws its own b and c

Tokens b and c are drawn among `num_tokens` of a first and of a second kind, the filler n by popularity, and first and
second are one-to-one maps onto answers that no other event shows: after the question ? each answer follows from its
token alone, and within `distance` events before it nothing tells. Rows end with a block, so the validation target is
first[b] and the test target second[c]: whoever remembers ranks both first, whoever does not gets 10 / num_tokens at
best as its hit rate among ten.

Table of items: tokens of both kinds, answers of both kinds, the question, the filler.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ssd_torchrec.data.rows import Ints, Rows
from ssd_torchrec.data.schema import CUTOFFS, Scores
from ssd_torchrec.errors import ConfigError

_MAPS, _USERS = 0, 1  # streams of random numbers that one seed gives
_USERS_AT_ONCE = 50
_BESIDE_FILLER = 5  # events of a block that are no filler
_GAP_S, _GAP_SPREAD, _BEGIN_S = 600.0, 1.5, 1_500_000_000


@dataclass(frozen=True, kw_only=True)
class LifelongConfig:
    """How much to generate."""

    num_users: int = 400
    """Rows to generate."""

    shortest: int = 2000
    """Events a user has at least."""

    longest: int = 10_000
    """Events a user has at most; drawn log-uniformly between."""

    distance: int = 1000
    """Filler events at least between a token and its question."""

    num_tokens: int = 50
    """Tokens of each kind, and answers of each kind."""

    num_filler: int = 1000
    """Items that mean nothing."""

    filler_exponent: float = 1.0
    """Zipf exponent of the filler's popularity."""

    num_oov_buckets: int = 4
    """Table rows kept for ids that the catalogue does not know."""

    seed: int = 0
    """Decides everything that is drawn."""

    def __post_init__(self) -> None:
        for name in ("num_users", "distance", "num_tokens", "num_filler", "num_oov_buckets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.filler_exponent < 0 or self.seed < 0:
            raise ConfigError(
                f"filler_exponent and seed must be at least 0, got {self.filler_exponent} and {self.seed}; raise them"
            )
        if not self.distance + _BESIDE_FILLER <= self.shortest <= self.longest:
            raise ConfigError(
                f"lengths must hold distance + {_BESIDE_FILLER} <= shortest <= longest, got {self.distance}, "
                f"{self.shortest} and {self.longest}; a row is one block at least"
            )

    @property
    def num_items(self) -> int:
        return 4 * self.num_tokens + 1 + self.num_filler

    def attainable(self) -> Scores:
        """Of whoever remembers: the answer stands first."""
        best = {f"{metric}@{k}": 1.0 for metric in ("hr", "ndcg", "mrr") for k in CUTOFFS}
        return {stage: dict(best) for stage in ("valid", "test")}


def lifelong_rows(config: LifelongConfig, first_item: int) -> Iterator[Rows]:
    """All users of the configuration, some at a time; the same ones whenever it is called."""
    answers = np.random.default_rng([config.seed, _MAPS]).permuted(
        np.tile(np.arange(config.num_tokens), (2, 1)), axis=1
    )
    for first in range(0, config.num_users, _USERS_AT_ONCE):
        users = range(first, min(first + _USERS_AT_ONCE, config.num_users))
        yield Rows.concatenate([_user(config, user, answers, first_item) for user in users])


def _user(config: LifelongConfig, user: int, answers: Ints, first_item: int) -> Rows:
    rng = np.random.default_rng([config.seed, _USERS, user])
    item = first_item + _row(config, rng, answers)
    gap_s = np.rint(_GAP_S * np.exp(_GAP_SPREAD * rng.standard_normal(len(item)))).astype(np.int64)
    return Rows(
        user_id=np.array([user]),
        item=item,
        timestamp=_BEGIN_S + gap_s.cumsum(),
        offsets=np.array([0, len(item)]),
    )


def _row(config: LifelongConfig, rng: np.random.Generator, answers: Ints) -> Ints:
    """Items 0..V-1 of one user."""
    length = int(np.exp(rng.uniform(np.log(config.shortest), np.log(config.longest + 1))))
    blocks = max(1, length // (config.distance * 5 // 4 + _BESIDE_FILLER))
    tokens = rng.integers(config.num_tokens, size=(blocks, 2))
    spare = length - blocks * (config.distance + _BESIDE_FILLER)
    filler = config.distance + np.diff(np.sort(rng.integers(spare + 1, size=blocks - 1)), prepend=0, append=spare)
    return np.concatenate([_block(config, rng, answers, pair, int(n)) for pair, n in zip(tokens, filler, strict=True)])


def _block(config: LifelongConfig, rng: np.random.Generator, answers: Ints, tokens: Ints, filler: int) -> Ints:
    kinds = config.num_tokens * np.arange(2)
    question = 4 * config.num_tokens
    popularity = np.arange(1, config.num_filler + 1) ** -config.filler_exponent
    drawn = rng.choice(config.num_filler, size=filler, p=popularity / popularity.sum())
    answer = 2 * config.num_tokens + kinds + answers[np.arange(2), tokens]
    return np.concatenate([tokens + kinds, question + 1 + drawn, [question], answer])
