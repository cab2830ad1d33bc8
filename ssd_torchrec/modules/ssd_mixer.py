"""The time-aware SSD mixer: what each event takes from the events before it in its row.

    z, xBC, r = in_proj(x)                       z (T, E), xBC (T, E+2N), r (T, H) the raw step
    x, B, C   = activation(conv(xBC))            causal, K taps
    y         = ssd_scan(x, r * gate, A, B, C)   step = softplus(r * gate + dt_bias); y = S C + D x
    out       = out_proj(norm(y * silu(z)))      RMS norm over all E, gate first

The gate multiplies the raw step, before bias and softplus: at gate 0 the step no longer depends on the event, at 1 it
is that of plain SSD. E = expand * D inner channels in H heads of P; A, B, C, D are those of the SSM.
Source: Dao & Gu 2024, arXiv:2405.21060; Fan et al. 2024, TiM4Rec, arXiv:2409.16182, as its published code has it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.linear import Linear
from ssd_torchrec.modules.short_conv import Activation, ConvInit, ShortConv
from ssd_torchrec.ops.gated_norm import gated_norm
from ssd_torchrec.ops.ssd_scan import ssd_scan

STEP_RANGE = (1e-3, 0.1)  # of the steps at gate 1, drawn log-uniform
RATE_RANGE = (1.0, 16.0)  # of -A, drawn uniform


@dataclass(frozen=True, kw_only=True)
class SSDMixerConfig:
    """Shape of one mixer."""

    width: int
    """Channels D of an event, in and out."""

    expand: int = 2
    """Inner channels E over D."""

    head_width: int = 32
    """Channels P of a head."""

    state: int = 32
    """State N of a channel."""

    taps: int = 4
    """Taps K of the convolution."""

    activation: Activation = "hardswish"
    """After the convolution. The published code takes hardswish at H = 4, whatever the paper says."""

    conv_init: ConvInit = "uniform"
    """Start of the convolution."""

    raw_step: float = 0.0
    """Bias of the raw step at the start, taken off dt_bias, so that at gate 1 steps start as they do without a gate.
    A raw step around 0, as published, leaves a gate nothing to act on."""

    norm_eps: float = 1e-12
    """Of the gated norm."""

    bias: bool = True
    """Whether both projections have a bias."""

    def __post_init__(self) -> None:
        if self.inner % self.head_width:
            raise ConfigError(
                f"expand * width = {self.inner} must split into heads of {self.head_width} channels; "
                "make it a multiple of head_width"
            )
        if self.raw_step and not self.bias:
            raise ConfigError(f"raw_step must be 0 in a mixer without bias, got {self.raw_step}; it is a bias")

    @property
    def inner(self) -> int:
        return self.expand * self.width

    @property
    def heads(self) -> int:
        return self.inner // self.head_width

    @property
    def conv_channels(self) -> int:
        return self.inner + 2 * self.state


class SSDMixerState(NamedTuple):
    """What a mixer keeps of each row to go on with it."""

    conv: Tensor  # (B, K-1, E+2N)
    ssm: Tensor  # (B, H, P, N), at least fp32


class SSDBlock(nn.Module):
    """All of a mixer but its scan: the projections, the convolution, the norm, and the parameters of the scan."""

    def __init__(self, config: SSDMixerConfig, step_shape: tuple[int, ...]) -> None:
        """Steps of an event come in `step_shape`, (H,) or (2, H), and so do `dt_bias` and `A_log`."""
        super().__init__()
        self.config = config
        steps = math.prod(step_shape)
        self.in_proj = Linear(config.width, config.inner + config.conv_channels + steps, bias=config.bias)
        self.conv = ShortConv(config.conv_channels, config.taps, config.activation, config.conv_init)
        self.dt_bias = nn.Parameter(inverse_softplus(_log_uniform(step_shape, *STEP_RANGE)) - config.raw_step)
        self.A_log = nn.Parameter(torch.empty(step_shape).uniform_(*RATE_RANGE).log())
        self.D = nn.Parameter(torch.ones(config.heads))
        self.norm_weight = nn.Parameter(torch.ones(config.inner))
        self.out_proj = Linear(config.inner, config.width, bias=config.bias)
        for linear in (self.in_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            if config.bias:
                nn.init.zeros_(linear.bias)
        if config.bias:
            nn.init.constant_(self.in_proj.bias[-steps:], config.raw_step)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) to z (T, E), xBC (T, E+2N) and the raw steps (T, *step_shape), these in the dtype of `A_log`."""
        steps = self.A_log.numel()
        z, xbc, raw_step = self.in_proj(x).split([self.config.inner, self.config.conv_channels, steps], -1)
        return z, xbc, raw_step.to(self.A_log.dtype).unflatten(-1, self.A_log.shape)

    def _split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, E+2N) to x (T, H, P), B and C (T, 1, N): one group for all heads."""
        x, B, C = xbc.split([self.config.inner, self.config.state, self.config.state], -1)
        return x.unflatten(-1, (self.config.heads, self.config.head_width)), B.unsqueeze(1), C.unsqueeze(1)

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        """(T, H, P) and the gate (T, E) to (T, D)."""
        return self.out_proj(gated_norm(y.flatten(1), z, self.norm_weight, eps=self.config.norm_eps))


class SSDMixer(SSDBlock):
    """Project, convolve, scan with a gated step, norm, project."""

    def __init__(self, config: SSDMixerConfig) -> None:
        super().__init__(config, (config.heads,))

    def forward(
        self, x: Tensor, gate: Tensor | None, layout: JaggedLayout, state: SSDMixerState | None = None
    ) -> tuple[Tensor, SSDMixerState | None]:
        """Mix (T, D) events within their rows.

        Args:
            gate: (T, H) factor of the raw step, at least fp32; None is 1.
            state: what the rows left behind; None for rows that start afresh.

        Returns:
            (T, D), and the state to go on with, None without one. Under autocast step, A and states stay fp32.
        """
        z, xbc, step = self._project(x)
        xbc, tail = self.conv(xbc, layout, state.conv if state else None)
        y, ssm = self._scan(xbc, step if gate is None else step * gate, layout, state.ssm if state else None)
        return self._finish(y, z), None if tail is None or ssm is None else SSDMixerState(tail, ssm)

    def _scan(
        self, xbc: Tensor, step: Tensor, layout: JaggedLayout, initial: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, B, C = self._split(xbc)
        args = (x, step, -self.A_log.exp(), B, C, layout)
        if initial is None:
            return ssd_scan(*args, dt_bias=self.dt_bias, D=self.D), None
        return ssd_scan(*args, dt_bias=self.dt_bias, D=self.D, initial_state=initial, return_final_state=True)


def inverse_softplus(y: Tensor) -> Tensor:
    """The x with softplus(x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def _log_uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return torch.empty(shape).uniform_(math.log(low), math.log(high)).exp()
