"""TiM4Rec: SSD blocks whose steps are gated by the time between events; jagged, and causal and streaming by default.

    x = norm(dropout(events))
    for each layer:   r = norm(dropout(mixer(x, gate)) + x)      no "+ x" in an encoder of one layer
                      x = feed_forward(r)                      or r, where it is switched off
The gates of all layers follow from the timestamps alone: event by event (`modules/time_gate.py`), so that an output
depends on the past of its row only; or as published, mapped and normalised along a window of the row
(`modules/time_window.py`), where what lies ahead shows. Without gates it is what the paper calls SSD4Rec*.

Source: Fan et al. 2024, TiM4Rec, arXiv:2409.16182, in the structure of its published code.
"""

from dataclasses import dataclass, replace
from math import isfinite
from typing import ClassVar, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import EncoderConfig, StreamingEncoder, check_state
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.feed_forward import FeedForward
from ssd_torchrec.modules.short_conv import Activation, ConvInit
from ssd_torchrec.modules.ssd_mixer import SSDMixer, SSDMixerConfig, SSDMixerState
from ssd_torchrec.modules.time_gate import GapSignal, SignalMix, TimeGate, TimeGateConfig, TimeGateState
from ssd_torchrec.modules.time_window import WindowTime, WindowTimeConfig

TimeMode = Literal["causal", "window", "none"]
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

    feed_forward: bool = True
    """Whether a feed-forward follows each mixer."""

    time_mode: TimeMode = "causal"
    """causal: gaps gate the steps, each event sees its past only; window: the published gates, for which an event's
    whole row counts, later events included; none: timestamps are ignored."""

    time_hidden: int = 16
    """Hidden units of a causal gate's MLP."""

    time_dropout: float = 0.2
    """Of a causal gate's hidden units, or of what the maps along a window read."""

    window_length: int = 0
    """Slots of the window, and events of the longest row; of time_mode window, else 0."""

    mix_by_slot: bool = False
    """One weight for each slot of the window, not one for each head, where the next layer's time signal is mixed."""

    float32_timestamps: bool = False
    """Round timestamps to 64 or 128 s, as the published loader does; of time_mode window."""

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
        self._check_window()
        self.mixer()  # refuses heads that do not fit

    def _check_window(self) -> None:
        if (self.time_mode == "window") != (self.window_length > 0):
            raise ConfigError(
                f"window_length must be at least 1 under time_mode window and 0 under others, got {self.window_length} "
                f"under {self.time_mode}; change either"
            )
        if self.time_mode != "window" and (self.mix_by_slot or self.float32_timestamps):
            raise ConfigError(
                "mix_by_slot and float32_timestamps must be off without a window, got one of them under time_mode "
                f"{self.time_mode}; take time_mode window"
            )

    @property
    def causal(self) -> bool:
        """Unless time is seen through a window."""
        return self.time_mode != "window"

    @property
    def streams(self) -> bool:
        """Unless time is seen through a window, whose slots all move when an event comes."""
        return self.causal

    @property
    def reads_time(self) -> bool:
        """Unless it is switched off."""
        return self.time_mode != "none"

    @property
    def length_cap(self) -> int:
        """The slots of the window; 0 without."""
        return self.window_length

    def with_gaps(self, log_gap_mean: float, log_gap_std: float) -> Self:
        """The causal gate sees gaps normalised by these; a window is normalised by itself."""
        known = {"log_gap_mean": log_gap_mean, "log_gap_std": log_gap_std}
        return replace(self, **known) if self.time_mode == "causal" else self

    @property
    def gaps(self) -> tuple[float, float] | None:
        """Of the causal gate alone."""
        return (self.log_gap_mean, self.log_gap_std) if self.time_mode == "causal" else None

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

    def window(self) -> WindowTimeConfig:
        return WindowTimeConfig(
            length=self.window_length,
            heads=self.mixer().heads,
            taps=self.taps,
            activation=self.activation,
            conv_init=self.conv_init,
            norm_eps=self.norm_eps,
            gap_dropout=self.dropout,
            dropout=self.time_dropout,
            mix_by_slot=self.mix_by_slot,
            float32_timestamps=self.float32_timestamps,
        )


_ML_1M = TiM4RecConfig()
_BEAUTY = TiM4RecConfig(dropout=0.4, time_dropout=0.0, norm_eps=1e-5, conv_init="uniform")
_KUAIRAND = TiM4RecConfig(time_dropout=0.0, norm_eps=1e-10, conv_init="uniform")
_STEAM = TiM4RecConfig(norm_eps=1e-10)

PRESETS: dict[str, TiM4RecConfig] = {
    "ml-1m-64d": _ML_1M,
    "beauty-64d": _BEAUTY,
    "kuairand-64d": _KUAIRAND,
    "steam-64d": _STEAM,
    "ml-1m-256d": TiM4RecConfig(width=256, head_width=128, state=64),
    "window-ml-1m-64d": replace(_ML_1M, time_mode="window", window_length=200),
    "window-beauty-64d": replace(_BEAUTY, time_mode="window", window_length=50, mix_by_slot=True),
    "window-kuairand-64d": replace(_KUAIRAND, time_mode="window", window_length=50),
    "window-steam-64d": replace(_STEAM, time_mode="window", window_length=50),
    "ssd4rec-star-ml-1m-64d": replace(_ML_1M, time_mode="none", conv_init="uniform"),
    "ssd4rec-star-beauty-64d": replace(_BEAUTY, time_mode="none"),
    "ssd4rec-star-kuairand-64d": replace(_KUAIRAND, time_mode="none"),
}
"""The published sizes, with the dropout, epsilon and start of each. All with time, as the paper has them; the published
settings of kuairand-64d and ml-1m-256d switch it off. log_gap_mean and log_gap_std are the data's: set them.
window: with the published gates. ssd4rec-star: SSD4Rec*, the paper's ablation; on ML-1M it also starts its convolutions
as PyTorch does."""


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
        self.feed_forward = FeedForward(config.width, 4 * config.width, config.dropout) if config.feed_forward else None
        self.has_residual = config.layers > 1

    def forward(
        self, x: Tensor, gate: Tensor | None, layout: JaggedLayout, state: SSDMixerState | None
    ) -> tuple[Tensor, SSDMixerState | None]:
        """(T, D) and the (T, H) gate to (T, D), and what the mixer keeps."""
        mixed, after = self.mixer(x, gate, layout, state)
        mixed = self.dropout(mixed)
        out = self.norm(mixed + x if self.has_residual else mixed)
        return self.feed_forward(out) if self.feed_forward else out, after


class TiM4Rec(StreamingEncoder[TiM4RecState]):
    """The encoder: `forward` trains on whole histories, `append` goes on from a state; both run the same code."""

    def __init__(self, config: TiM4RecConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.causal = config.causal
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.time = _time_branch(config)
        self.layers = nn.ModuleList(TiM4RecLayer(config) for _ in range(config.layers))

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole histories.

        Args:
            events: (T, D).
            timestamps: (T,) int64 unix seconds, ascending within each row; out of order they become NaN.

        Returns:
            (T, D), each event's vector from it and earlier events of its row only, in the dtype of the parameters;
            under time_mode window also from the times of later ones.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`, or a row is longer than the window.

        Deterministic. With T = 0 every parameter still gets a gradient, of zeros.
        """
        return self._encode(events, timestamps, layout, None)[0]

    def initial_state(self, rows: int) -> TiM4RecState:
        """Zeros: the state of rows that have seen nothing.

        Raises:
            ConfigError: time is seen through a window.
        """
        self._check_streams()
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
            ConfigError: time is seen through a window.
            JaggedLayoutError: events, timestamps or state are not those of `layout`.
        """
        self._check_streams()
        check_state(state, layout)
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

    def _check_streams(self) -> None:
        if not self.config.streams:
            raise ConfigError(
                "only an encoder that sees the past alone goes on from a state, got time_mode window, where one more "
                "event moves every slot; call forward on whole rows, or train with time_mode causal"
            )

    def _encode(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: TiM4RecState | None
    ) -> tuple[Tensor, list[SSDMixerState], list[TimeGateState]]:
        """The one path of `forward` and `append`: vectors, and what mixers and gates keep (nothing without a state)."""
        layout.check(events)
        layout.check(timestamps)
        gates, kept_by_gates = self._gates(timestamps, layout, state)
        x = self.norm(self.dropout(events))
        kept_by_mixers = []
        for depth, layer in enumerate(self.layers):
            past = SSDMixerState(state.conv[:, depth], state.ssm[:, depth]) if state else None
            x, kept = layer(x, gates[depth] if gates else None, layout, past)
            kept_by_mixers += [kept] if kept else []
        return x, kept_by_mixers, kept_by_gates

    def _gates(
        self, timestamps: Tensor, layout: JaggedLayout, state: TiM4RecState | None
    ) -> tuple[list[Tensor], list[TimeGateState]]:
        if self.time is None:
            return [], []
        if isinstance(self.time, TimeBranch):
            return self.time(timestamps, layout, state)
        return self.time(timestamps, layout), []


def _time_branch(config: TiM4RecConfig) -> TimeBranch | WindowTime | None:
    if config.time_mode == "window":
        return WindowTime(config.window(), config.layers)
    return TimeBranch(config) if config.time_mode == "causal" else None


_BLOCK = {  # ours within a layer: published
    "mixer.in_proj.weight": "ssd.in_proj.weight",
    "mixer.in_proj.bias": "ssd.in_proj.bias",
    "mixer.conv.weight": "ssd.conv1d.weight",
    "mixer.conv.bias": "ssd.conv1d.bias",
    "mixer.dt_bias": "ssd.dt_bias",
    "mixer.A_log": "ssd.A_log",
    "mixer.D": "ssd.D",
    "mixer.norm_weight": "ssd.norm.weight",
    "mixer.out_proj.weight": "ssd.out_proj.weight",
    "mixer.out_proj.bias": "ssd.out_proj.bias",
    "norm.weight": "layer_norm.weight",
    "norm.bias": "layer_norm.bias",
}
_FEED_FORWARD = {"expand": "fc1", "contract": "fc2", "norm": "layer_norm"}
_TIME = {  # ours, {} the layer: published within it
    "gates.{}.hidden": "mlp4time_scale.1",
    "gates.{}.alpha": "mlp4time_scale.3",
    "gates.{}.first": "conv1d4time_1",
    "gates.{}.second": "conv1d4time_2",
    "mixes.{}.weigh": "time_gate_residual.1",
    "mixes.{}.norm": "time_layer_norm",
}


def published_names(config: TiM4RecConfig) -> dict[str, str]:
    """Name of each parameter here to its name in a state dict of the published program.

    Raises:
        ConfigError: gates are causal: the published program has no such parameters.
    """
    if config.time_mode == "causal":
        raise ConfigError(
            "only gates over a window, or none, were published, got time_mode causal; take time_mode window or none"
        )
    has_window = config.time_mode == "window"
    names = {"norm": "in_layer_norm"} | ({"time.signal.norm": "layer_norm_time"} if has_window else {})
    within = {}
    for depth in range(config.layers):
        within |= {f"layers.{depth}.{ours}": f"ssd_layers.{depth}.{theirs}" for ours, theirs in _BLOCK.items()}
        if config.feed_forward:
            ours, theirs = f"layers.{depth}.feed_forward.", f"ssd_layers.{depth}.ffn."
            names |= {ours + part: theirs + published for part, published in _FEED_FORWARD.items()}
        if has_window:
            names |= {f"time.{o.format(depth)}": f"ssd_layers.{depth}.ssd.{t}" for o, t in _TIME.items()}
    return within | {f"{ours}.{e}": f"{theirs}.{e}" for ours, theirs in names.items() for e in ("weight", "bias")}
