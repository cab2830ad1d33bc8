"""What a batch of stretches asks for, and what it hides: the same for an event whichever rank works it out.

Shapes: S stretches of a window, s of them in a batch, T events of these in all.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ssd_torchrec.data.batch_plan import Stretches
from ssd_torchrec.data.draws import uniform
from ssd_torchrec.data.objective import MASK, ObjectiveConfig
from ssd_torchrec.data.rows import Ints, Rows, ranges
from ssd_torchrec.data.schema import DatasetMeta

_HIDE, _OTHERS = 0, 1  # streams of random numbers; each further try for a negative is one more
TRIES = 100
"""Draws for a negative before a row that has nearly the whole catalogue gets one it has."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Of each event in turn."""

    item: Ints  # (T,) what the encoder sees: the item, or the mask
    target_item: Ints  # (T,) what it is to tell, or -1
    negative_item: Ints | None  # (T,) an item that it is not, where the loss wants one


@dataclass(frozen=True, eq=False)
class Questions:
    """What an objective asks of the stretches of a window."""

    objective: ObjectiveConfig
    rows: Rows
    training_events: Ints  # (R,) of each row; negatives are none of these
    stretches: Stretches
    meta: DatasetMeta
    draw: tuple[int, ...]
    """Seed, epoch and window: with an event's stretch and place they decide what is drawn for it."""

    def of(self, at: Ints) -> Asked:
        """What these stretches ask for."""
        item = self.rows.item[self._events(self.stretches[at])]
        if self.objective.mask_share or self.objective.hide_share:
            item = np.where(self._hidden(at), MASK, item)
        wants_others = self.objective.loss == "bce"
        return Asked(item, self.target_items(at), self._others(at) if wants_others else None)

    def target_items(self, at: Ints) -> Ints:
        """(T,) table row that each event of these stretches is to tell, or -1."""
        stretches = self.stretches[at]
        if self.objective.targets != "masked":
            return self._next_items(stretches)
        return np.where(self._hidden(at), self.rows.item[self._events(stretches)], -1)

    def count(self, at: Ints) -> int:
        """How many known items these stretches ask for."""
        stretches = self.stretches[at]
        first, stop = (
            self.rows.offsets[stretches.row] + stop for stop in (stretches.stop - stretches.length, stretches.stop)
        )
        if self.objective.targets == "masked":
            return int((self.target_items(at) >= self.meta.first_item).sum())
        if self.objective.targets == "sampled":
            return int((self.rows.item[stop] >= self.meta.first_item).sum())
        return int((self._known_so_far[stop + 1] - self._known_so_far[first + 1]).sum())

    @cached_property
    def _known_so_far(self) -> Ints:
        """(E+1,) events of the window before each event that are items, not out-of-vocabulary rows."""
        known = np.cumsum(self.rows.item >= self.meta.first_item, dtype=np.int64)
        return np.concatenate([np.zeros(1, np.int64), known])

    def _events(self, stretches: Stretches) -> Ints:
        """(T,) where the events lie among those of the window."""
        return ranges(self.rows.offsets[stretches.row] + stretches.stop - stretches.length, stretches.length)

    def _next_items(self, stretches: Stretches) -> Ints:
        following = self.rows.item[self._events(stretches) + 1]
        if self.objective.targets == "all":
            return following
        last = np.cumsum(stretches.length) - 1
        target_item = np.full_like(following, -1)
        target_item[last] = following[last]
        return target_item

    def _hidden(self, at: Ints) -> NDArray[np.bool_]:
        return self.objective.hidden(self._uniform(_HIDE, at), self.stretches.length[at])

    def _uniform(self, stream: int, at: Ints) -> NDArray[np.float64]:
        """(T,) numbers in [0, 1)."""
        length = self.stretches.length[at]
        return uniform(*self.draw, stream, np.repeat(at, length), ranges(np.zeros_like(at), length))

    def _others(self, at: Ints) -> Ints:
        """(T,) items drawn from the catalogue that the event's row does not have in training."""
        row = self.stretches.row[at]
        rows = np.unique(row)
        events = self.training_events[rows]
        span = self.meta.num_table_rows
        had = np.repeat(rows, events) * span + self.rows.item[ranges(self.rows.offsets[rows], events)]
        row_of_event = np.repeat(row, self.stretches.length[at])
        drawn = self._drawn_items(_OTHERS, at)
        for tried in range(1, TRIES):
            again = np.isin(row_of_event * span + drawn, had)
            if not again.any():
                break
            drawn = np.where(again, self._drawn_items(_OTHERS + tried, at), drawn)
        return drawn

    def _drawn_items(self, stream: int, at: Ints) -> Ints:
        return self.meta.first_item + (self._uniform(stream, at) * self.meta.num_items).astype(np.int64)
