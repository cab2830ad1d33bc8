"""Every kernel our launches make compiles for GPUs that are not here, and keeps to its registers and shared memory.

The tables that the numbers below were read from: python -m tests.ops.ahead_of_time 90, and 80.
"""

from fnmatch import fnmatch

import pytest

from tests.ops.ahead_of_time import SHARED_BYTES, Kernel, compile_in_subprocess, table
from tests.ops.launches import LAUNCHES, RARE

TWO_PARTS = "in tf32x3 each operand of a product is two, of which both live in registers"
MANY_TILES = "with states, a chunk's gradient has all of x, dy, B, C, two states and five gradients at hand"
WIDEST = "the widest tile that is worth it on a Hopper"
HISTORY = "states of the last few events wait in registers for the way back"

SPILLS: dict[str, tuple[int, str]] = {
    "item_softmax_triton._dqueries_kernel * fp32 *": (60, TWO_PARTS),
    "item_softmax_triton._dqueries_kernel * bf16 D64 log_q items *": (10, WIDEST),
    "item_softmax_triton._dcandidates_kernel * fp32 *": (40, TWO_PARTS),
    "item_softmax_triton._dcandidates_kernel * bf16 D64 *": (15, WIDEST),
    "selective_triton._gradient_kernel *": (110, HISTORY),
    "ssd_gradients._gradients_kernel * fp32 * WHOLE *": (210, TWO_PARTS),
    "ssd_gradients._gradients_kernel * fp32 H4 P32 N32 * mixed *": (450, TWO_PARTS),
    "ssd_gradients._gradients_kernel * fp32 H4 P32 N32 * middling *": (680, TWO_PARTS),
    "ssd_gradients._gradients_kernel * fp32 H4 P32 N32 * long *": (210, TWO_PARTS),
    "ssd_gradients._gradients_kernel * fp32 H4 P24 N20 * middling *": (460, TWO_PARTS),
    "ssd_gradients._gradients_kernel * fp32 H32 P16 N64 * middling *": (750, TWO_PARTS),
    "ssd_gradients._gradients_kernel sm_90 fp32 H4 P64 N64 * middling *": (580, TWO_PARTS),
    "ssd_gradients._gradients_kernel * bf16 H4 P32 N32 * mixed *": (10, MANY_TILES),
    "ssd_gradients._gradients_kernel * bf16 H4 P32 N32 * middling *": (30, MANY_TILES),
    "ssd_gradients._gradients_kernel * bf16 H4 P24 N20 * middling *": (5, MANY_TILES),
    "ssd_gradients._gradients_kernel * bf16 H32 P16 N64 * middling *": (170, MANY_TILES),
    "ssd_serial._serial_kernel sm_80 bf16 H4 P32 N32 * states *": (5, MANY_TILES),
    "ssd_gradients._gradients_kernel sm_80 bf16 H4 P64 N64 * middling *": (300, MANY_TILES),
}
"""Most spills, and why, by a pattern of kernel, architecture, launch and constants. For all others it is 0: for what
runs forward, and for the gradient of bf16 rows of one chunk."""


def allowed_spills(kernel: Kernel) -> int:
    described = f"{kernel.name} sm_{kernel.arch} {kernel.launch} {kernel.variant}"
    return max((most for pattern, (most, _) in SPILLS.items() if fnmatch(described, pattern)), default=0)


SETS = {"every": list(LAUNCHES), **{name: [name] for name in RARE}}
"""Operators of one process, whose imports take seconds."""


@pytest.mark.timeout(1800)  # two minutes on an idle machine; the tail is longer
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["every", *(pytest.param(name, marks=pytest.mark.slow) for name in RARE)])
def test_kernels_compile_and_keep_to_their_budget(name, arch):
    kernels, failures = compile_in_subprocess(arch, SETS[name])
    print(f"\n{table(kernels)}")
    assert not failures, "\n".join(f"{failure.launch} on sm_{failure.arch}: {failure.error}" for failure in failures)
    over = [k for k in kernels if k.spills > allowed_spills(k) or k.shared_bytes > SHARED_BYTES[k.arch]]
    launched = {kernel.launch for kernel in kernels}
    assert all(launched & {launch.name for launch in (LAUNCHES | RARE)[operator]} for operator in SETS[name])
    assert not over, f"over the budget:\n{table(over)}"
