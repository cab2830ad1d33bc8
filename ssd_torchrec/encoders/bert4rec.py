"""BERT4Rec: self-attention of each event to all of its row; bidirectional, jagged.

    x = dropout(norm(events + positions))
    for each layer:   x = norm(x + dropout(attention(x)))           each event sees its whole row
                      x = norm(x + dropout(feed_forward(x)))        gelu between maps of D to 4D and back
    out = norm(gelu(linear(x)))                                     to be compared with the item vectors

Source: Sun et al. 2019, BERT4Rec, arXiv:1904.06690, sections 3.3 to 3.5. The norms of events and of the output are
those of its published code. Its bias of each item is no encoder's matter, and is left out.

The encoder sees vectors. Which events of a training row are masked, and the mask event that is appended when the next
item is asked for, are the data's: to it they are events like others, whose vector is row 0 of the item table. An event
knows what follows it: targets must be masked, or lie outside the row.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ssd_torchrec.encoders.encoder import Encoder, EncoderConfig
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.attention import PointwiseFeedForward, Positions, SelfAttention, check_heads
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.linear import Linear


@dataclass(frozen=True, kw_only=True)
class BERT4RecConfig(EncoderConfig):
    """Shape of the encoder; the defaults are those for MovieLens, 64 wide."""

    title: ClassVar[str] = "BERT4Rec"
    paper: ClassVar[str] = "Sun et al. 2019, arXiv:1904.06690"

    width: int = 64
    """Channels D of an event, in and out."""

    layers: int = 2
    """Attention and feed-forward pairs."""

    heads: int = 2
    """Heads of an attention."""

    max_length: int = 200
    """Events of the longest row, the mask event that asks among them: how many positions are learned."""

    dropout: float = 0.2
    """Of events and of what each block adds to them."""

    attention_dropout: float = 0.2
    """Of attention weights. At 0, training in bf16 on a GPU takes the fused kernel, which drops none."""

    norm_eps: float = 1e-12
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
        """Never."""
        return False

    @property
    def length_cap(self) -> int:
        """As many events as there are positions."""
        return self.max_length

    def build(self) -> "BERT4Rec":
        """The encoder with new weights."""
        return BERT4Rec(self)


PRESETS: dict[str, BERT4RecConfig] = {
    "ml-1m-64d": BERT4RecConfig(),
    "beauty-64d": BERT4RecConfig(max_length=50, dropout=0.4, attention_dropout=0.4),
}
"""Width, length and dropout of the comparisons with state-space encoders; layers and heads of the paper itself."""


class BERT4RecLayer(nn.Module):
    """Attention, then feed-forward, each added to what came in and normalised."""

    def __init__(self, config: BERT4RecConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.attention = SelfAttention(
            width, config.heads, causal=False, dropout=config.attention_dropout, has_out_proj=True
        )
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = PointwiseFeedForward(width, 4 * width, "gelu", 0.0)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        """(T, D) in, (T, D) out."""
        x = self.attention_norm(x + self.dropout(self.attention(x, layout)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class BERT4Rec(Encoder):
    """The encoder."""

    causal = False

    def __init__(self, config: BERT4RecConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.positions = Positions(config.width, config.max_length)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(BERT4RecLayer(config) for _ in range(config.layers))
        self.out_proj = Linear(config.width, config.width)
        self.out_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole histories; timestamps make no difference.

        Args:
            events: (T, D), masked ones among them.
            timestamps: (T,) int64 unix seconds.

        Returns:
            (T, D), each event's vector from all events of its row, in the dtype of the parameters.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`, or a row is longer than max_length.

        Deterministic on the CPU; see `ops.attention` for CUDA. With T = 0 every parameter still gets a gradient.
        """
        layout.check(events)
        layout.check(timestamps)
        x = self.dropout(self.norm(events + self.positions(layout)))
        for layer in self.layers:
            x = layer(x, layout)
        return self.out_norm(F.gelu(self.out_proj(x)))
