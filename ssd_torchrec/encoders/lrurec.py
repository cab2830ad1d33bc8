"""LRURec: linear recurrent units with feed-forward layers; causal, jagged, streaming.

    x = norm(dropout(events))
    for each layer:   r = norm(dropout(y) + x)
                      x = feed_forward(r)                           GELU, 4 D wide
    the recurrence:   h[t] = decay h[t-1] + gamma in_proj(x[t])     (T, N) complex
                      y    = real part of out_proj(h)
                      decay = exp(-exp(nu_log) + i exp(theta_log))     gamma = exp(gamma_log)
Decays start evenly over a ring of radii just below 1, and gamma so that states have the variance of what enters them:
gamma^2 = 1 - |decay|^2. Timestamps are not read.

Complex maps are written as real ones: in_proj gives the real and the imaginary part of each number of the state, and
out_proj takes both, which is all that the real part of a complex map can be.

Source: Yue et al. 2024, Linear Recurrent Units for Sequential Recommendation, arXiv:2310.02367; Orvieto et al. 2023,
arXiv:2303.06349, for the ring, the exponents and gamma.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import EncoderConfig, StreamingEncoder, check_state
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.feed_forward import FeedForward
from ssd_torchrec.modules.linear import Linear
from ssd_torchrec.ops.linear_recurrence import linear_recurrence


@dataclass(frozen=True, kw_only=True)
class LRURecConfig(EncoderConfig):
    """Shape of the encoder; the defaults are the published ones."""

    title: ClassVar[str] = "LRURec"
    paper: ClassVar[str] = "Yue et al. 2024, arXiv:2310.02367"

    width: int = 64
    """Channels D of an event, in and out."""

    layers: int = 2
    """Recurrence and feed-forward pairs."""

    expand: int = 2
    """Complex numbers N of a state over the width."""

    slowest: float = 0.99
    """Absolute value of the slowest decays at the start: the outer radius of the ring."""

    fastest: float = 0.8
    """Absolute value of the fastest decays at the start: the inner radius."""

    norm_eps: float = 1e-5
    """Of every norm."""

    dropout: float = 0.2
    """Of events and in the feed-forward."""

    recurrence_dropout: float = 0.2
    """Of what a recurrence adds to the events."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "expand"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("dropout", "recurrence_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}; it is a share, not percent")
        if not 0 < self.fastest < self.slowest < 1:
            raise ConfigError(
                f"0 < fastest < slowest < 1 must hold, got {self.fastest} and {self.slowest}; they are radii "
                "of a ring within the unit circle"
            )
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be above 0, got {self.norm_eps}; raise it")

    @property
    def causal(self) -> bool:
        """Always."""
        return True

    @property
    def streams(self) -> bool:
        """Always."""
        return True

    @property
    def state(self) -> int:
        """Complex numbers N of a state."""
        return self.expand * self.width

    def build(self) -> "LRURec":
        """The encoder with new weights."""
        return LRURec(self)


PRESETS: dict[str, LRURecConfig] = {"64d": LRURecConfig()}
"""The published size, with the dropout that its program takes unless told otherwise: one for all data sets."""


class LRURecState(NamedTuple):
    """What the encoder keeps of a row, of one size whatever the row has seen; L layers."""

    hidden: Tensor  # (B, L, N, 2) real and imaginary parts, fp32, or fp64 in an fp64 encoder


class LinearRecurrentUnit(nn.Module):
    """Project, recur, project; no activation."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        self.in_proj = Linear(config.width, 2 * config.state)
        self.out_proj = Linear(2 * config.state, config.width)
        for linear in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02, a=-0.04, b=0.04)
            nn.init.zeros_(linear.bias)
        radius = torch.empty(config.state).uniform_(config.fastest**2, config.slowest**2).sqrt()
        turn = 1 - torch.rand(config.state)  # above 0, since its logarithm is what is kept
        self.nu_log = nn.Parameter(radius.log().neg().log())
        self.theta_log = nn.Parameter((2 * math.pi * turn).log())
        self.gamma_log = nn.Parameter((1 - radius.square()).log() / 2)

    def decay(self) -> Tensor:
        """(N,) complex."""
        return torch.polar(self.nu_log.exp().neg().exp(), self.theta_log.exp())

    def forward(self, x: Tensor, layout: JaggedLayout, hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(T, D) to (T, D), and the (B, N, 2) state to go on with, None for rows that started afresh.

        Under autocast the recurrence stays fp32.
        """
        entering = self.in_proj(x).to(self.gamma_log.dtype).unflatten(-1, (-1, 2)) * self.gamma_log.exp()[:, None]
        entering, decay = torch.view_as_complex(entering.contiguous()), self.decay()
        if hidden is None:
            return self._read(linear_recurrence(entering, decay, layout)), None
        before = torch.view_as_complex(hidden.contiguous())
        states, after = linear_recurrence(entering, decay, layout, initial_state=before, return_final_state=True)
        return self._read(states), torch.view_as_real(after)

    def _read(self, states: Tensor) -> Tensor:
        """(T, N) complex to (T, D)."""
        return self.out_proj(torch.view_as_real(states).flatten(1))


class LRURecLayer(nn.Module):
    """Recurrence, then feed-forward."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        self.recurrence = LinearRecurrentUnit(config)
        self.dropout = Dropout(config.recurrence_dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(
            config.width, 4 * config.width, config.dropout, norm_eps=config.norm_eps, activation="gelu"
        )

    def forward(self, x: Tensor, layout: JaggedLayout, hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(T, D) to (T, D), and what the recurrence keeps."""
        mixed, after = self.recurrence(x, layout, hidden)
        return self.feed_forward(self.norm(self.dropout(mixed) + x)), after


class LRURec(StreamingEncoder[LRURecState]):
    """The encoder: `forward` trains on whole histories, `append` goes on from a state; both run the same code."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(LRURecLayer(config) for _ in range(config.layers))

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

    def initial_state(self, rows: int) -> LRURecState:
        """Zeros: the state of rows that have seen nothing."""
        return LRURecState(self.norm.weight.new_zeros(rows, self.config.layers, self.config.state, 2))

    def append(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: LRURecState
    ) -> tuple[Tensor, LRURecState]:
        """Go on from `state`; see `StreamingEncoder.append`.

        Raises:
            JaggedLayoutError: events, timestamps or state are not those of `layout`.
        """
        check_state(state, layout)
        out, kept = self._encode(events, timestamps, layout, state)
        return out, LRURecState(torch.stack(kept, dim=1))

    def _encode(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: LRURecState | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The one path of `forward` and `append`: vectors, and what the layers keep (nothing without a state)."""
        layout.check(events)
        layout.check(timestamps)
        x, kept_by_layers = self.norm(self.dropout(events)), []
        for depth, layer in enumerate(self.layers):
            x, kept = layer(x, layout, state.hidden[:, depth] if state else None)
            kept_by_layers += [] if kept is None else [kept]
        return x, kept_by_layers
