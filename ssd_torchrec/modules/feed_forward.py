"""The layer after the mixer: two linear maps around a hard swish, added to what came in and normalised.

Source: Fan et al. 2024, TiM4Rec, arXiv:2409.16182, section 3.5, as its published code has it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.linear import Linear


class FeedForward(nn.Module):
    """`norm(dropout(contract(dropout(hardswish(expand(x))))) + x)`, event by event."""

    def __init__(self, width: int, inner: int, dropout: float, norm_eps: float = 1e-12) -> None:
        super().__init__()
        self.expand = Linear(width, inner)
        self.contract = Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = Dropout(dropout)
        for linear in (self.expand, self.contract):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) in, (T, D) out."""
        hidden = self.dropout(F.hardswish(self.expand(x)))
        return self.norm(self.dropout(self.contract(hidden)) + x)
