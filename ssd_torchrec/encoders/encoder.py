"""What every sequence encoder offers: event vectors of each row in, one vector an event out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Self, TypeVar

from torch import Tensor, nn

from ssd_torchrec.errors import JaggedLayoutError
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


def check_state(state: tuple[Tensor, ...], layout: JaggedLayout) -> None:
    """Refuse the state of another number of rows.

    Raises:
        JaggedLayoutError: a tensor of `state` does not have a row for each of `layout`.
    """
    for part in state:
        if len(part) != layout.num_rows:
            raise JaggedLayoutError(
                f"state must hold the {layout.num_rows} rows of the layout, got {len(part)}; "
                "give rows without new events a length of 0"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ABC):
    """The shape of an encoder, and what a run has to know of it before it is built."""

    title: ClassVar[str]
    """Name of the system."""

    paper: ClassVar[str]
    """Where it was published."""

    width: int = 64
    """Channels D of an event, in and out."""

    @property
    @abstractmethod
    def causal(self) -> bool:
        """Whether the output at an event depends on it and earlier ones of its row only."""

    @property
    def streams(self) -> bool:
        """Whether `build` gives a `StreamingEncoder`."""
        return False

    @property
    def reads_time(self) -> bool:
        """Whether timestamps make a difference."""
        return False

    @property
    def length_cap(self) -> int:
        """Events of the longest row it takes; 0 for any."""
        return 0

    def with_gaps(self, log_gap_mean: float, log_gap_std: float) -> Self:
        """With the mean and standard deviation of log1p(gap in s) over the training set, if it has a use for them."""
        return self

    @property
    def gaps(self) -> tuple[float, float] | None:
        """What `with_gaps` was given; None where there is no use for it."""
        return None

    @abstractmethod
    def build(self) -> Encoder:
        """The encoder, its weights drawn from PyTorch's generator."""
