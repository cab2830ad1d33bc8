"""A depthwise convolution over the events of each row, with its weights and its streaming tail.

K taps; tap K-1 meets the current event, the others those before it, or, reversed, those after it.
Source: Dao & Gu 2024, arXiv:2405.21060, section 7.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.short_conv import short_conv

Activation = Literal["hardswish", "silu"]
ConvInit = Literal["uniform", "kaiming"]


class ShortConv(nn.Module):
    """`activation(conv(x) + bias)`, each channel alone, never across rows."""

    def __init__(
        self, channels: int, taps: int, activation: Activation, init: ConvInit = "uniform", *, reverse: bool = False
    ) -> None:
        """Start uniform within 1/sqrt(K), as PyTorch does, or as the fan-out Kaiming rule has it: normal, no bias."""
        super().__init__()
        self.activation: Activation = activation
        self.reverse = reverse
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))
        bound = 1 / math.sqrt(taps)
        if init == "kaiming":
            nn.init.normal_(self.weight, std=math.sqrt(2 / (channels * taps)))
            nn.init.zeros_(self.bias)
        else:
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, layout: JaggedLayout, tail: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Convolve (T, C) events of rows that start afresh, or of rows that go on.

        Args:
            tail: (B, K-1, C) the last inputs before each row, oldest first; None for rows that start afresh, and of a
                reversed one.

        Returns:
            (T, C) in the dtype of `x`, and the tail to go on with in the dtype of `tail`, None without one.
        """
        options = {"activation": self.activation, "reverse": self.reverse}
        if tail is None:
            return short_conv(x, self.weight, self.bias, layout, **options), None
        y, after = short_conv(x, self.weight, self.bias, layout, **options, tail=tail.to(x.dtype), return_tail=True)
        return y, after.to(tail.dtype)
