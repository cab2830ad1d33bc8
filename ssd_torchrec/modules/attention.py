"""What the layers of a transformer are made of: attention within rows, a map of each event, positions.

    attention      out_proj(sum_s softmax_s(q[t] . k[s] / sqrt(P)) v[s])      q, k, v = in_proj(x), in H heads of P
    feed-forward   contract(dropout(activation(expand(x))))
    positions      one vector for each place in a row, counted from the row's first event

Norms, residuals and what is dropped of them are the encoders', which differ in them.
Source: Vaswani et al. 2017, arXiv:1706.03762.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.linear import Linear
from ssd_torchrec.ops.attention import attention

Activation = Literal["relu", "gelu"]
_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Heads of attention to the row, or to its past; without biases, as the papers write it."""

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float, has_out_proj: bool) -> None:
        """`dropout` is of the weights: above 0, training on a GPU cannot take the fused kernel."""
        super().__init__()
        check_heads(width, heads)
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.in_proj = Linear(width, 3 * width, bias=False)
        self.out_proj = Linear(width, width, bias=False) if has_out_proj else nn.Identity()

    def forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        """(T, D) in, (T, D) out."""
        query, key, value = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (T, H, P) each
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attention(query, key, value, layout, causal=self.causal, dropout=dropout).flatten(1))


class PointwiseFeedForward(nn.Module):
    """Two linear maps of each event, with an activation between them."""

    def __init__(self, width: int, inner: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ConfigError(f"activation must be relu or gelu, got {activation!r}; choose one of the two")
        self.activation: Activation = activation
        self.expand = Linear(width, inner)
        self.contract = Linear(inner, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) in, (T, D) out."""
        return self.contract(self.dropout(_ACTIVATIONS[self.activation](self.expand(x))))


class Positions(nn.Module):
    """A learned vector for each place in a row; the first event's place is 0, however long the row is."""

    def __init__(self, width: int, max_length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, layout: JaggedLayout) -> Tensor:
        """(T, D).

        Raises:
            JaggedLayoutError: a row has more events than there are places.
        """
        if layout.longest > len(self.weight):
            raise JaggedLayoutError(
                f"rows must have at most {len(self.weight)} events, got one of {layout.longest}; "
                "cut histories to their newest events, or raise max_length"
            )
        return F.embedding(layout.position, self.weight)


def check_heads(width: int, heads: int) -> None:
    """Refuse heads that do not split the width.

    Raises:
        ConfigError: they do not.
    """
    if width % heads:
        raise ConfigError(f"width {width} does not split into {heads} heads; make width a multiple of heads")
