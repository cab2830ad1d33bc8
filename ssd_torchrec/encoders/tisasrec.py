"""TiSASRec: SASRec whose attention also sees how long before an event another one was.

    x = dropout(sqrt(D) events)
    for each layer:   x = x + dropout(attention(norm(x), positions, intervals))
                      x = x + dropout(feed_forward(norm(x)))
    out = norm(x)

    i[t, s]     = min(|time[t] - time[s]| // unit, max_interval)
    score[t, s] = q[t] . (k[s] + position_key[s] + interval_key[i[t, s]]) / sqrt(P)
    y[t]        = sum_s softmax_s(score[t, s]) (v[s] + position_value[s] + interval_value[i[t, s]])      s <= t

Positions count from a row's first event; their vectors and those of the intervals serve all layers, a part for each
head. The unit of the paper is the shortest gap of the row that is not 0 ("row-minimum"). To know it one must have seen
the whole row: outputs then depend on later timestamps, and the encoder is not causal. A fixed unit ("seconds") is the
default here, and causal.

Interval scores are a product with the K + 1 keys of all intervals, gathered at i; interval values are weights summed
by interval, times the values of all. Nothing is as large as (rows, L, L, D), but weights and intervals are L x L a row:
no fused kernel knows them. So it goes through rows of equal length in chunks of a bounded size, computed once more on
the way back, and what it holds at a time does not grow with the batch.

Source: Li, Wang & McAuley 2020, Time Interval Aware Self-Attention for Sequential Recommendation, WSDM 2020, sections
3.2 to 3.5. Its code drops from position and interval vectors too; here what is dropped is as in SASRec.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssd_torchrec.encoders.encoder import Encoder, EncoderConfig
from ssd_torchrec.encoders.sasrec import start_linear
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.attention import PointwiseFeedForward, Positions, check_heads
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.linear import Linear
from ssd_torchrec.ops.attention import later, row_groups

IntervalUnit = Literal["seconds", "row-minimum"]
CHUNK_VALUES = 2**23  # weights and interval scores of one chunk, all heads; a row is never cut
LONG_S = 2**62  # longer than any gap


@dataclass(frozen=True, kw_only=True)
class TiSASRecConfig(EncoderConfig):
    """Shape of the encoder; the defaults are those for MovieLens, 64 wide."""

    title: ClassVar[str] = "TiSASRec"
    paper: ClassVar[str] = "Li, Wang & McAuley 2020, WSDM"

    width: int = 64
    """Channels D of an event, in and out."""

    layers: int = 2
    """Attention and feed-forward pairs."""

    heads: int = 1
    """Heads of an attention."""

    max_length: int = 200
    """Events of the longest row: how many positions are learned."""

    interval_unit: IntervalUnit = "seconds"
    """seconds: intervals count unit_s, each event sees its past only; row-minimum: they count the row's shortest gap
    above 0, as published, which tells an event of later ones."""

    unit_s: int = 60
    """Seconds an interval counts; without effect under row-minimum."""

    max_interval: int = 2048
    """Longer intervals count as this one."""

    dropout: float = 0.2
    """Of events, of what each block adds to them, and inside the feed-forward."""

    attention_dropout: float = 0.2
    """Of attention weights."""

    norm_eps: float = 1e-8
    """Of every norm."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "max_length", "unit_s", "max_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}; it is a share, not percent")
        if self.interval_unit not in get_args(IntervalUnit):
            raise ConfigError(
                f"interval_unit must be seconds or row-minimum, got {self.interval_unit!r}; choose one of the two"
            )
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be above 0, got {self.norm_eps}; raise it")
        check_heads(self.width, self.heads)

    @property
    def causal(self) -> bool:
        """With a fixed unit only."""
        return self.interval_unit == "seconds"

    @property
    def reads_time(self) -> bool:
        """Always."""
        return True

    @property
    def length_cap(self) -> int:
        """As many events as there are positions."""
        return self.max_length

    def build(self) -> "TiSASRec":
        """The encoder with new weights."""
        return TiSASRec(self)


PRESETS: dict[str, TiSASRecConfig] = {
    "ml-1m-64d": TiSASRecConfig(),
    "beauty-64d": TiSASRecConfig(max_length=50, dropout=0.4, attention_dropout=0.4, unit_s=86_400, max_interval=512),
}
"""Width, length and dropout of the comparisons with state-space encoders; blocks, heads and longest intervals of the
paper itself. The units are ours: minutes where users act within an hour, days where the log knows no more."""


class IntervalTables(nn.Module):
    """What all layers share: a vector for each place and for each interval, as keys and as values."""

    def __init__(self, config: TiSASRecConfig) -> None:
        super().__init__()
        self.position_key = Positions(config.width, config.max_length)
        self.position_value = Positions(config.width, config.max_length)
        self.interval_key = nn.Parameter(torch.empty(config.max_interval + 1, config.width))
        self.interval_value = nn.Parameter(torch.empty(config.max_interval + 1, config.width))
        for table in (self.interval_key, self.interval_value):
            nn.init.normal_(table, std=0.02)


class IntervalAttention(nn.Module):
    """Heads of attention to the past of the row, by content, place and interval."""

    def __init__(self, config: TiSASRecConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, Dropout(config.attention_dropout)
        self.in_proj = Linear(config.width, 3 * config.width, bias=False)

    def forward(self, x: Tensor, time_s: Tensor, tables: IntervalTables, layout: JaggedLayout) -> Tensor:
        """(T, D) in, (T, D) out; `time_s` is (T, 2) int64, timestamps and what an interval counts."""
        query, key, value = self.in_proj(x).chunk(3, -1)
        key, value = key + tables.position_key(layout), value + tables.position_value(layout)
        of_keys, of_values = tables.interval_key, tables.interval_value
        if not layout.num_events:
            return query + key + value + of_keys[:0] + of_values[:0]
        *heads, of_keys, of_values = (self._split(t) for t in (query, key, value, of_keys, of_values))
        chunks = [self._chunks(t, len(of_keys), layout) for t in (*heads, time_s)]
        mixed = [
            checkpoint(self._mix, *chunk, of_keys, of_values, use_reentrant=False)
            for chunk in zip(*chunks, strict=True)
        ]
        return row_groups(layout).join(mixed).flatten(1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _chunks(self, events: Tensor, intervals: int, layout: JaggedLayout) -> list[Tensor]:
        """(T, ...) to (rows, L, ...), as many rows of one length at once as the bound allows."""
        chunks = []
        for group in row_groups(layout).split(events):
            length = group.shape[1]
            chunks += group.split(max(1, CHUNK_VALUES // (self.heads * length * (length + intervals))))
        return chunks

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, time_s: Tensor, of_keys: Tensor, of_values: Tensor
    ) -> Tensor:
        """(rows, L, H, P) of one chunk and (K+1, H, P) of all intervals to (rows, L, H, P)."""
        interval = _intervals(time_s, len(of_keys) - 1)[:, None].expand(-1, self.heads, -1, -1)  # (rows, H, L, L)
        by_interval = torch.einsum("rlhp,khp->rhlk", query, of_keys)
        scores = torch.einsum("rlhp,rshp->rhls", query, key) + by_interval.gather(-1, interval)
        scores = scores / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(later(query.shape[1], query.device), -math.inf)
        weights = self.dropout(scores.softmax(-1))
        summed = torch.zeros_like(by_interval, dtype=weights.dtype).scatter_add(-1, interval, weights)
        by_content = torch.einsum("rhls,rshp->rlhp", weights, value)
        return by_content + torch.einsum("rhlk,khp->rlhp", summed, of_values)


def _intervals(time_s: Tensor, most: int) -> Tensor:
    """(rows, L, 2) to (rows, L, L) int64, each at most `most`."""
    stamps, unit = time_s.unbind(-1)
    return ((stamps[:, :, None] - stamps[:, None]).abs() // unit[:, :, None]).clamp(max=most)


def _shortest_gap_s(timestamps: Tensor, layout: JaggedLayout) -> Tensor:
    """Of the row of each event, the shortest gap above 0 between events: (T,) int64, 2^62 where there is none."""
    gaps = timestamps.diff().abs()
    counts = (gaps > 0) & (layout.position[1:] > 0)
    shortest = torch.full_like(layout.last_event, LONG_S)
    shortest = shortest.scatter_reduce(0, layout.row_of_event[1:], gaps.where(counts, LONG_S), "amin")
    return shortest[layout.row_of_event]


class TiSASRecLayer(nn.Module):
    """Attention, then feed-forward, each of what is normalised and added to what is not."""

    def __init__(self, config: TiSASRecConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = IntervalAttention(config)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = PointwiseFeedForward(width, width, "relu", config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, time_s: Tensor, tables: IntervalTables, layout: JaggedLayout) -> Tensor:
        """(T, D) in, (T, D) out."""
        x = x + self.dropout(self.attention(self.attention_norm(x), time_s, tables, layout))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class TiSASRec(Encoder):
    """The encoder; causal with a fixed unit only."""

    def __init__(self, config: TiSASRecConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.causal = config.width, config.causal
        self.tables = IntervalTables(config)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(TiSASRecLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                start_linear(module)

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole histories.

        Args:
            events: (T, D).
            timestamps: (T,) int64 unix seconds.

        Returns:
            (T, D) in the dtype of the parameters, each event's vector from it and earlier events of its row only;
            under row-minimum also from the shortest gap of the whole row.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`, or a row is longer than max_length.

        Deterministic on the CPU. With T = 0 every parameter still gets a gradient, of zeros. On a GPU it waits for the
        device once a batch, to learn the rows' lengths.
        """
        layout.check(events)
        layout.check(timestamps)
        time_s = torch.stack([timestamps, self._unit_s(timestamps, layout)], dim=-1)
        x = self.dropout(math.sqrt(self.width) * events)
        for layer in self.layers:
            x = layer(x, time_s, self.tables, layout)
        return self.norm(x)

    def _unit_s(self, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """What an interval counts, (T,) int64 seconds."""
        if self.config.interval_unit == "row-minimum":
            return _shortest_gap_s(timestamps, layout)
        return torch.full_like(timestamps, self.config.unit_s)
