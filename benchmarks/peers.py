"""The encoders that ours is measured against, in plain PyTorch, behind the same interface.

Both get the best layout that PyTorch has for them: the GRU reads packed sequences made straight from the jagged events,
the transformer's attention is the fused causal one, without dropout of its own, which would take that path away.
Sources: Hidasi et al. 2016, GRU4Rec, arXiv:1511.06939; Kang & McAuley 2018, SASRec, arXiv:1808.09781, with two heads
and the norm after each block, as RecBole has it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.linear import Linear


class GRU(Encoder):
    """`nn.GRU` on packed sequences of whole histories."""

    causal = True

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(width, width, layers, dropout=dropout)

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode (T, D) events; returns (T, D). Timestamps are ignored."""
        place_of_row = layout.offsets.diff().argsort(descending=True).argsort()
        step_by_step = torch.argsort(layout.position * layout.num_rows + place_of_row[layout.row_of_event])
        packed = PackedSequence(self.dropout(events)[step_by_step], torch.bincount(layout.position))
        return torch.zeros_like(events).index_copy(0, step_by_step, self.gru(packed)[0].data)


@dataclass(frozen=True)
class Parts:
    """What a transformer is made of."""

    linear: type[nn.Linear]
    dropout: type[nn.Dropout]


PYTORCHS = Parts(nn.Linear, nn.Dropout)
OURS = Parts(Linear, Dropout)
"""The linear maps and the dropout of this package, which are quicker on the CPU."""


class TransformerBlock(nn.Module):
    """Causal attention, then two linear maps around a GELU, each added to what came in and normalised."""

    def __init__(self, width: int, heads: int, longest: int, dropout: float, parts: Parts) -> None:
        super().__init__()
        self.rows_of_heads = (-1, longest, 3, heads, width // heads)
        self.in_proj = parts.linear(width, 3 * width)
        self.out_proj = parts.linear(width, width)
        self.expand = parts.linear(width, 4 * width)
        self.contract = parts.linear(4 * width, width)
        self.dropout = parts.dropout(dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B L, D) in, (B L, D) out."""
        query, key, value = self.in_proj(x).view(self.rows_of_heads).permute(2, 0, 3, 1, 4)  # (B, H, L, P)
        mixed = (
            F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2).flatten(0, 1)
        )
        x = self.norms[0](self.dropout(self.out_proj(mixed)) + x)
        return self.norms[1](self.dropout(self.contract(self.dropout(F.gelu(self.expand(x))))) + x)


class Transformer(Encoder):
    """Rows padded to `longest` positions, whatever they hold, as published; longer rows are the caller's to cut."""

    causal = True

    def __init__(
        self, width: int, layers: int, heads: int, longest: int, dropout: float, parts: Parts = PYTORCHS
    ) -> None:
        super().__init__()
        self.width = width
        self.position = nn.Parameter(torch.empty(longest, width).normal_(std=0.02))
        self.norm = nn.LayerNorm(width)
        self.dropout = parts.dropout(dropout)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, longest, dropout, parts) for _ in range(layers)))

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode (T, D) events; returns (T, D). Timestamps are ignored.

        Padding follows a row's events, so the causal mask keeps it out of them.
        """
        longest = len(self.position)
        slot = layout.row_of_event * longest + layout.position
        padded = events.new_zeros(layout.num_rows * longest, self.width).index_copy(0, slot, events)
        x = padded.view(layout.num_rows, longest, self.width) + self.position
        return self.blocks(self.dropout(self.norm(x.flatten(0, 1)))).index_select(0, slot)
