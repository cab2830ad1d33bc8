"""Mamba4Rec: Mamba-1 blocks with feed-forward layers; causal, jagged, streaming.

    x = norm(dropout(events))
    for each layer:   r = norm(dropout(mixer(x)) + x)            no "+ x" in an encoder of one layer
                      x = feed_forward(r)                        GELU, 4 D wide
Timestamps are not read.

Source: Liu et al. 2024, Mamba4Rec, arXiv:2403.03900, in the structure of its published code.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import EncoderConfig, StreamingEncoder, check_state
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.feed_forward import FeedForward
from ssd_torchrec.modules.mamba_mixer import MambaMixer, MambaMixerConfig, MambaMixerState

Init = Literal["published", "mamba"]


@dataclass(frozen=True, kw_only=True)
class Mamba4RecConfig(EncoderConfig):
    """Shape of the encoder; the defaults are the published ones."""

    title: ClassVar[str] = "Mamba4Rec"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2403.03900"

    width: int = 64
    """Channels D of an event, in and out."""

    layers: int = 1
    """Mixer and feed-forward pairs. Others who ran it report two layers to be better on MovieLens-1M and Beauty."""

    expand: int = 2
    """Inner channels of a mixer over the width."""

    state: int = 32
    """State N of a channel."""

    taps: int = 4
    """Taps of the convolutions: how many events they see."""

    norm_eps: float = 1e-12
    """Of every norm."""

    dropout: float = 0.2
    """Of events and of what each block adds to them."""

    init: Init = "published"
    """Start of the mixers. published: projections N(0, 0.02^2) and no step bias, as the published program leaves them,
    which starts every step near 0.69: the slowest number of a state halves at each event, the others are gone after one
    or two. mamba: Mamba's own, with steps of 0.001 to 0.1, so that the slowest last tens of events to a thousand."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"layers must be at least 1, got {self.layers}; raise it")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}; it is a share, not percent")
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be above 0, got {self.norm_eps}; raise it")
        if self.init not in get_args(Init):
            raise ConfigError(f"init must be {' or '.join(get_args(Init))}, got {self.init!r}; choose one of these")
        self.mixer()  # refuses sizes below 1

    @property
    def causal(self) -> bool:
        """Always."""
        return True

    @property
    def streams(self) -> bool:
        """Always."""
        return True

    def build(self) -> "Mamba4Rec":
        """The encoder with new weights."""
        return Mamba4Rec(self)

    def mixer(self) -> MambaMixerConfig:
        return MambaMixerConfig(width=self.width, expand=self.expand, state=self.state, taps=self.taps)


PRESETS: dict[str, Mamba4RecConfig] = {
    "ml-1m-64d": Mamba4RecConfig(),
    "beauty-64d": Mamba4RecConfig(dropout=0.4),
    "video-games-64d": Mamba4RecConfig(dropout=0.4),
    "ml-1m-64d-2-layers": Mamba4RecConfig(layers=2),
}
"""The published sizes. The last is the Mamba4Rec that TiM4Rec's paper compares with."""


class Mamba4RecState(NamedTuple):
    """What the encoder keeps of a row, of one size whatever the row has seen; L layers."""

    conv: Tensor  # (B, L, K-1, E) last inputs of the convolutions
    ssm: Tensor  # (B, L, E, N) fp32, or fp64 in an fp64 encoder


class Mamba4RecLayer(nn.Module):
    """Mixer, then feed-forward."""

    def __init__(self, config: Mamba4RecConfig) -> None:
        super().__init__()
        self.mixer = MambaMixer(config.mixer())
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(
            config.width, 4 * config.width, config.dropout, norm_eps=config.norm_eps, activation="gelu"
        )
        self.has_residual = config.layers > 1
        if config.init == "published":
            _start_as_published(self.mixer)

    def forward(
        self, x: Tensor, layout: JaggedLayout, state: MambaMixerState | None
    ) -> tuple[Tensor, MambaMixerState | None]:
        """(T, D) to (T, D), and what the mixer keeps."""
        mixed, after = self.mixer(x, layout, state)
        mixed = self.dropout(mixed)
        return self.feed_forward(self.norm(mixed + x if self.has_residual else mixed)), after


def _start_as_published(mixer: MambaMixer) -> None:
    """The published program starts every linear layer anew after Mamba has, the one whose bias is the step's too."""
    for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
        nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(mixer.dt_bias)


class Mamba4Rec(StreamingEncoder[Mamba4RecState]):
    """The encoder: `forward` trains on whole histories, `append` goes on from a state; both run the same code."""

    def __init__(self, config: Mamba4RecConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(Mamba4RecLayer(config) for _ in range(config.layers))

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole histories.

        Args:
            events: (T, D).
            timestamps: (T,) int64, not read.

        Returns:
            (T, D), each event's vector from it and earlier events of its row only, in the dtype of the parameters.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`.

        Deterministic. With T = 0 every parameter still gets a gradient, of zeros.
        """
        return self._encode(events, timestamps, layout, None)[0]

    def initial_state(self, rows: int) -> Mamba4RecState:
        """Zeros: the state of rows that have seen nothing."""
        mixer, layers = self.config.mixer(), self.config.layers
        return Mamba4RecState(
            conv=self.norm.weight.new_zeros(rows, layers, mixer.taps - 1, mixer.inner),
            ssm=self.norm.weight.new_zeros(rows, layers, mixer.inner, mixer.state),
        )

    def append(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: Mamba4RecState
    ) -> tuple[Tensor, Mamba4RecState]:
        """Go on from `state`; see `StreamingEncoder.append`.

        Raises:
            JaggedLayoutError: events, timestamps or state are not those of `layout`.
        """
        check_state(state, layout)
        out, kept = self._encode(events, timestamps, layout, state)
        conv, ssm = (torch.stack(of_layers, dim=1) for of_layers in zip(*kept, strict=True))
        return out, Mamba4RecState(conv, ssm)

    def _encode(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: Mamba4RecState | None
    ) -> tuple[Tensor, list[MambaMixerState]]:
        """The one path of `forward` and `append`: vectors, and what the mixers keep (nothing without a state)."""
        layout.check(events)
        layout.check(timestamps)
        x, kept_by_mixers = self.norm(self.dropout(events)), []
        for depth, layer in enumerate(self.layers):
            past = MambaMixerState(state.conv[:, depth], state.ssm[:, depth]) if state else None
            x, kept = layer(x, layout, past)
            kept_by_mixers += [kept] if kept else []
        return x, kept_by_mixers


PUBLISHED_IN_LAYER = {
    "mixer.in_proj.weight": "mamba.in_proj.weight",
    "mixer.conv.weight": "mamba.conv1d.weight",
    "mixer.conv.bias": "mamba.conv1d.bias",
    "mixer.x_proj.weight": "mamba.x_proj.weight",
    "mixer.dt_proj.weight": "mamba.dt_proj.weight",
    "mixer.dt_bias": "mamba.dt_proj.bias",
    "mixer.A_log": "mamba.A_log",
    "mixer.D": "mamba.D",
    "mixer.out_proj.weight": "mamba.out_proj.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
    "feed_forward.expand.weight": "ffn.w_1.weight",
    "feed_forward.expand.bias": "ffn.w_1.bias",
    "feed_forward.contract.weight": "ffn.w_2.weight",
    "feed_forward.contract.bias": "ffn.w_2.bias",
    "feed_forward.norm.weight": "ffn.LayerNorm.weight",
    "feed_forward.norm.bias": "ffn.LayerNorm.bias",
}


def published_names(config: Mamba4RecConfig) -> dict[str, str]:
    """Our name of each parameter to that of the published program."""
    names = {f"norm.{end}": f"LayerNorm.{end}" for end in ("weight", "bias")}
    for depth in range(config.layers):
        names |= {
            f"layers.{depth}.{ours}": f"mamba_layers.{depth}.{theirs}" for ours, theirs in PUBLISHED_IN_LAYER.items()
        }
    return names
