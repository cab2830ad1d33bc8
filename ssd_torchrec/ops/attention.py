"""Attention of each event to the events of its row, to the earlier ones only if it is causal.

    y[t] = sum_s softmax_s(query[t] . key[s] / sqrt(P)) value[s]          s in the row of t, and s <= t if causal

Shapes: T events, H heads, P channels of a head; a group is all rows of one length L, stacked to (rows, L, ...).
Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Dao 2023, FlashAttention-2, arXiv:2307.08691, which PyTorch
runs on rows of all lengths at once.

Nothing is padded. What the fused kernel does not take goes group by group: as many calls as there are row lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ssd_torchrec.errors import ConfigError, DtypeError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.dropout import dropout as drop
from ssd_torchrec.ops.rows import rearrange

FUSED_DTYPES = (torch.float16, torch.bfloat16)
FUSED_CHANNELS = 256  # most channels of a head, in steps of 8


def attention_definition(query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout, *, causal: bool) -> Tensor:
    """The definition, one row at a time with its whole matrix of weights; in fp64 the truth."""
    if not layout.num_events:
        return query + key + value  # (0, H, P), and every input in the graph
    rows = [x.split(layout.offsets.diff().tolist()) for x in (query, key, value)]
    return torch.cat([_weighted_sum(*row, causal=causal) for row in zip(*rows, strict=True)]).to(query.dtype)


def _weighted_sum(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    scores = torch.einsum("lhp,shp->hls", query, key) / math.sqrt(query.shape[-1])
    if causal:
        scores = scores.masked_fill(later(len(query), query.device), -math.inf)
    return torch.einsum("hls,shp->lhp", scores.softmax(-1), value)


def later(length: int, device: torch.device) -> Tensor:
    """(L, L) booleans: whether the event of the column comes after that of the row."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


@dataclass(frozen=True, eq=False)
class RowGroups:
    """The events of a batch with rows in order of their lengths, so that rows of one length lie side by side.

    # lengths        2    0  1  2        order  2  0 1 3 4
    # groups         [1]  [2, 2]         shapes (1, 1), (2, 2)
    """

    order: Tensor  # (T,) int64
    inverse: Tensor  # (T,) int64
    shapes: list[tuple[int, int]]  # rows and length L of each group, shortest first, without rows of no events

    def split(self, events: Tensor) -> list[Tensor]:
        """(T, ...) to one (rows, L, ...) a group."""
        parts = rearrange(events, self.order, self.inverse).split([rows * length for rows, length in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, groups: Sequence[Tensor]) -> Tensor:
        """Back from `split`, of at least one group."""
        return rearrange(torch.cat([group.flatten(0, 1) for group in groups]), self.inverse, self.order)


_GROUPS: WeakKeyDictionary[JaggedLayout, RowGroups] = WeakKeyDictionary()


def row_groups(layout: JaggedLayout) -> RowGroups:
    """Built at first use, which on a GPU waits for the device, and kept as long as the layout lives."""
    if layout not in _GROUPS:
        _GROUPS[layout] = _grouped(layout.offsets)
    return _GROUPS[layout]


def _grouped(offsets: Tensor) -> RowGroups:
    host = offsets.cpu()
    lengths, rows = host.diff().sort(stable=True)
    ends = lengths.cumsum(0)
    order = torch.repeat_interleave(host[:-1][rows] - (ends - lengths), lengths) + torch.arange(int(host[-1]))
    distinct, counts = lengths[lengths > 0].unique_consecutive(return_counts=True)
    shapes = list(zip(counts.tolist(), distinct.tolist(), strict=True))
    return RowGroups(order.to(offsets.device), order.argsort().to(offsets.device), shapes)


def attention_grouped(
    query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout, *, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Group by group, each through the best that PyTorch has for it."""
    if not layout.num_events:
        return query + key + value
    groups = row_groups(layout)
    heads = [[group.transpose(1, 2) for group in groups.split(x)] for x in (query, key, value)]  # (rows, H, L, P)
    attend = _with_dropout if dropout and query.device.type == "cpu" else F.scaled_dot_product_attention
    mixed = [attend(*group, dropout_p=dropout, is_causal=causal) for group in zip(*heads, strict=True)]
    return groups.join([group.transpose(1, 2) for group in mixed])


def _with_dropout(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
    """On the CPU PyTorch too makes the matrix of weights then, and is slow to draw what it drops."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])  # (rows, H, L, L)
    if is_causal:
        scores = scores.masked_fill(later(scores.shape[-1], query.device), -math.inf)
    return drop(scores.softmax(-1), dropout_p, training=True) @ value


def attention_fused(query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout, *, causal: bool) -> Tensor:
    """All rows in one launch of PyTorch's kernel, on a GPU; no matrix of weights is ever stored."""
    if not layout.num_events:
        return query + key + value
    ends, longest = layout.offsets.to(torch.int32), layout.longest
    window = (-1, 0) if causal else (-1, -1)  # events seen before and after, -1 for all
    return cast(Tensor, varlen_attn(query, key, value, ends, ends, longest, longest, window_size=window))


def is_fused(query: Tensor, dropout: float) -> bool:
    """Whether `attention` takes the fused kernel, which rounds to half precision and drops no weights."""
    channels = query.shape[-1]
    fits = query.dtype in FUSED_DTYPES and channels % 8 == 0 and channels <= FUSED_CHANNELS
    return query.is_cuda and fits and not dropout


def attention(
    query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout, *, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Attention within each row.

    Args:
        query: (T, H, P).
        key: (T, H, P).
        value: (T, H, P).
        causal: whether an event sees itself and earlier events only; else it sees all of its row.
        dropout: share of the weights that become 0, in [0, 1), the rest scaled up; 0 outside training.

    Returns:
        (T, H, P) in the dtype of `query`.

    Raises:
        JaggedLayoutError: `query` does not hold the events of `layout`.
        ShapeError: shapes differ, or heads have no channels.
        DtypeError: dtypes or devices differ, or are no floating point ones.
        ConfigError: `dropout` is not in [0, 1).

    On CUDA one launch serves bf16 and fp16 heads of 8, 16, ... 256 channels without dropout. All else goes group by
    group: fp32 and fp64, other heads, and any dropout; then the first call of a batch waits for the device, to learn
    the rows' lengths. On the CPU, weights to be dropped from are stored, T x H x L of them; else, but for fp64 on CUDA,
    none are.

    Deterministic on the CPU; on CUDA gradients are under `torch.use_deterministic_algorithms(True)` only.
    """
    layout.check(query)
    _check(query, key, value, dropout)
    if is_fused(query, dropout):
        return attention_fused(query, key, value, layout, causal=causal)
    return attention_grouped(query, key, value, layout, causal=causal, dropout=dropout)


def _check(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    if query.ndim != 3 or not query.shape[-1]:
        raise ShapeError(f"query must be (T, H, P) with P at least 1, got {tuple(query.shape)}; unflatten the heads")
    for name, x in {"key": key, "value": value}.items():
        check_shape(name, x, tuple(query.shape), "an event has one query, key and value a head")
        if (x.dtype, x.device) != (query.dtype, query.device):
            raise DtypeError(
                f"{name} must be {query.dtype} on {query.device} as query is, got {x.dtype} on {x.device}; convert it"
            )
    if not query.is_floating_point():
        raise DtypeError(f"attention must be given floating point tensors, got {query.dtype}; convert its inputs")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1), got {dropout}; it is a share, not percent")
