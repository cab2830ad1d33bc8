"""The time branch of TiM4Rec as published: gaps laid out to a window of W slots, mapped and normalised along them.

    t  = timestamps of a row, then 0 in the slots that it leaves                        (B, W)
    d  = norm(dropout(gap)), gap = t[i] - t[i-1], 0 at slot 0                           (B, H, W) one copy a head
    s  = alpha(dropout(d)) * d                       alpha: MLP of two linear maps of W slots to W, shared by all heads
    g  = activation(conv(activation(conv(s))))       (B, H, W) the gate: along the slots, causal, each head alone
    d' = norm(mix * d + (1 - mix) * g)               the next layer's signal; mix = sigmoid(weigh(dropout(d)))

Norms are over the slots. So every slot depends on every other, later ones and empty ones included: the slot after a
row's last event has a gap of minus its epoch, beside which a row that leaves slots has hardly any gaps at all. Weights
hold for one W only. For parity with what was published; `time_gate.py` is the branch that looks at the past alone.

W slots of a window. Nothing but these scalars is laid out: gates are read back at the events.
Source: Fan et al. 2024, TiM4Rec, arXiv:2409.16182, section 3.2 to 3.4, as its published code has it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_torchrec.errors import JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.linear import Linear
from ssd_torchrec.modules.short_conv import Activation, ConvInit, ShortConv


@dataclass(frozen=True, kw_only=True)
class WindowTimeConfig:
    """Shape of the branch."""

    length: int
    """Slots W of the window: the longest row it takes."""

    heads: int
    """Heads H, each with a gate of its own."""

    taps: int = 4
    """Taps K of both convolutions."""

    activation: Activation = "hardswish"
    """After both convolutions."""

    conv_init: ConvInit = "uniform"
    """Start of both convolutions."""

    norm_eps: float = 1e-12
    """Of the norms over the slots."""

    gap_dropout: float = 0.0
    """Share of gaps dropped in training, for all heads at once."""

    dropout: float = 0.0
    """Share of a signal's slots dropped in training before each of the maps along them, head by head."""

    mix_by_slot: bool = False
    """Mix signal and gate with a weight for each slot, not with one for each head."""

    float32_timestamps: bool = False
    """Round timestamps as float32 does, to 64 or 128 s, as the published loader stores them."""


class WindowSignal(nn.Module):
    """Gaps of each row, normalised over its window."""

    def __init__(self, config: WindowTimeConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = Dropout(config.gap_dropout)
        self.norm = nn.LayerNorm(config.length, eps=config.norm_eps)

    def forward(self, timestamps: Tensor) -> Tensor:
        """Turn (B, W) int64 seconds, 0 where a slot is empty, into the (B, H, W) signal, in the parameters' dtype."""
        if self.config.float32_timestamps:
            timestamps = timestamps.to(torch.float32).to(torch.int64)
        gap_s = timestamps.diff(dim=1, prepend=timestamps[:, :1])
        signal = self.norm(self.dropout(gap_s.to(self.norm.weight.dtype)))
        return signal[:, None].expand(-1, self.config.heads, -1)


class WindowGate(nn.Module):
    """From a layer's time signal to the gate on its step."""

    def __init__(self, config: WindowTimeConfig) -> None:
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.hidden = _along(config.length, config.length)
        self.alpha = _along(config.length, config.length)
        self.first = ShortConv(config.heads, config.taps, config.activation, config.conv_init)
        self.second = ShortConv(config.heads, config.taps, config.activation, config.conv_init)

    def forward(self, signal: Tensor, slots: JaggedLayout) -> Tensor:
        """(B, H, W) signal to (B, H, W) gate; `slots` are B rows of W."""
        scaled = self.alpha(F.silu(self.hidden(self.dropout(signal)))) * signal
        by_slot = scaled.transpose(1, 2)  # (B, W, H)
        inner, _ = self.first(by_slot.flatten(0, 1), slots)
        gate, _ = self.second(inner, slots)
        return gate.view(by_slot.shape).transpose(1, 2)


class WindowMix(nn.Module):
    """The next layer's signal: this layer's, mixed with its gate, then normalised over the window."""

    def __init__(self, config: WindowTimeConfig) -> None:
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.weigh = _along(config.length, config.length if config.mix_by_slot else 1)
        self.norm = nn.LayerNorm(config.length, eps=config.norm_eps)

    def forward(self, signal: Tensor, gate: Tensor) -> Tensor:
        """(B, H, W) signal and gate to the (B, H, W) signal of the next layer."""
        mix = torch.sigmoid(self.weigh(self.dropout(signal)))
        return self.norm(mix * signal + (1 - mix) * gate)


class WindowTime(nn.Module):
    """Timestamps to the gates of all layers."""

    def __init__(self, config: WindowTimeConfig, layers: int) -> None:
        super().__init__()
        self.length = config.length
        self.signal = WindowSignal(config)
        self.gates = nn.ModuleList(WindowGate(config) for _ in range(layers))
        self.mixes = nn.ModuleList(WindowMix(config) for _ in range(layers))

    def forward(self, timestamps: Tensor, layout: JaggedLayout) -> list[Tensor]:
        """(T,) int64 seconds to one (T, H) gate a layer.

        Autocast does not reach in here.

        Raises:
            JaggedLayoutError: a row has more than W events.
        """
        if layout.longest > self.length:
            raise JaggedLayoutError(
                f"rows must have at most the {self.length} events of the window, got one of {layout.longest}; "
                "cut rows to their newest events, or take time_mode causal"
            )
        with torch.autocast(timestamps.device.type, enabled=False):
            slot_of_event = self.length * layout.row_of_event + layout.position
            slots = JaggedLayout.from_lengths([self.length] * layout.num_rows, timestamps.device)
            laid = timestamps.new_zeros(slots.num_events).index_copy(0, slot_of_event, timestamps)
            signal, gates = self.signal(laid.view(layout.num_rows, self.length)), []
            for to_gate, mix in zip(self.gates, self.mixes, strict=True):
                gates.append(to_gate(signal, slots))
                signal = mix(signal, gates[-1])
            gates[-1] = gates[-1] + signal[:0].sum()  # nothing reads the last signal: its mix gets gradients of 0
            return [gate.transpose(1, 2).flatten(0, 1).index_select(0, slot_of_event) for gate in gates]


def _along(slots_in: int, slots_out: int) -> Linear:
    linear = Linear(slots_in, slots_out)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
