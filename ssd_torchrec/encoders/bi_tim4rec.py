"""Bi-TiM4Rec: TiM4Rec that reads each row both ways, its steps gated by the gap behind an event and the gap ahead.

    x = norm(dropout(events))
    for each layer:   r = norm(dropout(mixer(x, gates)) + x)     no "+ x" in an encoder of one layer
                      x = feed_forward(r)
    gates = the gate forward, of the gaps to the event before, and the gate backward, of the gaps to the event after
The mixer scans both ways at once (`modules/bidirectional_ssd_mixer.py`). The way back has a time branch of its own,
with the same layers, run from a row's last event to its first: its convolutions look at the events after an event.

An event knows all of its row, so that targets must lie outside of it, and nothing streams.
Source: Fan et al. 2024, TiM4Rec, arXiv:2409.16182, for layers and gates (`tim4rec.py`); Hwang et al. 2024, Hydra,
arXiv:2407.09941, for the sum of both ways. Put together here.
"""

from dataclasses import dataclass, replace
from math import isfinite
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import Encoder, EncoderConfig
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.bidirectional_ssd_mixer import BidirectionalSSDMixer
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.feed_forward import FeedForward
from ssd_torchrec.modules.short_conv import Activation, ConvInit
from ssd_torchrec.modules.ssd_mixer import SSDMixerConfig
from ssd_torchrec.modules.time_gate import GapSignal, NextGapSignal, SignalMix, TimeGate, TimeGateConfig

GapMode = Literal["both", "none"]
KNOWN = {"time_mode": get_args(GapMode), "activation": get_args(Activation), "conv_init": get_args(ConvInit)}


@dataclass(frozen=True, kw_only=True)
class BiTiM4RecConfig(EncoderConfig):
    """Shape of the encoder; the defaults are those of the 64-wide TiM4Rec."""

    title: ClassVar[str] = "Bi-TiM4Rec"
    paper: ClassVar[str] = "after Fan et al. 2024, arXiv:2409.16182, and Hwang et al. 2024, arXiv:2407.09941"

    width: int = 64
    """Channels D of an event, in and out."""

    layers: int = 2
    """Mixer and feed-forward pairs."""

    expand: int = 2
    """Inner channels of a mixer over the width."""

    head_width: int = 32
    """Inner channels of a head; each head has a gate of its own each way."""

    state: int = 32
    """State N of a channel, each way."""

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

    time_mode: GapMode = "both"
    """both: the gap behind an event gates its step forward, the gap ahead its step backward; none: timestamps are
    ignored."""

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
        """In no mode."""
        return False

    @property
    def reads_time(self) -> bool:
        """Unless it is switched off."""
        return self.time_mode != "none"

    def with_gaps(self, log_gap_mean: float, log_gap_std: float) -> Self:
        """The gates see gaps normalised by these."""
        return replace(self, log_gap_mean=log_gap_mean, log_gap_std=log_gap_std) if self.reads_time else self

    @property
    def gaps(self) -> tuple[float, float] | None:
        """Of both gates."""
        return (self.log_gap_mean, self.log_gap_std) if self.reads_time else None

    def build(self) -> "BiTiM4Rec":
        """The encoder with new weights."""
        return BiTiM4Rec(self)

    def mixer(self) -> SSDMixerConfig:
        return SSDMixerConfig(
            width=self.width,
            expand=self.expand,
            head_width=self.head_width,
            state=self.state,
            taps=self.taps,
            activation=self.activation,
            conv_init=self.conv_init,
            raw_step=1.0 if self.reads_time else 0.0,
            norm_eps=self.norm_eps,
        )

    def gate(self, *, backward: bool) -> TimeGateConfig:
        return TimeGateConfig(
            heads=self.mixer().heads,
            taps=self.taps,
            hidden=self.time_hidden,
            activation=self.activation,
            dropout=self.time_dropout,
            reverse=backward,
        )


PRESETS: dict[str, BiTiM4RecConfig] = {
    "ml-1m-64d": BiTiM4RecConfig(),
    "beauty-64d": BiTiM4RecConfig(dropout=0.4, time_dropout=0.0, norm_eps=1e-5, conv_init="uniform"),
    "kuairand-64d": BiTiM4RecConfig(time_dropout=0.0, norm_eps=1e-10, conv_init="uniform"),
    "steam-64d": BiTiM4RecConfig(norm_eps=1e-10),
}
"""The published sizes of TiM4Rec, with the dropout, epsilon and start of each; nobody published these both ways.
log_gap_mean and log_gap_std are the data's: set them."""


class GatesOneWay(nn.Module):
    """A signal of one way to its gates of all layers."""

    def __init__(self, config: BiTiM4RecConfig, *, backward: bool) -> None:
        super().__init__()
        gate = config.gate(backward=backward)
        self.gates = nn.ModuleList(TimeGate(gate) for _ in range(config.layers))
        self.mixes = nn.ModuleList(SignalMix(gate.heads) for _ in range(config.layers - 1))  # none after the last gate

    def forward(self, signal: Tensor, layout: JaggedLayout) -> list[Tensor]:
        """(T, H) to one (T, H) gate a layer."""
        gates = [self.gates[0](signal, layout)[0]]
        for mix, to_gate in zip(self.mixes, self.gates[1:], strict=True):
            signal = mix(signal, gates[-1])
            gates.append(to_gate(signal, layout)[0])
        return gates


class BothTimeBranches(nn.Module):
    """Timestamps to the gates of all layers, both ways."""

    def __init__(self, config: BiTiM4RecConfig) -> None:
        super().__init__()
        heads = config.mixer().heads
        self.signal = GapSignal(heads, config.log_gap_mean, config.log_gap_std)
        self.next_signal = NextGapSignal(heads, config.log_gap_mean, config.log_gap_std)
        self.ahead = GatesOneWay(config, backward=False)
        self.back = GatesOneWay(config, backward=True)

    def forward(self, timestamps: Tensor, layout: JaggedLayout) -> list[Tensor]:
        """(T,) int64 seconds to one (T, 2, H) gate a layer, forward and backward. Autocast does not reach in here."""
        with torch.autocast(timestamps.device.type, enabled=False):
            ahead = self.ahead(self.signal(timestamps, layout, None, None), layout)
            back = self.back(self.next_signal(timestamps, layout), layout)
            return [torch.stack(both, dim=1) for both in zip(ahead, back, strict=True)]


class BiTiM4RecLayer(nn.Module):
    """Mixer, then feed-forward."""

    def __init__(self, config: BiTiM4RecConfig) -> None:
        super().__init__()
        self.mixer = BidirectionalSSDMixer(config.mixer())
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.width, 4 * config.width, config.dropout)
        self.has_residual = config.layers > 1

    def forward(self, x: Tensor, gate: Tensor | None, layout: JaggedLayout) -> Tensor:
        """(T, D) and the (T, 2, H) gates to (T, D)."""
        mixed = self.dropout(self.mixer(x, gate, layout))
        return self.feed_forward(self.norm(mixed + x if self.has_residual else mixed))


class BiTiM4Rec(Encoder):
    """The encoder of whole rows."""

    causal = False

    def __init__(self, config: BiTiM4RecConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.time = BothTimeBranches(config) if config.reads_time else None
        self.layers = nn.ModuleList(BiTiM4RecLayer(config) for _ in range(config.layers))

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole rows.

        Args:
            events: (T, D).
            timestamps: (T,) int64 unix seconds, ascending within each row; out of order they become NaN.

        Returns:
            (T, D), each event's vector from all events of its row, in the dtype of the parameters.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`.

        Deterministic. With T = 0 every parameter still gets a gradient, of zeros.
        """
        layout.check(events)
        layout.check(timestamps)
        gates = self.time(timestamps, layout) if self.time else [None] * len(self.layers)
        x = self.norm(self.dropout(events))
        for layer, gate in zip(self.layers, gates, strict=True):
            x = layer(x, gate, layout)
        return x
