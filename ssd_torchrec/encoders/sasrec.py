"""SASRec: self-attention of each event to the events before it; causal, jagged.

    x = dropout(sqrt(D) events + positions)
    for each layer:   x = x + dropout(attention(norm(x)))           each event sees itself and earlier ones
                      x = x + dropout(feed_forward(norm(x)))        relu between two maps of D to D
    out = norm(x)

Source: Kang & McAuley 2018, SASRec, arXiv:1808.09781, sections III.A to III.C. Its published code normalises the
queries only and adds the normalised input back; here is what the paper writes, all of it normalised and the input
itself added.

The published code pads rows at the left, so that the newest event has the last position; when a row grows, all others
move. Here positions count from a row's first event, so that an output depends on the past of its row only. What a row
has seen is all its events: there is no state of constant size, and the encoder does not stream.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import Encoder, EncoderConfig
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.attention import PointwiseFeedForward, Positions, SelfAttention, check_heads
from ssd_torchrec.modules.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class SASRecConfig(EncoderConfig):
    """Shape of the encoder; the defaults are those for MovieLens, 64 wide."""

    title: ClassVar[str] = "SASRec"
    paper: ClassVar[str] = "Kang & McAuley 2018, arXiv:1808.09781"

    width: int = 64
    """Channels D of an event, in and out."""

    layers: int = 2
    """Attention and feed-forward pairs."""

    heads: int = 1
    """Heads of an attention."""

    max_length: int = 200
    """Events of the longest row: how many positions are learned."""

    dropout: float = 0.2
    """Of events, of what each block adds to them, and inside the feed-forward."""

    attention_dropout: float = 0.2
    """Of attention weights. At 0, training in bf16 on a GPU takes the fused kernel, which drops none."""

    norm_eps: float = 1e-8
    """Of every norm."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}; it is a share, not percent")
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be above 0, got {self.norm_eps}; raise it")
        check_heads(self.width, self.heads)

    @property
    def causal(self) -> bool:
        """Always."""
        return True

    @property
    def length_cap(self) -> int:
        """As many events as there are positions."""
        return self.max_length

    def build(self) -> "SASRec":
        """The encoder with new weights."""
        return SASRec(self)


PRESETS: dict[str, SASRecConfig] = {
    "ml-1m-64d": SASRecConfig(),
    "beauty-64d": SASRecConfig(max_length=50, dropout=0.4, attention_dropout=0.4),
}
"""Width, length and dropout of the comparisons with state-space encoders; blocks and heads of the paper itself."""


class SASRecLayer(nn.Module):
    """Attention, then feed-forward, each of what is normalised and added to what is not."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(
            width, config.heads, causal=True, dropout=config.attention_dropout, has_out_proj=False
        )
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = PointwiseFeedForward(width, width, "relu", config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        """(T, D) in, (T, D) out."""
        x = x + self.dropout(self.attention(self.attention_norm(x), layout))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class SASRec(Encoder):
    """The encoder."""

    causal = True

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.positions = Positions(config.width, config.max_length)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                start_linear(module)

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole histories; timestamps make no difference.

        Args:
            events: (T, D).
            timestamps: (T,) int64 unix seconds.

        Returns:
            (T, D), each event's vector from it and earlier events of its row only, in the dtype of the parameters.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`, or a row is longer than max_length.

        Deterministic on the CPU; see `ops.attention` for CUDA. With T = 0 every parameter still gets a gradient.
        """
        layout.check(events)
        layout.check(timestamps)
        x = self.dropout(math.sqrt(self.width) * events + self.positions(layout))
        for layer in self.layers:
            x = layer(x, layout)
        return self.norm(x)


def start_linear(linear: nn.Linear) -> None:
    """Each map of D uniform as Glorot has it, which is where the published code starts; biases at 0."""
    for part in linear.weight.detach().split(linear.in_features):
        nn.init.xavier_uniform_(part)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
