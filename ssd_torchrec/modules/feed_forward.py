"""The layer after the mixer: two linear maps around an activation, added to what came in and normalised.

Source: Fan et al. 2024, TiM4Rec, arXiv:2409.16182, section 3.5, as its published code has it, with hardswish; Qu et al.
2024, SSD4Rec, arXiv:2409.01192, with GELU, and with the second dropout behind the norm.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.linear import Linear

HiddenActivation = Literal["hardswish", "gelu"]
_ACTIVATIONS = {"hardswish": F.hardswish, "gelu": F.gelu}


class FeedForward(nn.Module):
    """`norm(dropout(contract(dropout(activation(expand(x))))) + x)`, event by event."""

    def __init__(
        self,
        width: int,
        inner: int,
        dropout: float,
        norm_eps: float = 1e-12,
        *,
        activation: HiddenActivation = "hardswish",
        drop_after_norm: bool = False,
    ) -> None:
        """With `drop_after_norm` it is `dropout(norm(contract(dropout(activation(expand(x)))) + x))`."""
        super().__init__()
        self.activation: HiddenActivation = activation
        self.drop_after_norm = drop_after_norm
        self.expand = Linear(width, inner)
        self.contract = Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = Dropout(dropout)
        for linear in (self.expand, self.contract):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) in, (T, D) out."""
        hidden = self.dropout(_ACTIVATIONS[self.activation](self.expand(x)))
        if self.drop_after_norm:
            return self.dropout(self.norm(self.contract(hidden) + x))
        return self.norm(self.dropout(self.contract(hidden)) + x)
