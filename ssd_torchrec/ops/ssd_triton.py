"""The state-space scan on Triton kernels: which of them run, the operators, and the gradient.

    rows of one chunk, without states      outputs                          gradients
    many rows, in one direction            serial: state and outputs        carry, carry, gradients
    few rows, or both directions           carry, outputs                   likewise
    long rows                              carry in pieces, outputs         carry in pieces, twice, gradients

Backwards, states are carried anew rather than kept: they would be as large as the events. `ssd_serial.py`,
`ssd_carry.py`, `ssd_output.py` and `ssd_gradients.py` hold the kernels.

Shapes: B rows, T events in all, H heads, P channels of a head, N state per channel, G groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.launch import inner_contiguous
from ssd_torchrec.ops.registry import refuse_double_backward, register
from ssd_torchrec.ops.ssd_carry import Scan, carry
from ssd_torchrec.ops.ssd_gradients import gradients
from ssd_torchrec.ops.ssd_output import Inputs, outputs
from ssd_torchrec.ops.ssd_serial import serial_outputs
from ssd_torchrec.ops.ssd_sizes import Problem, block, sizes_of

LARGEST_STATE = 64 * 128
"""Numbers of a head's state, channels and state rounded up to powers of two."""


def _problem(inputs: Inputs, longest: int, has_states: bool) -> Problem:
    (T, H, P), (_, G, N) = inputs.x.shape, inputs.B.shape
    return Problem(
        dtype=inputs.x.dtype,
        num_events=T,
        num_rows=inputs.offsets.numel() - 1,
        longest=longest,
        heads=H,
        groups=G,
        channels=P,
        state=N,
        has_states=has_states,
        directions=inputs.forward + inputs.backward,
    )


def _scans(inputs: Inputs) -> tuple[Scan | None, Scan | None]:
    """The forward and the backward one."""
    H = inputs.x.shape[1]
    of_direction = [slice(0, H), slice(inputs.dt.shape[1] - H, None)]
    bias = inputs.dt_bias
    forward, backward = (
        Scan(
            dt=inputs.dt[:, at],
            A=inputs.A[at],
            dt_bias=None if bias is None else bias[at],
            offsets=inputs.offsets,
            reverse=reverse == 1,
        )
        for reverse, at in enumerate(of_direction)
    )
    return forward if inputs.forward else None, backward if inputs.backward else None


def _launch_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    offsets: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial: Tensor | None,
    longest: int,
    forward: bool,
    backward: bool,
    keep_final: bool,
    keep_ungated: bool,
    chunk: int,
    piece: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, (T, H, P), N = offsets.numel() - 1, x.shape, B.shape[2]
    if not T:
        final = x.new_zeros(rows if keep_final else 0, H, P, N, dtype=torch.float32)
        if keep_final and initial is not None:
            final.copy_(initial)
        return x.new_empty(0, H, P), final, x.new_empty(0, H, P)
    inputs = Inputs(x, dt, A, B, C, offsets, dt_bias, D, forward, backward)
    problem = _problem(inputs, longest, initial is not None or keep_final)
    sizes = sizes_of(problem, backward=False, chunk=chunk, piece=piece)
    states, final = [x, x], x.new_empty(0, H, P, N, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if sizes.serial:
            return serial_outputs(inputs, z, initial, sizes, keep_last=keep_final, keep_ungated=keep_ungated)
        for way, scan in enumerate(_scans(inputs)):
            if scan is not None and not sizes.whole:
                states[way], last = carry(scan, x, B, sizes, first=initial, keep_last=keep_final)
                final = last if keep_final else final
        y, ungated = outputs(
            inputs,
            z,
            (states[0], states[1]),
            sizes,
            has_first=initial is not None,
            keep_ungated=keep_ungated,
        )
    return y, final, ungated


def _fake_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    offsets: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial: Tensor | None,
    longest: int,
    forward: bool,
    backward: bool,
    keep_final: bool,
    keep_ungated: bool,
    chunk: int,
    piece: int,
) -> tuple[Tensor, Tensor, Tensor]:
    T, H, P = x.shape
    rows = offsets.shape[0] - 1 if keep_final else 0
    final = x.new_empty(rows, H, P, B.shape[2], dtype=torch.float32)
    return x.new_empty(T, H, P), final, x.new_empty(T if keep_ungated else 0, H, P)


def _launch_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    offsets: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    initial: Tensor | None,
    longest: int,
    forward: bool,
    backward: bool,
    chunk: int,
    piece: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, (T, H, P), N = offsets.numel() - 1, x.shape, B.shape[2]
    has_first, has_last = initial is not None, dfinal.numel() > 0
    if not T:
        dinitial = x.new_zeros(rows if has_first else 0, H, P, N, dtype=torch.float32)
        if has_first and has_last:
            dinitial.copy_(dfinal)
        of_heads = A.new_zeros(2 * (forward + backward) + 1, H)
        dx, ddt, dB, dC = (torch.zeros_like(t) for t in (x, dt, B, C))
        return dx, ddt, dB, dC, of_heads, dinitial
    inputs = Inputs(x, dt, A, B, C, offsets, dt_bias, D, forward, backward)
    problem = _problem(inputs, longest, has_first or has_last)
    sizes = sizes_of(problem, backward=True, chunk=chunk, piece=piece)
    states, dstates, dinitial = [x, x], [x, x], x.new_empty(0, H, P, N, dtype=torch.float32)
    with torch.cuda.device_of(x):
        for way, scan in enumerate(_scans(inputs)):
            if scan is not None and not sizes.whole:
                states[way], _ = carry(scan, x, B, sizes, first=initial)
                first = dfinal if has_last else None
                dstates[way], last = carry(scan, dy, C, sizes, gradient=True, first=first, keep_last=has_first)
                dinitial = last if has_first else dinitial
        grads = gradients(
            inputs,
            dy,
            (states[0], states[1]),
            (dstates[0], dstates[1]),
            sizes,
            has_first=has_first,
            has_last=has_last,
        )
    return grads.x, grads.dt, grads.B, grads.C, grads.of_heads, dinitial


def _fake_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    offsets: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    initial: Tensor | None,
    longest: int,
    forward: bool,
    backward: bool,
    chunk: int,
    piece: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, H, P = x.shape
    rows = offsets.shape[0] - 1 if initial is not None else 0
    of_heads = A.new_empty(2 * (forward + backward) + 1, H)
    dinitial = x.new_empty(rows, H, P, B.shape[2], dtype=torch.float32)
    dx, ddt, dB, dC = (t.new_empty(t.shape) for t in (x, dt, B, C))
    return dx, ddt, dB, dC, of_heads, dinitial


register(
    "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor offsets, Tensor? dt_bias, Tensor? D, "
    "Tensor? z, Tensor? initial, SymInt longest, bool forward, bool backward, bool keep_final, bool keep_ungated, "
    "int chunk, int piece) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    fake=_fake_forward,
)
register(
    "ssd_scan_backward(Tensor dy, Tensor dfinal, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor offsets, "
    "Tensor? dt_bias, Tensor? D, Tensor? initial, SymInt longest, bool forward, bool backward, int chunk, int piece) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    fake=_fake_backward,
)


@dataclass(frozen=True)
class _Options:
    """What of a call is not a tensor."""

    longest: int
    forward: bool
    backward: bool
    keep_final: bool
    chunk: int
    piece: int


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        D: Tensor | None,
        z: Tensor | None,
        initial: Tensor | None,
        offsets: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        o = options
        y, final, ungated = torch.ops.ssd_torchrec.ssd_scan(
            x, dt, A, B, C, offsets, dt_bias, D, z, initial, o.longest, o.forward, o.backward, o.keep_final,
            z is not None, o.chunk, o.piece,
        )  # fmt: skip
        ctx.options = options
        ctx.save_for_backward(x, dt, A, B, C, dt_bias, D, z, initial, offsets, ungated)
        return y, final

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("ssd_scan")
        dy, dfinal = grad_outputs
        x, dt, A, B, C, dt_bias, D, z, initial, offsets, ungated = ctx.saved_tensors
        o, dz = ctx.options, None
        if z is not None:
            dz = torch.ops.aten.silu_backward(dy * ungated, z)
            dy = dy * F.silu(z)
        dx, ddt, dB, dC, of_heads, dinitial = torch.ops.ssd_torchrec.ssd_scan_backward(
            dy.contiguous(), dfinal.contiguous(), x, dt, A, B, C, offsets, dt_bias, D, initial, o.longest, o.forward,
            o.backward, o.chunk, o.piece,
        )  # fmt: skip
        ways = o.forward + o.backward
        dA, ddt_bias, dD = (t.flatten() for t in of_heads.split([ways, ways, 1]))
        ddt_bias = None if dt_bias is None else ddt_bias.to(dt_bias.dtype)
        dD = None if D is None else dD.to(D.dtype)
        return dx, ddt, dA, dB, dC, ddt_bias, dD, dz, None if initial is None else dinitial, None, None


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    layout: JaggedLayout,
    dt_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    if block(x.shape[2]) * block(B.shape[2]) > LARGEST_STATE:
        raise ShapeError(
            f"a head's state must be at most 64 x 128, got {x.shape[2]} channels and state {B.shape[2]}; "
            "use more heads of fewer channels"
        )
    return _Scan.apply(
        inner_contiguous(x),
        inner_contiguous(dt),
        A.float().contiguous(),
        inner_contiguous(B.to(x.dtype)),
        inner_contiguous(C.to(x.dtype)),
        None if dt_bias is None else dt_bias.contiguous(),
        None if D is None else D.contiguous(),
        None if z is None else inner_contiguous(z.to(x.dtype)),
        None if initial is None else initial.float().contiguous(),
        layout.offsets,
        options,
    )


def ssd_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    layout: JaggedLayout,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk: int = 0,
    piece: int = 0,
) -> Any:
    """The kernels, in one direction.

    Args:
        chunk: events Q of a chunk: 16 or 32; 0 to choose.
        piece: events of a piece of a long row, a multiple of `chunk`; 0 to choose.
    """
    options = _Options(layout.longest, not reverse, reverse, return_final_state, chunk, piece)
    y, final = _scan(x, dt, A, B, C, layout, dt_bias, D, z, initial_state, options)
    return (y, final) if return_final_state else y


def ssd_scan_bidirectional_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    layout: JaggedLayout,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    chunk: int = 0,
    piece: int = 0,
) -> Tensor:
    """The kernels, in both directions at once."""
    bias = None if dt_bias is None else dt_bias.flatten()
    options = _Options(layout.longest, True, True, False, chunk, piece)
    return _scan(x, dt.flatten(1), A.flatten(), B, C, layout, bias, D, z, None, options)[0]
