"""The encoders that ours is measured against, in plain PyTorch, behind the same interface.

Both get the best layout that PyTorch has for them: the GRU reads packed sequences made straight from the jagged events,
the transformer's attention is the fused causal one, without dropout of its own, which would take that path away.
Sources: Hidasi et al. 2016, GRU4Rec, arXiv:1511.06939; Kang & McAuley 2018, SASRec, arXiv:1808.09781, with two heads
and the norm after each block, as RecBole has it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.feed_forward import FeedForward


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


class TransformerBlock(nn.Module):
    """Causal attention, then feed-forward, each added to what came in and normalised."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 4 * width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) in, (B, L, D) out."""
        query, key, value = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, P)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.feed_forward(self.norm(self.dropout(self.out_proj(mixed.transpose(1, 2).flatten(2))) + x))


class Transformer(Encoder):
    """Rows padded to `longest` positions, whatever they hold, as published; longer rows are the caller's to cut."""

    causal = True

    def __init__(self, width: int, layers: int, heads: int, longest: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.position = nn.Parameter(torch.empty(longest, width).normal_(std=0.02))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, dropout) for _ in range(layers)))

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode (T, D) events; returns (T, D). Timestamps are ignored.

        Padding follows a row's events, so the causal mask keeps it out of them.
        """
        longest = len(self.position)
        slot = layout.row_of_event * longest + layout.position
        padded = events.new_zeros(layout.num_rows * longest, self.width).index_copy(0, slot, events)
        x = padded.view(layout.num_rows, longest, self.width) + self.position
        return self.blocks(self.dropout(self.norm(x))).flatten(0, 1).index_select(0, slot)
