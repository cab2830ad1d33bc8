"""Caser: convolutions over a window of the last few events; causal, jagged, streaming.

    E[t]  = the last W events up to t, (W, D), zeros before the row's first
    o     = for each height h in 1..W:  max over places of relu(E[t] conv F_h)       n filters of (h, D)
    o'    = for each of m filters:      sum_w f[w] E[t][w]                           a sum of the window's events
    out   = relu(linear(dropout([o, o'])))

Source: Tang & Wang 2018, Caser, arXiv:1809.07656, section 3. The vector of each user that the paper adds is no
encoder's matter: who wants one gives the model a context feature.

Windows are not laid out. Rows lie end to end with room for W - 1 events before each, so that a filter meets every event
once, whatever number of windows holds it, and windows that end at an event never reach into another row.
"""

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import EncoderConfig, StreamingEncoder, check_state
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.linear import Linear
from ssd_torchrec.ops.rows import rearrange


@dataclass(frozen=True, kw_only=True)
class CaserConfig(EncoderConfig):
    """Shape of the encoder; the defaults are those for MovieLens, 64 wide."""

    title: ClassVar[str] = "Caser"
    paper: ClassVar[str] = "Tang & Wang 2018, arXiv:1809.07656"

    width: int = 64
    """Channels D of an event, in and out."""

    window: int = 5
    """Events W that an output sees, its own among them."""

    horizontal: int = 16
    """Filters n of each height."""

    vertical: int = 4
    """Filters m that sum the window."""

    dropout: float = 0.2
    """Of what the filters give."""

    def __post_init__(self) -> None:
        for name in ("width", "window", "horizontal", "vertical"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}; it is a share, not percent")

    @property
    def causal(self) -> bool:
        """Always."""
        return True

    @property
    def streams(self) -> bool:
        """Always."""
        return True

    @property
    def features(self) -> int:
        """What the filters give for one event."""
        return self.window * self.horizontal + self.vertical * self.width

    def build(self) -> "Caser":
        """The encoder with new weights."""
        return Caser(self)


PRESETS: dict[str, CaserConfig] = {
    "ml-1m-64d": CaserConfig(),
    "beauty-64d": CaserConfig(dropout=0.4),
}
"""Width and dropout of the comparisons with state-space encoders; window and filters of the paper itself."""


class CaserState(NamedTuple):
    """What the encoder keeps of a row: all that a window still reaches."""

    recent: Tensor  # (B, W-1, D) last events, oldest first; zeros where there was none, as in a window


class WindowFilters(nn.Module):
    """Both kinds of filters, at every place of a stream of events."""

    def __init__(self, config: CaserConfig) -> None:
        super().__init__()
        self.window = config.window
        heights = range(1, config.window + 1)
        self.horizontal = nn.ModuleList(nn.Conv1d(config.width, config.horizontal, height) for height in heights)
        self.vertical = nn.Conv1d(1, config.vertical, config.window, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """(S, D) to (S-W+1, features), of the window that begins at each place."""
        channels = stream.T  # (D, S)
        windows = len(stream) - self.window + 1
        highest = []
        for conv in self.horizontal:
            found = conv(channels[None])[0].relu()  # (n, places)
            places = found.shape[1] - windows + 1  # within a window
            highest.append(reduce(torch.maximum, [found[:, k : k + windows] for k in range(places)]))
        summed = self.vertical(channels[:, None])  # (D, m, S-W+1)
        return torch.cat([*highest, summed.flatten(0, 1)]).T


class Caser(StreamingEncoder[CaserState]):
    """The encoder: `forward` trains on whole histories, `append` goes on from a state; both run the same code."""

    def __init__(self, config: CaserConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.filters = WindowFilters(config)
        self.dropout = Dropout(config.dropout)
        self.out_proj = Linear(config.features, config.width)

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole histories; timestamps make no difference.

        Args:
            events: (T, D).
            timestamps: (T,) int64 unix seconds.

        Returns:
            (T, D), none below 0, each event's vector from it and the W - 1 events before it in its row, in the dtype of
            the parameters.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`.

        Deterministic. With T = 0 every parameter still gets a gradient, of zeros.
        """
        return self.append(events, timestamps, layout, self.initial_state(layout.num_rows))[0]

    def initial_state(self, rows: int) -> CaserState:
        """Zeros: the state of rows that have seen nothing."""
        return CaserState(self.out_proj.weight.new_zeros(rows, self.config.window - 1, self.width))

    def append(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: CaserState
    ) -> tuple[Tensor, CaserState]:
        """Go on from `state`; see `StreamingEncoder.append`.

        Raises:
            JaggedLayoutError: events, timestamps or state are not those of `layout`.
        """
        layout.check(events)
        layout.check(timestamps)
        check_state(state, layout)
        if not layout.num_events:
            return self.out_proj(self._nothing(events)).relu(), state
        stream, room = _stream(events, layout, state.recent), self.config.window - 1
        rows = torch.arange(layout.num_rows, device=events.device)
        begins = torch.arange(layout.num_events, device=events.device) + room * layout.row_of_event
        newest = (layout.offsets[1:] + room * rows)[:, None] + torch.arange(room, device=events.device)
        features = self.filters(stream).index_select(0, begins)
        return self.out_proj(self.dropout(features)).relu(), CaserState(stream[newest])

    def _nothing(self, events: Tensor) -> Tensor:
        """(0, features), and every filter in the graph."""
        zero = torch.stack([p.flatten()[:0].sum() for p in self.filters.parameters()]).sum() + events.sum()
        return zero.expand(0, self.config.features)


def _stream(events: Tensor, layout: JaggedLayout, recent: Tensor) -> Tensor:
    """(T, D) events, before those of each row its W-1 recent ones: (T + B (W-1), D).

    # rows of 2 and 1 events, W = 3, r is recent      r r a b r r c
    """
    num_rows, room = recent.shape[:2]
    rows, device = torch.arange(num_rows, device=events.device), events.device
    of_recent = (layout.offsets[:-1] + room * rows)[:, None] + torch.arange(room, device=device)
    of_events = torch.arange(len(events), device=device) + room * (layout.row_of_event + 1)
    places = torch.cat([of_recent.flatten(), of_events])
    return rearrange(torch.cat([recent.flatten(0, 1), events.to(recent.dtype)]), places.argsort(), places)
