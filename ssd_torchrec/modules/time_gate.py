"""The time branch of TiM4Rec, causal: gaps between events become a gate on each event's step.

    u  = log1p(gap in s)          z = (u - log_gap_mean) / log_gap_std          a row's first event has no gap: z = 0
    d  = z + [first event] first                                   (T, H) the signal into the first layer's gate
    s  = alpha(d) * d             alpha: MLP event by event
    g  = activation(conv(activation(conv(s))))                     (T, H) the gate, near 1 at the start
    d' = scale * (mix * d + (1 - mix) * g) + shift                 the next layer's signal; mix = sigmoid(slope * d + b)

Every value depends on the event's own gap and on the few before it in its row: it streams, and has no length.
Source: Fan et al. 2024, TiM4Rec, arXiv:2409.16182, section 3.3; the published code maps and normalises along the time
axis instead, which looks ahead. docs/decisions.md says what stands in its place, and why.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.short_conv import Activation, ShortConv

OPEN = {"hardswish": (math.sqrt(33) - 3) / 2, "silu": 1.2784645427610738}  # activation(OPEN) = 1
EARLIER_TAPS = 0.2  # start of the taps on earlier events, as a share of PyTorch's; the event's own tap starts at 1


class GapSignal(nn.Module):
    """Normalised log gap of each event, one copy a head; a learned value where a row has no past."""

    def __init__(self, heads: int, log_gap_mean: float, log_gap_std: float) -> None:
        super().__init__()
        self.log_gap_mean = log_gap_mean
        self.log_gap_std = log_gap_std
        self.first = nn.Parameter(torch.zeros(heads))

    def forward(self, timestamps: Tensor, layout: JaggedLayout, last: Tensor | None, known: Tensor | None) -> Tensor:
        """Turn (T,) int64 seconds, ascending within a row, into the (T, H) signal, in the dtype of the parameters.

        Args:
            last: (B,) int64 the last timestamp of each row's past; None for rows that start afresh.
            known: (B,) bool whether a row has a past; None for rows that start afresh.

        A timestamp below the one before it is the caller's error: data and serving refuse it; here it becomes NaN.
        """
        previous = timestamps.roll(1)
        has_gap = layout.position > 0
        if last is not None and known is not None:
            previous = torch.where(has_gap, previous, last[layout.row_of_event])
            has_gap = has_gap | known[layout.row_of_event]
        gap_s = torch.where(has_gap, timestamps - previous, 0)  # in int64: fp32 would round epochs to minutes
        z = _normalised(gap_s, self.log_gap_mean, self.log_gap_std, self.first.dtype)
        return torch.where(has_gap[:, None], z[:, None], self.first)


class NextGapSignal(nn.Module):
    """The same from the other side: the gap to the next event; a learned value at a row's last event. Looks ahead."""

    def __init__(self, heads: int, log_gap_mean: float, log_gap_std: float) -> None:
        super().__init__()
        self.log_gap_mean = log_gap_mean
        self.log_gap_std = log_gap_std
        self.last = nn.Parameter(torch.zeros(heads))

    def forward(self, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Turn (T,) int64 seconds, ascending within a row, into the (T, H) signal, in the dtype of the parameters.

        A timestamp above the one after it is the caller's error, and becomes NaN as in `GapSignal`.
        """
        has_gap = (layout.position > 0).roll(-1)  # what follows an event in its row is no first event
        gap_s = torch.where(has_gap, timestamps.roll(-1) - timestamps, 0)
        z = _normalised(gap_s, self.log_gap_mean, self.log_gap_std, self.last.dtype)
        return torch.where(has_gap[:, None], z[:, None], self.last)


def _normalised(gap_s: Tensor, log_gap_mean: float, log_gap_std: float, dtype: torch.dtype) -> Tensor:
    return (gap_s.to(dtype).log1p() - log_gap_mean) / log_gap_std


@dataclass(frozen=True, kw_only=True)
class TimeGateConfig:
    """Shape of one gate."""

    heads: int
    """Heads H, each with a gate of its own."""

    taps: int = 4
    """Taps K of both convolutions."""

    hidden: int = 16
    """Hidden units of the MLP."""

    activation: Activation = "hardswish"
    """After both convolutions."""

    dropout: float = 0.0
    """Share of hidden units dropped in training."""

    reverse: bool = False
    """See the events after an event, not those before it, as a gate of steps backward has to; it cannot stream."""


class TimeGateState(NamedTuple):
    """What a gate keeps of each row to go on with it."""

    first: Tensor  # (B, K-1, H) last inputs of the first convolution
    second: Tensor  # (B, K-1, H)


class TimeGate(nn.Module):
    """From a layer's time signal to the gate on its step."""

    def __init__(self, config: TimeGateConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.heads, config.hidden)
        self.alpha = nn.Linear(config.hidden, config.heads)
        self.dropout = Dropout(config.dropout)
        self.first = ShortConv(config.heads, config.taps, config.activation, reverse=config.reverse)
        self.second = ShortConv(config.heads, config.taps, config.activation, reverse=config.reverse)
        self._open()

    @torch.no_grad()
    def _open(self) -> None:
        """Start near 1, moved mostly by the event's own gap: from the published start it takes many epochs to open."""
        for conv in (self.first, self.second):
            conv.weight.mul_(EARLIER_TAPS)
            conv.weight[:, -1] = 1.0
        self.second.bias.fill_(OPEN[self.second.activation])

    def forward(
        self, signal: Tensor, layout: JaggedLayout, state: TimeGateState | None = None
    ) -> tuple[Tensor, TimeGateState | None]:
        """(T, H) signal to (T, H) gate, and the state to go on with, None for rows that started afresh."""
        alpha = self.alpha(self.dropout(F.silu(self.hidden(signal))))
        inner, first = self.first(alpha * signal, layout, state.first if state else None)
        gate, second = self.second(inner, layout, state.second if state else None)
        return gate, None if first is None or second is None else TimeGateState(first, second)


class SignalMix(nn.Module):
    """The next layer's signal: this layer's, mixed head by head with its gate, then scaled and shifted."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.empty(heads).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(heads))
        self.scale = nn.Parameter(torch.ones(heads))
        self.shift = nn.Parameter(torch.zeros(heads))

    def forward(self, signal: Tensor, gate: Tensor) -> Tensor:
        """(T, H) signal and gate to the (T, H) signal of the next layer."""
        return self.scale * torch.lerp(gate, signal, torch.sigmoid(self.slope * signal + self.bias)) + self.shift
