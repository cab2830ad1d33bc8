"""What every sequence encoder offers: event vectors of each row in, one vector an event out."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor, nn

from ssd_torchrec.jagged import JaggedLayout

State = TypeVar("State", bound=tuple[Tensor, ...])


class Encoder(nn.Module, ABC):
    """Turns the events of each row into vectors that stand for the row so far."""

    width: int
    """Channels D of an event, in and out."""

    causal: bool
    """Whether the output at an event depends on it and earlier ones of its row only."""

    @abstractmethod
    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode (T, D) events at (T,) int64 unix seconds, ascending within each row; returns (T, D)."""


class StreamingEncoder(Encoder, Generic[State]):
    """A causal encoder that can go on where it stopped, at a cost that does not grow with the history.

    Its state is a named tuple of tensors with B leading, each of one size per row whatever the row has seen.
    """

    causal = True

    @abstractmethod
    def initial_state(self, rows: int) -> State:
        """The state of rows that have seen nothing, on the device of the parameters."""

    @abstractmethod
    def append(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: State) -> tuple[Tensor, State]:
        """Encode what is new: each row brings 0, 1 or many events, at or after its last timestamp.

        Appending a history in any pieces gives what `forward` gives for the whole; from the initial state, this is
        the prefill. `state` is left as it is.

        Returns:
            (T, D) vectors of the new events, and the state after them.
        """
