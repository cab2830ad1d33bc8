"""Every kernel our launches make compiles for GPUs that are not here, and keeps to its registers and shared memory.

The tables that the numbers below were read from: python -m tests.ops.ahead_of_time 90, and 80.
"""

from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from itertools import chain, repeat

import pytest

from tests.ops.ahead_of_time import SHARED_BYTES, Kernel, compile_in_subprocess, table
from tests.ops.launches import LAUNCHES, RARE

SPILLS: dict[str, tuple[int, str]] = {}
"""Most spills, and why, by a pattern of the kernel's name, launch and variant; 0 for all others."""


def allowed_spills(kernel: Kernel) -> int:
    described = f"{kernel.name} {kernel.launch} {kernel.variant}"
    return max((most for pattern, (most, _) in SPILLS.items() if fnmatch(described, pattern)), default=0)


@pytest.mark.timeout(1800)  # a minute each on an idle machine; the tail is longer
@pytest.mark.parametrize("operator", [*LAUNCHES, *(pytest.param(name, marks=pytest.mark.slow) for name in RARE)])
def test_kernels_compile_and_keep_to_their_budget(operator):
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(compile_in_subprocess, SHARED_BYTES, repeat(operator)))
    kernels, failures = (list(chain(*lists)) for lists in zip(*results, strict=True))
    print(f"\n{table(kernels)}")
    assert not failures, "\n".join(f"{failure.launch} on sm_{failure.arch}: {failure.error}" for failure in failures)
    over = [k for k in kernels if k.spills > allowed_spills(k) or k.shared_bytes > SHARED_BYTES[k.arch]]
    assert kernels
    assert not over, f"over the budget:\n{table(over)}"
