"""Generated histories of thousands of events, whose last items hang on an event more than a thousand back.

    block    b1 c1 b2 c2 ...  n n n ... n  ?2 first2[b2] second2[c2]  ?1 first1[b1] second1[c1] ...
    row      n ... n  block block ... block    each with tokens, filler and an order of questions of its own

Tokens b and c of each question are drawn among `num_tokens` of kinds of their own, the filler n by popularity, and
first and second are one-to-one maps onto answers that no other event shows: after its question each answer follows from
the last token of its kind alone. How much filler stands between has no scale, as times of return often have none: more
than n with probability n to the power of -`tail`. In a row's last block it is at least `distance`, so the validation
target, its last first[b], and the test target, its second[c], hang on an event further back than that: whoever
remembers ranks both first, whoever only knows which kind of answer is due has a hit rate of k / num_tokens among k.

Short returns are what such memory is learned from: with all of them beyond 1,000 events neither encoder that was tried
came to remember (docs/decisions.md).

Table of items: tokens of all kinds, answers of all kinds, the questions, the filler.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ssd_torchrec.data.rows import Ints, Rows
from ssd_torchrec.data.schema import CUTOFFS, Scores
from ssd_torchrec.errors import ConfigError

_MAPS, _USERS = 0, 1  # streams of random numbers that one seed gives
_USERS_AT_ONCE = 50
_BESIDE_FILLER = 5  # events of a question that are no filler
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
    """Filler events at least between the tokens and the questions of a row's last block; twice as many at most."""

    tail: float = 2 / 3
    """Tail index of the filler events in the other blocks (Pareto, at least 1, at most twice `distance`)."""

    num_questions: int = 1
    """Questions of a block, each with two tokens and two answers."""

    num_tokens: int = 20
    """Tokens of each kind, and answers of each kind."""

    num_filler: int = 10
    """Items that mean nothing."""

    filler_exponent: float = 1.0
    """Zipf exponent of the filler's popularity."""

    num_oov_buckets: int = 4
    """Table rows kept for ids that the catalogue does not know."""

    seed: int = 0
    """Decides everything that is drawn."""

    def __post_init__(self) -> None:
        for name in ("num_users", "distance", "num_questions", "num_tokens", "num_filler", "num_oov_buckets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.filler_exponent < 0 or self.seed < 0:
            raise ConfigError(
                f"filler_exponent and seed must be at least 0, got {self.filler_exponent} and {self.seed}; raise them"
            )
        if not self.tail > 0:
            raise ConfigError(f"tail must be more than 0, got {self.tail}; 2/3 has a return in a hundred beyond 1,000")
        if not self.shortest_block <= self.shortest <= self.longest:
            raise ConfigError(
                f"lengths must hold {self.shortest_block} <= shortest <= longest, got {self.shortest} and "
                f"{self.longest}; a row is its last block at least, {self.distance} events and "
                f"{_BESIDE_FILLER} a question"
            )

    @property
    def shortest_block(self) -> int:
        """Events of a last block with as little filler as there may be."""
        return self.distance + self.beside_filler

    @property
    def beside_filler(self) -> int:
        """Events of a block that are no filler."""
        return _BESIDE_FILLER * self.num_questions

    @property
    def num_kinds(self) -> int:
        """Kinds of tokens, and of answers."""
        return 2 * self.num_questions

    @property
    def num_items(self) -> int:
        return 2 * self.num_kinds * self.num_tokens + self.num_questions + self.num_filler

    def attainable(self) -> Scores:
        """Of whoever remembers: the answer stands first."""
        best = {f"{metric}@{k}": 1.0 for metric in ("hr", "ndcg", "mrr") for k in CUTOFFS}
        return {stage: dict(best) for stage in ("valid", "test")}


def lifelong_rows(config: LifelongConfig, first_item: int) -> Iterator[Rows]:
    """All users of the configuration, some at a time; the same ones whenever it is called."""
    answers = np.random.default_rng([config.seed, _MAPS]).permuted(
        np.tile(np.arange(config.num_tokens), (config.num_kinds, 1)), axis=1
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
    left = length - config.beside_filler
    last = min(int(config.distance * 2 ** rng.uniform()), left)
    blocks = [_block(config, rng, answers, last)]
    left -= last
    while left > config.beside_filler:
        left -= config.beside_filler
        drawn = (1 - rng.uniform()) ** (-1 / config.tail)
        filler = int(min(drawn, 2 * config.distance, left))
        blocks.append(_block(config, rng, answers, filler))
        left -= filler
    return np.concatenate([_filler(config, rng, left), *reversed(blocks)])


def _block(config: LifelongConfig, rng: np.random.Generator, answers: Ints, filler: int) -> Ints:
    kinds = np.arange(config.num_kinds)
    tokens = rng.integers(config.num_tokens, size=config.num_kinds)
    after_tokens = config.num_kinds * config.num_tokens
    answer = after_tokens + kinds * config.num_tokens + answers[kinds, tokens]
    questions = 2 * after_tokens + np.arange(config.num_questions)
    asked = np.concatenate([questions[:, None], answer.reshape(-1, 2)], axis=1)[rng.permutation(config.num_questions)]
    return np.concatenate([kinds * config.num_tokens + tokens, _filler(config, rng, filler), asked.ravel()])


def _filler(config: LifelongConfig, rng: np.random.Generator, size: int) -> Ints:
    popularity = np.arange(1, config.num_filler + 1) ** -config.filler_exponent
    drawn = rng.choice(config.num_filler, size=size, p=popularity / popularity.sum())
    return config.num_items - config.num_filler + drawn
