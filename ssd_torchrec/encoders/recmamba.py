"""RecMamba: one Mamba-1 block over scaled events and their positions, and nothing else; for very long histories.

    x   = dropout(sqrt(D) events + position)
    out = mixer(x)                                  no norm, no residual, no feed-forward
    position = positions[max_length - length + place in the row]       with positions "end"
             = 0                                                       with positions "none"
Timestamps are not read.

The published program counts positions from a window's end: the newest event has position max_length - 1 however many
came before it. It pads rows on their left with item 0, a vector like any other, and lets the padding into the state; a
published row of any length is here a row of max_length events, the first of which are item 0. Rows without padding
start from an empty state instead, and take the same positions.

Counted from the end, an event's position says how many events follow it in its row, and every vector of a row changes
when the row grows. The published program trains on all events of a row at once all the same: each is told how many
follow it, never which. Here with positions "end" the encoder is neither causal, so that targets must lie outside their
row, nor does it stream; with "none" it is and does.

Source: Yang et al. 2024, RecMamba, arXiv:2403.16371, in the structure of its published code.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import Encoder, EncoderConfig, StreamingEncoder, check_state
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.mamba_mixer import MambaMixer, MambaMixerConfig, MambaMixerState

Positions = Literal["end", "none"]
Init = Literal["published", "mamba"]
KNOWN = {"positions": get_args(Positions), "init": get_args(Init)}


@dataclass(frozen=True, kw_only=True)
class RecMambaConfig(EncoderConfig):
    """Shape of the encoder; the defaults are the published ones."""

    title: ClassVar[str] = "RecMamba"
    paper: ClassVar[str] = "Yang et al. 2024, arXiv:2403.16371"

    width: int = 64
    """Channels D of an event, in and out."""

    expand: int = 2
    """Inner channels of the mixer over the width."""

    state: int = 32
    """State N of a channel."""

    taps: int = 4
    """Taps of the convolution: how many events it sees."""

    dropout: float = 0.2
    """Of events with their positions."""

    positions: Positions = "end"
    """end: a learned vector for each place counted from the row's end, as published; none: the causal variant, which
    streams and takes rows of any length."""

    max_length: int = 2000
    """Positions that are learned, and events of the longest row; positions none learns none and has no longest row."""

    init: Init = "published"
    """Start of the mixer. published: every parameter of two or more axes Xavier normal, which takes the rates at which
    states forget with it: near 1 for all of them, where Mamba has 1 to N. mamba: Mamba's own start."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}; it is a share, not percent")
        if self.max_length < 1:
            raise ConfigError(f"max_length must be at least 1, got {self.max_length}; raise it, or take positions none")
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}; choose one of these"
                )
        self.mixer()  # refuses sizes below 1

    @property
    def causal(self) -> bool:
        """Unless positions count from the end."""
        return self.positions == "none"

    @property
    def streams(self) -> bool:
        """Unless positions count from the end."""
        return self.positions == "none"

    @property
    def length_cap(self) -> int:
        """The number of positions, if there are any."""
        return self.max_length if self.positions == "end" else 0

    def build(self) -> "RecMamba":
        """The encoder with new weights; a `StreamingRecMamba` if it streams."""
        return StreamingRecMamba(self) if self.streams else RecMamba(self)

    def mixer(self) -> MambaMixerConfig:
        return MambaMixerConfig(width=self.width, expand=self.expand, state=self.state, taps=self.taps)


PRESETS: dict[str, RecMambaConfig] = {
    "lifelong-1k": RecMambaConfig(max_length=1000),
    "lifelong-2k": RecMambaConfig(),
    "lifelong-5k": RecMambaConfig(max_length=5000),
    "lifelong-10k": RecMambaConfig(max_length=10_000),
}
"""The published sizes, for KuaiRand-27K and LFM-1b alike; its tables are of 2k and 5k."""


class RecMambaState(NamedTuple):
    """What the encoder keeps of a row, of one size whatever the row has seen."""

    conv: Tensor  # (B, K-1, E) last inputs of the convolution
    ssm: Tensor  # (B, E, N) fp32, or fp64 in an fp64 encoder


class RecMamba(Encoder):
    """The encoder of whole rows."""

    def __init__(self, config: RecMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.causal = config.causal
        self.mixer = MambaMixer(config.mixer())
        self.dropout = Dropout(config.dropout)
        self.positions = nn.Parameter(torch.empty(config.length_cap, config.width)) if config.length_cap else None
        if self.positions is not None:
            nn.init.xavier_normal_(self.positions)
        if config.init == "published":
            _start_as_published(self.mixer)

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole rows.

        Args:
            events: (T, D).
            timestamps: (T,) int64, not read.

        Returns:
            (T, D), each event's vector from it, the events before it in its row and, unless the encoder is causal, the
            number of those after it; in the dtype of the parameters.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`, or a row is longer than the cap.

        Deterministic. With T = 0 every parameter still gets a gradient, of zeros.
        """
        return self._encode(events, timestamps, layout, None)[0]

    def _encode(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: MambaMixerState | None
    ) -> tuple[Tensor, MambaMixerState | None]:
        layout.check(events)
        layout.check(timestamps)
        x = math.sqrt(self.width) * events
        if self.positions is not None:
            x = x + self.positions[self._places_from_the_end(layout)]
        return self.mixer(self.dropout(x), layout, state)

    def _places_from_the_end(self, layout: JaggedLayout) -> Tensor:
        """(T,) int64 with max_length - 1 at each row's last event."""
        cap = self.config.length_cap
        if layout.longest > cap:
            raise JaggedLayoutError(
                f"rows must have at most {cap} events, got one of {layout.longest}; keep the newest {cap} of a row, "
                "raise max_length, or take positions none"
            )
        return layout.position + (cap - layout.offsets.diff())[layout.row_of_event]


def _start_as_published(mixer: MambaMixer) -> None:
    """The published program starts everything of two or more axes anew after Mamba has."""
    for parameter in mixer.parameters():
        if parameter is mixer.conv.weight:
            nn.init.xavier_normal_(parameter.unsqueeze(1))  # its fans are those of a (C, 1, K) convolution
        elif parameter.ndim > 1:
            nn.init.xavier_normal_(parameter)


class StreamingRecMamba(RecMamba, StreamingEncoder[RecMambaState]):
    """The encoder without positions: `append` goes on from a state, by the code of `forward`."""

    def initial_state(self, rows: int) -> RecMambaState:
        """Zeros: the state of rows that have seen nothing."""
        mixer, weight = self.config.mixer(), self.mixer.A_log
        return RecMambaState(
            conv=weight.new_zeros(rows, mixer.taps - 1, mixer.inner),
            ssm=weight.new_zeros(rows, mixer.inner, mixer.state),
        )

    def append(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: RecMambaState
    ) -> tuple[Tensor, RecMambaState]:
        """Go on from `state`; see `StreamingEncoder.append`.

        Raises:
            JaggedLayoutError: events, timestamps or state are not those of `layout`.
        """
        check_state(state, layout)
        out, kept = self._encode(events, timestamps, layout, MambaMixerState(*state))
        assert kept is not None  # a mixer that is given a state gives one
        return out, RecMambaState(*kept)


PUBLISHED_IN_MIXER = {
    "mixer.in_proj.weight": "mamba1.in_proj.weight",
    "mixer.conv.weight": "mamba1.conv1d.weight",
    "mixer.conv.bias": "mamba1.conv1d.bias",
    "mixer.x_proj.weight": "mamba1.x_proj.weight",
    "mixer.dt_proj.weight": "mamba1.dt_proj.weight",
    "mixer.dt_bias": "mamba1.dt_proj.bias",
    "mixer.A_log": "mamba1.A_log",
    "mixer.D": "mamba1.D",
    "mixer.out_proj.weight": "mamba1.out_proj.weight",
}


def published_names(config: RecMambaConfig) -> dict[str, str]:
    """Our name of each parameter to that of the published program."""
    return PUBLISHED_IN_MIXER | ({"positions": "pos_emb.weight"} if config.positions == "end" else {})
