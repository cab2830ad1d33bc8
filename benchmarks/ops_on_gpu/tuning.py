"""The peers' kernels tune themselves: each at its first call, over up to 48 configurations, some of them minutes long.

Configurations are tried for a few calls each instead of an eighth of a second, and those are left out whose tile goes
beyond the matrix where a smaller tile of the list already covers it. Nothing tuned is read from or left on the disk.
"""

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.autotuner import Autotuner

TILES = {
    "_bmm_chunk_fwd_kernel": ("chunk_size", "chunk_size"),
    "_bmm_chunk_bwd_kernel": ("chunk_size", "K"),
    "_chunk_scan_fwd_kernel": ("chunk_size", "hdim"),
    "_chunk_scan_bwd_dstates_kernel": ("hdim", "dstate"),
    "_chunk_scan_bwd_dc_kernel": ("chunk_size", "dstate"),
    "_chunk_scan_bwd_dcb_kernel": ("chunk_size", "chunk_size"),
    "_chunk_state_fwd_kernel": ("hdim", "dstate"),
    "_chunk_state_bwd_db_kernel": ("chunk_size", "dstate"),
    "_chunk_scan_chunk_state_bwd_dx_kernel": ("chunk_size", "hdim"),
}
"""Kernels of mamba-ssm: the arguments that BLOCK_SIZE_M and BLOCK_SIZE_N tile. In fla, BK tiles K and BV tiles V."""

Benchmark = Callable[..., list[float]]


def time_a_few(call: Callable[[], object], quantiles: Any = None) -> list[float]:
    call()
    spans = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    times_ms = [begin.elapsed_time(end) for begin, end in spans]
    return [statistics.median(times_ms), min(times_ms), max(times_ms)]


def call_once(call: Callable[[], object], quantiles: Any = None) -> list[float]:
    """Compiles the configuration, and says nothing of how fast it is."""
    call()
    return [0.0, 0.0, 0.0]


def worth_a_try(configs: list[Any], kernel: str, sizes: dict[str, Any]) -> list[Any]:
    """Those configurations for which no other covers the same matrix with a smaller tile."""
    block_m, block_n = TILES.get(kernel, ("", ""))
    tiled = {"BLOCK_SIZE_M": block_m, "BLOCK_SIZE_N": block_n, "BK": "K", "BV": "V"}

    def wasteful(config: Any) -> bool:
        return any(_covers_as_much(other, config) for other in configs)

    def _covers_as_much(other: Any, config: Any) -> bool:
        smaller = False
        for block, size in tiled.items():
            if block not in config.kwargs or sizes.get(size) is None:
                continue
            ours, theirs = config.kwargs[block], other.kwargs[block]
            if theirs > ours or (theirs < ours and theirs < sizes[size]):
                return False
            smaller |= theirs < ours
        return smaller

    return [config for config in configs if not wasteful(config)]


def tune_with(benchmark: Benchmark, most: int | None = None) -> None:
    """How every tuned kernel of this process chooses; `most` configurations at most, the first ones."""
    os.environ["FLA_CACHE_RESULTS"] = "0"
    os.environ["TRITON_CACHE_AUTOTUNING"] = "0"
    configs_of = Autotuner.prune_configs

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = worth_a_try(configs_of(self, kwargs), self.base_fn.__name__, {**self.nargs, **kwargs})
        return configs[:most]

    Autotuner.prune_configs = prune_configs
    Autotuner.do_bench = staticmethod(benchmark)
