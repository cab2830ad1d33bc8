"""TiM4Rec: SSD blocks whose steps are gated by the time between events; causal, jagged, streaming.

    x = norm(dropout(events))
    for each layer:   r = norm(dropout(mixer(x, gate)) + x)      no "+ x" in an encoder of one layer
                      x = feed_forward(r)
The gates of all layers follow from the timestamps alone (`modules/time_gate.py`).

Source: Fan et al. 2024, TiM4Rec, arXiv:2409.16182, in the structure of its published code; what maps or normalises
along the time axis there is done event by event here, so that an output depends on the past of its row only.
"""

from dataclasses import dataclass, replace
from math import isfinite
from typing import ClassVar, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import EncoderConfig, StreamingEncoder
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.feed_forward import FeedForward
from ssd_torchrec.modules.short_conv import Activation, ConvInit
from ssd_torchrec.modules.ssd_mixer import SSDMixer, SSDMixerConfig, SSDMixerState
from ssd_torchrec.modules.time_gate import GapSignal, SignalMix, TimeGate, TimeGateConfig, TimeGateState

TimeMode = Literal["causal", "none"]
KNOWN = {"time_mode": get_args(TimeMode), "activation": get_args(Activation), "conv_init": get_args(ConvInit)}


@dataclass(frozen=True, kw_only=True)
class TiM4RecConfig(EncoderConfig):
    """Shape of the encoder; the defaults are the published 64-wide one."""

    title: ClassVar[str] = "TiM4Rec"
    paper: ClassVar[str] = "Fan et al. 2024, arXiv:2409.16182"

    width: int = 64
    """Channels D of an event, in and out."""

    layers: int = 2
    """Mixer and feed-forward pairs."""

    expand: int = 2
    """Inner channels of a mixer over the width."""

    head_width: int = 32
    """Inner channels of a head; each head has a gate of its own."""

    state: int = 32
    """State N of a channel."""

    taps: int = 4
    """Taps of every convolution: how many events it sees."""

    activation: Activation = "hardswish"
    """After every convolution."""

    conv_init: ConvInit = "kaiming"
    """Start of the mixers' convolutions."""

    norm_eps: float = 1e-12
    """Of every norm but the feed-forward's, which has 1e-12."""

    dropout: float = 0.2
    """Of events and of what each block adds to them."""

    time_mode: TimeMode = "causal"
    """causal: gaps gate the steps, each event sees its past only; none: timestamps are ignored."""

    time_hidden: int = 16
    """Hidden units of a gate's MLP."""

    time_dropout: float = 0.2
    """Of a gate's hidden units."""

    log_gap_mean: float = 9.0
    """Mean of log1p(gap in s) over the training set; kept here so that serving normalises as training did."""

    log_gap_std: float = 3.5
    """Standard deviation of the same."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "expand", "head_width", "state", "taps", "time_hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("dropout", "time_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}; it is a share, not percent")
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}; choose one of these"
                )
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be above 0, got {self.norm_eps}; raise it")
        if not (self.log_gap_std > 0 and isfinite(self.log_gap_std) and isfinite(self.log_gap_mean)):
            raise ConfigError(
                f"log_gap_mean must be finite and log_gap_std above 0, got {self.log_gap_mean} and {self.log_gap_std}; "
                "a training set whose gaps are all alike has no time to learn from: take time_mode none"
            )
        self.mixer()  # refuses heads that do not fit

    @property
    def causal(self) -> bool:
        """In every mode."""
        return True

    @property
    def streams(self) -> bool:
        """In every mode."""
        return True

    @property
    def reads_time(self) -> bool:
        """Unless it is switched off."""
        return self.time_mode != "none"

    def with_gaps(self, log_gap_mean: float, log_gap_std: float) -> Self:
        """The gate sees gaps normalised by these."""
        return replace(self, log_gap_mean=log_gap_mean, log_gap_std=log_gap_std) if self.reads_time else self

    def build(self) -> "TiM4Rec":
        """The encoder with new weights."""
        return TiM4Rec(self)

    def mixer(self) -> SSDMixerConfig:
        return SSDMixerConfig(
            width=self.width,
            expand=self.expand,
            head_width=self.head_width,
            state=self.state,
            taps=self.taps,
            activation=self.activation,
            conv_init=self.conv_init,
            raw_step=1.0 if self.time_mode == "causal" else 0.0,
            norm_eps=self.norm_eps,
        )

    def gate(self) -> TimeGateConfig:
        return TimeGateConfig(
            heads=self.mixer().heads,
            taps=self.taps,
            hidden=self.time_hidden,
            activation=self.activation,
            dropout=self.time_dropout,
        )


PRESETS: dict[str, TiM4RecConfig] = {
    "ml-1m-64d": TiM4RecConfig(),
    "beauty-64d": TiM4RecConfig(dropout=0.4, time_dropout=0.0, norm_eps=1e-5, conv_init="uniform"),
    "kuairand-64d": TiM4RecConfig(time_dropout=0.0, norm_eps=1e-10, conv_init="uniform"),
    "steam-64d": TiM4RecConfig(norm_eps=1e-10),
    "ml-1m-256d": TiM4RecConfig(width=256, head_width=128, state=64),
}
"""The published sizes, with the dropout, epsilon and start of each. All with time, as the paper has them; the published
settings of kuairand-64d and ml-1m-256d switch it off. log_gap_mean and log_gap_std are the data's: set them."""


class TiM4RecState(NamedTuple):
    """What the encoder keeps of a row, of one size whatever the row has seen; L layers, of gates 0 without time."""

    conv: Tensor  # (B, L, K-1, E+2N) last inputs of the mixers' convolutions
    ssm: Tensor  # (B, L, H, P, N) fp32, or fp64 in an fp64 encoder
    gate_first: Tensor  # (B, L, K-1, H) last inputs of the gates' convolutions
    gate_second: Tensor  # (B, L, K-1, H)
    last_timestamp: Tensor  # (B,) int64 seconds; 0 before the first event
    num_events: Tensor  # (B,) int64


class TimeBranch(nn.Module):
    """Timestamps to the gates of all layers."""

    def __init__(self, config: TiM4RecConfig) -> None:
        super().__init__()
        gate = config.gate()
        self.signal = GapSignal(gate.heads, config.log_gap_mean, config.log_gap_std)
        self.gates = nn.ModuleList(TimeGate(gate) for _ in range(config.layers))
        self.mixes = nn.ModuleList(SignalMix(gate.heads) for _ in range(config.layers - 1))  # none after the last gate

    def forward(
        self, timestamps: Tensor, layout: JaggedLayout, state: TiM4RecState | None
    ) -> tuple[list[Tensor], list[TimeGateState]]:
        """(T,) int64 seconds to one (T, H) gate a layer, and what each keeps (nothing without a state).

        Autocast does not reach in here.
        """
        with torch.autocast(timestamps.device.type, enabled=False):
            last, known = (state.last_timestamp, state.num_events > 0) if state else (None, None)
            signal = self.signal(timestamps, layout, last, known)
            gates, kept_by_gates = [], []
            for depth, to_gate in enumerate(self.gates):
                if depth:
                    signal = self.mixes[depth - 1](signal, gates[-1])
                past = TimeGateState(state.gate_first[:, depth], state.gate_second[:, depth]) if state else None
                gate, kept = to_gate(signal, layout, past)
                gates.append(gate)
                kept_by_gates += [kept] if kept else []
        return gates, kept_by_gates


class TiM4RecLayer(nn.Module):
    """Mixer, then feed-forward."""

    def __init__(self, config: TiM4RecConfig) -> None:
        super().__init__()
        self.mixer = SSDMixer(config.mixer())
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.width, 4 * config.width, config.dropout)
        self.has_residual = config.layers > 1

    def forward(
        self, x: Tensor, gate: Tensor | None, layout: JaggedLayout, state: SSDMixerState | None
    ) -> tuple[Tensor, SSDMixerState | None]:
        """(T, D) and the (T, H) gate to (T, D), and what the mixer keeps."""
        mixed, after = self.mixer(x, gate, layout, state)
        mixed = self.dropout(mixed)
        return self.feed_forward(self.norm(mixed + x if self.has_residual else mixed)), after


class TiM4Rec(StreamingEncoder[TiM4RecState]):
    """The encoder: `forward` trains on whole histories, `append` goes on from a state; both run the same code."""

    def __init__(self, config: TiM4RecConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.time = TimeBranch(config) if config.time_mode == "causal" else None
        self.layers = nn.ModuleList(TiM4RecLayer(config) for _ in range(config.layers))

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole histories.

        Args:
            events: (T, D).
            timestamps: (T,) int64 unix seconds, ascending within each row; out of order they become NaN.

        Returns:
            (T, D), each event's vector from it and earlier events of its row only, in the dtype of the parameters.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`.

        Deterministic. With T = 0 every parameter still gets a gradient, of zeros.
        """
        return self._encode(events, timestamps, layout, None)[0]

    def initial_state(self, rows: int) -> TiM4RecState:
        """Zeros: the state of rows that have seen nothing."""
        mixer, weight = self.config.mixer(), self.norm.weight
        layers, gates, tail = self.config.layers, len(self.time.gates) if self.time else 0, self.config.taps - 1
        seen = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        return TiM4RecState(
            conv=weight.new_zeros(rows, layers, tail, mixer.conv_channels),
            ssm=weight.new_zeros(rows, layers, mixer.heads, mixer.head_width, mixer.state),
            gate_first=weight.new_zeros(rows, gates, tail, mixer.heads),
            gate_second=weight.new_zeros(rows, gates, tail, mixer.heads),
            last_timestamp=seen,
            num_events=seen.clone(),
        )

    def append(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: TiM4RecState
    ) -> tuple[Tensor, TiM4RecState]:
        """Go on from `state`; see `StreamingEncoder.append`.

        Raises:
            JaggedLayoutError: events, timestamps or state are not those of `layout`.
        """
        if len(state.num_events) != layout.num_rows:
            raise JaggedLayoutError(
                f"state must hold the {layout.num_rows} rows of the layout, got {len(state.num_events)}; "
                "give rows without new events a length of 0"
            )
        out, mixers, gates = self._encode(events, timestamps, layout, state)
        rows = torch.arange(layout.num_rows, device=timestamps.device)
        newest = torch.where(layout.last_event >= 0, layout.last_event, layout.num_events + rows)
        return out, TiM4RecState(
            conv=torch.stack([kept.conv for kept in mixers], dim=1),
            ssm=torch.stack([kept.ssm for kept in mixers], dim=1),
            gate_first=torch.stack([kept.first for kept in gates], dim=1) if gates else state.gate_first,
            gate_second=torch.stack([kept.second for kept in gates], dim=1) if gates else state.gate_second,
            last_timestamp=torch.cat([timestamps, state.last_timestamp])[newest],
            num_events=state.num_events + layout.offsets.diff(),
        )

    def _encode(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: TiM4RecState | None
    ) -> tuple[Tensor, list[SSDMixerState], list[TimeGateState]]:
        """The one path of `forward` and `append`: vectors, and what mixers and gates keep (nothing without a state)."""
        layout.check(events)
        layout.check(timestamps)
        gates, kept_by_gates = self.time(timestamps, layout, state) if self.time else ([], [])
        x = self.norm(self.dropout(events))
        kept_by_mixers = []
        for depth, layer in enumerate(self.layers):
            past = SSDMixerState(state.conv[:, depth], state.ssm[:, depth]) if state else None
            x, kept = layer(x, gates[depth] if gates else None, layout, past)
            kept_by_mixers += [kept] if kept else []
        return x, kept_by_mixers, kept_by_gates
