"""The Mamba-1 mixer: what each event takes from the events before it in its row.

    x, z    = in_proj(events)                    (T, E) each
    x       = silu(conv(x))                      causal, K taps
    r, B, C = x_proj(x)                          (T, R), (T, N), (T, N)
    dt      = dt_proj(r)                         (T, E) the raw step of each channel
    y       = selective_scan(x, dt, A, B, C, z)  step = softplus(dt + dt_bias); y = (S C + D x) silu(z)
    out     = out_proj(y)

E = expand * D inner channels; a step passes through R = D / 16 numbers, rounded up; A, B, C, D are those of the SSM. No
projection has a bias, and nothing is normalised. Every channel forgets at N rates, from 1 to N at the start.
Source: Gu & Dao 2023, arXiv:2312.00752, sections 3.4 and 3.6; the start is that of its authors' code.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.linear import Linear
from ssd_torchrec.modules.short_conv import ShortConv
from ssd_torchrec.modules.ssd_mixer import STEP_RANGE, inverse_softplus
from ssd_torchrec.ops.selective_scan import selective_scan

CHANNELS_PER_STEP = 16  # of the width, for each number that a step passes through


@dataclass(frozen=True, kw_only=True)
class MambaMixerConfig:
    """Shape of one mixer."""

    width: int
    """Channels D of an event, in and out."""

    expand: int = 2
    """Inner channels E over D."""

    state: int = 32
    """State N of a channel."""

    taps: int = 4
    """Taps K of the convolution."""

    def __post_init__(self) -> None:
        for name in ("width", "expand", "state", "taps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")

    @property
    def inner(self) -> int:
        return self.expand * self.width

    @property
    def step_rank(self) -> int:
        return math.ceil(self.width / CHANNELS_PER_STEP)


class MambaMixerState(NamedTuple):
    """What a mixer keeps of each row to go on with it."""

    conv: Tensor  # (B, K-1, E)
    ssm: Tensor  # (B, E, N), at least fp32


class MambaMixer(nn.Module):
    """Project, convolve, scan with steps of each channel's own, gate, project."""

    def __init__(self, config: MambaMixerConfig) -> None:
        super().__init__()
        self.config = config
        inner, rank = config.inner, config.step_rank
        self.in_proj = Linear(config.width, 2 * inner, bias=False)
        self.conv = ShortConv(inner, config.taps, "silu")
        self.x_proj = Linear(inner, rank + 2 * config.state, bias=False)
        self.dt_proj = Linear(rank, inner, bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus(_first_steps(inner)))
        self.A_log = nn.Parameter(torch.arange(1, config.state + 1).log().repeat(inner, 1))  # (E, N)
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, config.width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -1 / math.sqrt(rank), 1 / math.sqrt(rank))

    def forward(
        self, x: Tensor, layout: JaggedLayout, state: MambaMixerState | None = None
    ) -> tuple[Tensor, MambaMixerState | None]:
        """Mix (T, D) events within their rows.

        Args:
            state: what the rows left behind; None for rows that start afresh.

        Returns:
            (T, D), and the state to go on with, None without one. Under autocast step, A and states stay fp32.
        """
        x, z = self.in_proj(x).chunk(2, -1)
        x, tail = self.conv(x, layout, state.conv if state else None)
        y, ssm = self._scan(x, z, layout, state.ssm if state else None)
        return self.out_proj(y), None if tail is None or ssm is None else MambaMixerState(tail, ssm)

    def _scan(self, x: Tensor, z: Tensor, layout: JaggedLayout, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
        step, B, C = self.x_proj(x).split([self.config.step_rank, self.config.state, self.config.state], -1)
        step = self.dt_proj(step).to(self.A_log.dtype)
        args, options = (x, step, -self.A_log.exp(), B, C, layout), {"dt_bias": self.dt_bias, "D": self.D, "z": z}
        if initial is None:
            return selective_scan(*args, **options), None
        return selective_scan(*args, **options, initial_state=initial, return_final_state=True)


def _first_steps(channels: int) -> Tensor:
    """Log-uniform in the range of all our mixers."""
    low, high = STEP_RANGE
    return torch.empty(channels).uniform_(math.log(low), math.log(high)).exp()
