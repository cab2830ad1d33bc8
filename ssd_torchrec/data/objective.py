"""What training asks: which part of a row the encoder sees, and which items it is to tell from it.

    # training events of a row     e0 e1 e2 e3 e4
    # all                          e0 e1 e2 e3         asks for e1 e2 e3 e4, each at the event before it
    # sampled                      e0 e1 e2            asks for e3 at e2; each epoch draws anew which are asked for
    # masked                       e0 ?  e2 e3 ?       asks for e1 and e4 where they were

"all" costs a row's length once, and is for causal encoders: any other has seen what it is asked for. "sampled" is the
papers' protocol, of which `target_share` draws a part: each (history, next item) of an epoch costs its whole history.

Source: Sun et al. 2019, BERT4Rec, arXiv:1904.06690, for "masked"; Kang & McAuley 2018, SASRec, arXiv:1808.09781, for
"bce" on "all".
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ssd_torchrec.data.rows import Ints
from ssd_torchrec.data.split import SpanCounts, Spans
from ssd_torchrec.errors import ConfigError

Targets = Literal["all", "sampled", "masked"]
Loss = Literal["softmax", "bce", "sampled_softmax"]
Negatives = Literal["uniform", "log_uniform", "popularity", "in_batch"]
Scored = Literal["auto", "looked_up", "in_place"]
MASK = 0
"""Row of the item table that stands for an event whose item is hidden."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is asked for, and how an answer is judged."""

    targets: Targets = "all"
    """all: every next item, of causal encoders only; sampled: a history's next item, histories cut anywhere; masked:
    items hidden in the history."""

    target_share: float = 1.0
    """sampled: chance of an event to be asked for in an epoch. 1 is the papers' protocol, and squares the cost."""

    mask_share: float = 0.0
    """masked: chance of an event to be hidden and asked for; a row that would hide none hides its last. Event columns
    are hidden with the item, the time is not."""

    hide_share: float = 0.0
    """Chance of an event's item to be hidden from the encoder in training, with its event columns and nothing else;
    SSD4Rec's rho."""

    loss: Loss = "softmax"
    """softmax: cross-entropy over the catalogue; bce: each target against one item drawn from the catalogue, which the
    row does not have among its training events; sampled_softmax: cross-entropy over items drawn for the whole batch,
    for catalogues too large to list in each batch."""

    scored: Scored = "auto"
    """softmax: where the catalogue's rows meet the queries, which changes rounding only. looked_up: every batch brings
    all item vectors to every rank; in_place: queries go to all ranks, each of which scores its own rows of a row_wise
    table. auto: in_place for such a table of more than 100,000 items."""

    negatives: Negatives = "uniform"
    """sampled_softmax: how items are drawn. uniform: all alike; popularity: by their training events; log_uniform: by
    their rank in these, as a Zipfian law has it; in_batch: none are drawn, the batch's targets are taken."""

    num_negatives: int = 4096
    """sampled_softmax: draws for a global batch, of which each item is kept once; in_batch has its targets instead."""

    def __post_init__(self) -> None:
        for name, of in {"targets": Targets, "loss": Loss, "scored": Scored, "negatives": Negatives}.items():
            if getattr(self, name) not in get_args(of):
                raise ConfigError(f"objective.{name} must be one of {get_args(of)}, got {getattr(self, name)!r}")
        self._check_negatives()
        if not 0 < self.target_share <= 1:
            raise ConfigError(f"objective.target_share must be in (0, 1], got {self.target_share}")
        if not 0 <= self.hide_share < 1:
            raise ConfigError(f"objective.hide_share must be in [0, 1), got {self.hide_share}")
        if self.targets != "sampled" and self.target_share != 1:
            raise ConfigError(
                f"objective.target_share must be 1 for {self.targets} targets, got {self.target_share}; "
                "a share is drawn of sampled ones only"
            )
        if (self.targets == "masked") != (0 < self.mask_share < 1):
            raise ConfigError(
                "objective.mask_share must be in (0, 1) for masked targets and 0 for others, got "
                f"{self.mask_share} with {self.targets}"
            )
        if self.targets == "masked" and self.hide_share:
            raise ConfigError("objective.hide_share must be 0 for masked targets, which are hidden by mask_share")

    def _check_negatives(self) -> None:
        if self.num_negatives < 1:
            raise ConfigError(f"objective.num_negatives must be at least 1, got {self.num_negatives}; raise it")
        for name in ("negatives", "num_negatives"):
            if self.loss != "sampled_softmax" and getattr(self, name) != getattr(ObjectiveConfig, name):
                raise ConfigError(
                    f"objective.{name} must be left alone for {self.loss}, got {getattr(self, name)!r}; "
                    "negatives are drawn for sampled_softmax only"
                )
        if self.scored != "auto" and self.loss != "softmax":
            raise ConfigError(
                f"objective.scored must be left alone for {self.loss}, got {self.scored!r}; softmax alone scores the "
                "whole catalogue"
            )

    @property
    def asks_at_mask(self) -> bool:
        """Whether the next item is asked for at a hidden event after the last one, as training has taught it."""
        return self.targets == "masked"

    def events(self, spans: Spans) -> Ints:
        """(R,) events of each row that training shows."""
        return np.where(spans.training_inputs > 0, spans.training_inputs + self.asks_at_mask, 0)

    def num_targets(self, counts: SpanCounts) -> float:
        """Targets of an epoch: those expected, where they are drawn."""
        if self.targets == "masked":
            rows = counts.rows - counts.rows_without_training
            return self.mask_share * (counts.training_targets + rows)
        return self.target_share * counts.training_targets

    def cut(self, lengths: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """The histories of an epoch from rows of these lengths: the row of each, and how many of its events it has."""
        if self.targets != "sampled":
            rows = np.flatnonzero(lengths)
            return rows, lengths[rows]
        chosen = np.flatnonzero(rng.random(int(lengths.sum())) < self.target_share)
        ends = np.cumsum(lengths)
        rows = np.searchsorted(ends, chosen, side="right")
        return rows, chosen - (ends - lengths)[rows] + 1

    def hidden(self, drawn: NDArray[np.float64], lengths: Ints) -> NDArray[np.bool_]:
        """(T,) whether an event's item is hidden, from a number in [0, 1) each; no row of these lengths is empty."""
        share = self.mask_share if self.targets == "masked" else self.hide_share
        hidden = drawn < share
        if self.targets == "masked" and len(lengths):
            ends = np.cumsum(lengths)
            hidden[ends - 1] |= ~np.logical_or.reduceat(hidden, ends - lengths)
        return hidden
