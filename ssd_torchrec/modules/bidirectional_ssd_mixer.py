"""The bidirectional, time-aware SSD mixer: what each event takes from all events of its row.

    z, xBC, r = in_proj(x)                                 z (T, E), xBC (T, E+2N), r (T, 2, H) the raw steps
    x, B, C   = activation(conv(xBC))                      causal, K taps, once for both directions
    y         = ssd_scan_bidirectional(x, r * gate, A, B, C)
    out       = out_proj(norm(y * silu(z)))                RMS norm over all E, gate first

Directions are forward and backward, in this order. A step says how long the state waited on its way to an event: the
gate forward is to follow the gap to the event before it, the gate backward the gap to the event after it, which is what
came before it as seen from the other side. The rest is the causal mixer's: each direction has its own raw steps, bias
and A; x, B, C and D are shared, so that on short rows both directions cost about what one does.

The convolution stays the causal one. It makes features of runs of K successive events, and either direction sees the
feature of every run. A centred one makes the same runs, and hangs each on an event in its middle, not on its last; a
convolution for each direction makes an x, B and C for each, and the scan read and multiply twice as much. So turned
rows give turned outputs only where K = 1.

An event knows what follows it in its row: targets must lie outside the row.
Source: `ssd_mixer.py` for the block and its gate; Hwang et al. 2024, Hydra, arXiv:2407.09941, for the sum of both
directions, with a centred convolution and with B and C for each direction in its place.
"""

from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.ssd_mixer import SSDBlock, SSDMixerConfig
from ssd_torchrec.ops.checks import check_shape
from ssd_torchrec.ops.ssd_bidirectional import ssd_scan_bidirectional


class BidirectionalSSDMixer(SSDBlock):
    """Project, convolve, scan both ways with gated steps, norm, project. It cannot stream: nothing is ever final."""

    def __init__(self, config: SSDMixerConfig) -> None:
        super().__init__(config, (2, config.heads))

    def forward(self, x: Tensor, gate: Tensor | None, layout: JaggedLayout) -> Tensor:
        """Mix (T, D) events within their rows.

        Args:
            gate: (T, 2, H) factor of the raw steps forward and backward, at least fp32; None is 1.

        Returns:
            (T, D). Under autocast steps, A and states stay fp32.

        Raises:
            ShapeError: the gate has another shape, that of one direction for instance.
        """
        z, xbc, step = self._project(x)
        check_shape("gate", gate, tuple(step.shape), "stack the gates of both directions at dimension 1")
        x, B, C = self._split(self.conv(xbc, layout)[0])
        step = step if gate is None else step * gate
        y = ssd_scan_bidirectional(x, step, -self.A_log.exp(), B, C, layout, dt_bias=self.dt_bias, D=self.D)
        return self._finish(y, z)
