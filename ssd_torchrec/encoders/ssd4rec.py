"""SSD4Rec: SSD blocks that run over each row both ways with the same weights; packed, or forward only and streaming.

    x = norm(dropout(events))                          or events as they come, without norm_embedding
    for each layer:   f = mixer(x)                     from a row's first event to its last
                      b = mixer(x turned)              the same mixer from its last to its first; weighed by beta
                      r = dropout(norm(f + beta b + x))
                      x = dropout(norm(contract(dropout(gelu(expand(r)))) + r))
"item" adds to an event what the way back gives at this event. "slot" leaves b turned, as the published code does: the
event at place t of n takes what the way back gives at place n+1-t, so that the last event, where a row is read, takes
what it gives at the first, made of the whole row. Timestamps are ignored.

Projections go event by event, so both ways share them; only convolution, scan and gated norm run twice.
Source: Qu et al. 2024, SSD4Rec, arXiv:2409.01192, in the structure of its published code. Masking is the data's.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import EncoderConfig, StreamingEncoder, check_state
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.feed_forward import FeedForward
from ssd_torchrec.modules.ssd_mixer import SSDMixer, SSDMixerConfig, SSDMixerState
from ssd_torchrec.ops.gated_norm import gated_norm
from ssd_torchrec.ops.short_conv import short_conv
from ssd_torchrec.ops.ssd_scan import ssd_scan

BackwardAlign = Literal["item", "slot"]
LAYER_NORM_EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class SSD4RecConfig(EncoderConfig):
    """Shape of the encoder; the defaults are the published ones, but for the alignment."""

    title: ClassVar[str] = "SSD4Rec"
    paper: ClassVar[str] = "Qu et al. 2024, arXiv:2409.01192"

    width: int = 256
    """Channels D of an event, in and out."""

    layers: int = 2
    """Mixer and feed-forward pairs."""

    expand: int = 2
    """Inner channels of a mixer over the width."""

    head_width: int = 16
    """Inner channels of a head."""

    state: int = 64
    """State N of a channel."""

    taps: int = 4
    """Taps of the convolution: how many events it sees."""

    gated_norm_eps: float = 1e-5
    """Of the mixers' gated norm; the other norms have 1e-12."""

    dropout: float = 0.2
    """Of events, and of what every norm gives."""

    norm_embedding: bool = True
    """Whether events are dropped out and normalised before the first layer."""

    beta: float = 0.1
    """Weight of the way back; 0 runs forward only: causal, and it streams."""

    backward_align: BackwardAlign = "item"
    """item: an event takes what the way back gives at this event; slot: at the event as far from the other end of its
    row, as published."""

    max_length: int = 0
    """Events of the longest row, the newest ones; 0 for any. Streams go on beyond it."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "expand", "head_width", "state", "taps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("beta", "max_length"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}; 0 is without")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}; it is a share, not percent")
        if not self.gated_norm_eps > 0:
            raise ConfigError(f"gated_norm_eps must be above 0, got {self.gated_norm_eps}; raise it")
        if self.backward_align not in get_args(BackwardAlign):
            raise ConfigError(f"backward_align must be item or slot, got {self.backward_align!r}; choose one of these")
        self.mixer()  # refuses heads that do not fit

    @property
    def causal(self) -> bool:
        """Without a way back."""
        return self.beta == 0

    @property
    def streams(self) -> bool:
        """Without a way back."""
        return self.beta == 0

    @property
    def length_cap(self) -> int:
        """`max_length`."""
        return self.max_length

    def build(self) -> "SSD4Rec":
        """The encoder with new weights."""
        return SSD4Rec(self)

    def mixer(self) -> SSDMixerConfig:
        return SSDMixerConfig(
            width=self.width,
            expand=self.expand,
            head_width=self.head_width,
            state=self.state,
            taps=self.taps,
            activation="silu",
            norm_eps=self.gated_norm_eps,
            bias=False,
        )


PRESETS: dict[str, SSD4RecConfig] = {
    "ml-1m": SSD4RecConfig(backward_align="slot", max_length=200),
    "beauty": SSD4RecConfig(backward_align="slot", max_length=50, layers=1, dropout=0.4, norm_embedding=False),
    "video-games": SSD4RecConfig(backward_align="slot", max_length=50, layers=1, dropout=0.4, norm_embedding=False),
    "kuairand": SSD4RecConfig(backward_align="slot", max_length=50),
}
"""The published settings. The published program reads max_length and does not keep to it: 0 is what it does. It masks
a share of a training row's items: 0.1, 0.2, 0.1 and 0.2 of these data sets."""


class SSD4RecState(NamedTuple):
    """What a forward-only encoder keeps of a row, of one size whatever the row has seen; L layers."""

    conv: Tensor  # (B, L, K-1, E+2N) last inputs of the convolutions
    ssm: Tensor  # (B, L, H, P, N) fp32, or fp64 in an fp64 encoder


class TwoWayMixer(SSDMixer):
    """One mixer for both ways; from a state it goes forward only."""

    def both_ways(self, x: Tensor, layout: JaggedLayout) -> tuple[Tensor, Tensor]:
        """(T, D) to what events take forward and backward, (T, E) each, before the last projection."""
        z, xbc, step = self._project(x)
        forward, backward = (self._one_way(z, xbc, step, layout, reverse=reverse) for reverse in (False, True))
        return forward, backward

    def _one_way(self, z: Tensor, xbc: Tensor, step: Tensor, layout: JaggedLayout, *, reverse: bool) -> Tensor:
        xbc = short_conv(
            xbc, self.conv.weight, self.conv.bias, layout, activation=self.conv.activation, reverse=reverse
        )
        x, B, C = self._split(xbc)
        y = ssd_scan(x, step, -self.A_log.exp(), B, C, layout, dt_bias=self.dt_bias, D=self.D, reverse=reverse)
        return gated_norm(y.flatten(1), z, self.norm_weight, eps=self.config.norm_eps)


class SSD4RecLayer(nn.Module):
    """Mixer, then feed-forward."""

    def __init__(self, config: SSD4RecConfig) -> None:
        super().__init__()
        self.beta = config.beta
        self.mixer = TwoWayMixer(config.mixer())
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(config.dropout)
        self.feed_forward = FeedForward(
            config.width, 4 * config.width, config.dropout, LAYER_NORM_EPS, activation="gelu", drop_after_norm=True
        )

    def forward(
        self, x: Tensor, layout: JaggedLayout, turned: Tensor | None, state: SSDMixerState | None
    ) -> tuple[Tensor, SSDMixerState | None]:
        """(T, D) to (T, D), and what the mixer keeps; `turned` (T,) says where an event takes the way back from."""
        mixed, after = self._both_ways(x, layout, turned) if self.beta else self.mixer(x, None, layout, state)
        return self.feed_forward(self.dropout(self.norm(mixed + x))), after

    def _both_ways(self, x: Tensor, layout: JaggedLayout, turned: Tensor | None) -> tuple[Tensor, None]:
        forward, backward = self.mixer.both_ways(x, layout)
        backward = backward if turned is None else backward.index_select(0, turned)
        return self.mixer.out_proj(torch.add(forward, backward, alpha=self.beta)), None


class SSD4Rec(StreamingEncoder[SSD4RecState]):
    """The encoder; it streams where it runs forward only."""

    def __init__(self, config: SSD4RecConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.causal = config.causal
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)  # there without norm_embedding too, as published
        self.layers = nn.ModuleList(SSD4RecLayer(config) for _ in range(config.layers))

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole rows.

        Args:
            events: (T, D).
            timestamps: (T,) int64; ignored.

        Returns:
            (T, D), each event's vector from all of its row, or from it and earlier events where beta is 0, in the
            dtype of the parameters.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`, or a row is longer than `max_length`.

        Deterministic. With T = 0 every parameter still gets a gradient, of zeros.
        """
        if 0 < self.config.max_length < layout.longest:
            raise JaggedLayoutError(
                f"rows must have at most max_length = {self.config.max_length} events, got one of {layout.longest}; "
                "cut rows to their newest events, or raise it"
            )
        return self._encode(events, timestamps, layout, None)[0]

    def initial_state(self, rows: int) -> SSD4RecState:
        """Zeros: the state of rows that have seen nothing.

        Raises:
            ConfigError: there is a way back.
        """
        self._check_streams()
        mixer, layers, weight = self.config.mixer(), self.config.layers, self.norm.weight
        return SSD4RecState(
            conv=weight.new_zeros(rows, layers, mixer.taps - 1, mixer.conv_channels),
            ssm=weight.new_zeros(rows, layers, mixer.heads, mixer.head_width, mixer.state),
        )

    def append(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: SSD4RecState
    ) -> tuple[Tensor, SSD4RecState]:
        """Go on from `state`; see `StreamingEncoder.append`.

        Raises:
            ConfigError: there is a way back.
            JaggedLayoutError: events, timestamps or state are not those of `layout`.
        """
        self._check_streams()
        check_state(state, layout)
        out, kept = self._encode(events, timestamps, layout, state)
        conv, ssm = (torch.stack(of_layers, dim=1) for of_layers in zip(*kept, strict=True))
        return out, SSD4RecState(conv, ssm)

    def _check_streams(self) -> None:
        if not self.config.streams:
            raise ConfigError(
                f"only an encoder with beta 0 goes on from a state, got beta {self.config.beta}, whose way back starts "
                "at the newest event; call forward on whole rows, or train with beta 0"
            )

    def _encode(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: SSD4RecState | None
    ) -> tuple[Tensor, list[SSDMixerState]]:
        """The one path of `forward` and `append`: vectors, and what the mixers keep (nothing without a state)."""
        layout.check(events)
        layout.check(timestamps)
        turned = turned_rows(layout) if self.config.backward_align == "slot" and self.config.beta else None
        x, kept_by_mixers = self._stem(events), []
        for depth, layer in enumerate(self.layers):
            past = SSDMixerState(state.conv[:, depth], state.ssm[:, depth]) if state else None
            x, kept = layer(x, layout, turned, past)
            kept_by_mixers += [kept] if kept else []
        return x, kept_by_mixers

    def _stem(self, events: Tensor) -> Tensor:
        if self.config.norm_embedding:
            return self.norm(self.dropout(events))
        return events + sum(p[:0].sum() for p in self.norm.parameters())  # gradients of 0, so that ranks agree


def turned_rows(layout: JaggedLayout) -> Tensor:
    """(T,) int64 the event as far from its row's end as each event is from its start."""
    return (layout.offsets[:-1] + layout.offsets[1:] - 1)[layout.row_of_event] - torch.arange(
        layout.num_events, device=layout.offsets.device
    )


_IN_LAYER = {  # ours: published
    "mixer.in_proj.weight": "forward_ssd.in_proj.weight",
    "mixer.conv.weight": "forward_ssd.conv1d.weight",
    "mixer.conv.bias": "forward_ssd.conv1d.bias",
    "mixer.dt_bias": "forward_ssd.dt_bias",
    "mixer.A_log": "forward_ssd.A_log",
    "mixer.D": "forward_ssd.D",
    "mixer.norm_weight": "forward_ssd.norm.weight",
    "mixer.out_proj.weight": "forward_ssd.out_proj.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
    "feed_forward.expand.weight": "ffn.w_1.weight",
    "feed_forward.expand.bias": "ffn.w_1.bias",
    "feed_forward.contract.weight": "ffn.w_2.weight",
    "feed_forward.contract.bias": "ffn.w_2.bias",
    "feed_forward.norm.weight": "ffn.LayerNorm.weight",
    "feed_forward.norm.bias": "ffn.LayerNorm.bias",
}


def published_names(config: SSD4RecConfig) -> dict[str, str]:
    """Name of each parameter here to its name in a state dict of the published program."""
    names = {"norm.weight": "LayerNorm.weight", "norm.bias": "LayerNorm.bias"}
    for depth in range(config.layers):
        names |= {f"layers.{depth}.{ours}": f"BiSSD_layers.{depth}.{theirs}" for ours, theirs in _IN_LAYER.items()}
    return names
