"""What the tiles of `ssd_torchrec/ops/item_softmax_triton.py` were chosen from: each, of each of its kernels, timed.

    python -m benchmarks.softmax_sizes --output DIR        on a GPU; a minute; writes DIR/softmax-sizes.jsonl as it goes

Kernels are compiled by many processes first. Times are medians, with nothing of the inputs in the cache. Each tile is
held against what PyTorch gives in fp64 for 1,000 queries and candidates; one that is wrong is named and not timed.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.ops_on_gpu.clock import Clock
from ssd_torchrec.ops import item_softmax_triton as kernels

WIDTH = 64
PROBLEMS = {"sampled": (65_536, 4096), "whole": (4096, 100_000)}
"""Queries and candidates."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TILES = {
    "fp32": list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))),
    "bf16": list(itertools.product((64, 128), (64, 128), (4, 8), (2, 3))),
}
"""Queries, candidates, warps and stages of a program."""
TABLES = {"forward": "_FORWARD", "dqueries": "_DQUERIES", "dcandidates": "_DCANDIDATES"}


def calls(dtype: str, queries: int, candidates: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each kernel on its own, with log_q, as the sampled softmax has it."""
    draw = torch.Generator(device).manual_seed(0)
    left = torch.randn(queries, WIDTH, generator=draw, device=device).to(DTYPES[dtype])
    right = (0.3 * torch.randn(candidates, WIDTH, generator=draw, device=device)).to(DTYPES[dtype])
    target = torch.randint(0, candidates, (queries,), generator=draw, device=device)
    log_q = torch.zeros(candidates, device=device)
    dloss = torch.full((queries,), 1 / queries, device=device)
    log_sum_exp = torch.full((queries,), 10.0, device=device)
    ops = torch.ops.ssd_torchrec
    return {
        "forward": lambda: ops.item_softmax(left, right, target, log_q, None),
        "dqueries": lambda: ops.item_softmax_dqueries(dloss, left, right, target, log_q, None, log_sum_exp),
        "dcandidates": lambda: ops.item_softmax_dcandidates(dloss, left, right, target, log_q, None, log_sum_exp),
    }


ALLOWED = {"fp32": 1e-5, "bf16": 1e-2}
"""Error of a result, root mean square over that of the truth."""


def errors(dtype: str, device: torch.device) -> Callable[[str], float]:
    """How far off each kernel is, as it is chosen when called."""
    queries, candidates = 1000, 1003
    runs = calls(dtype, queries, candidates, device)
    draw = torch.Generator(device).manual_seed(0)
    left = torch.randn(queries, WIDTH, generator=draw, device=device).to(DTYPES[dtype]).double()
    right = (0.3 * torch.randn(candidates, WIDTH, generator=draw, device=device)).to(DTYPES[dtype]).double()
    target = torch.randint(0, candidates, (queries,), generator=draw, device=device)
    logits = left @ right.T
    dlogits = (logits - 10.0).exp()
    dlogits[torch.arange(queries, device=device), target] -= 1
    dlogits /= queries
    truth = {
        "forward": torch.nn.functional.cross_entropy(logits, target, reduction="none"),
        "dqueries": dlogits @ right,
        "dcandidates": dlogits.T @ left,
    }

    def error(name: str) -> float:
        got = runs[name]()
        got = got[0] if isinstance(got, tuple) else got
        assert isinstance(got, torch.Tensor)
        return float((got.double() - truth[name]).square().mean().sqrt() / truth[name].square().mean().sqrt())

    return error


def with_tile(name: str, dtype: str, tile: tuple[int, ...]):
    return patch.dict(getattr(kernels, TABLES[name]), {dtype: {WIDTH: kernels._Tile(*tile)}})


def compile_one(task: tuple[str, str, tuple[int, ...]]) -> None:
    name, dtype, tile = task
    try:
        with with_tile(name, dtype, tile):
            calls(dtype, 256, 256, torch.device("cuda"))[name]()
        torch.cuda.synchronize()
    except Exception as error:
        print(task, str(error)[:100], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=14)
    asked = parser.parse_args()
    tasks = [(name, dtype, tile) for dtype in DTYPES for tile in TILES[dtype] for name in TABLES]
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        pool.map(compile_one, tasks, chunksize=1)
    print(f"compiled {len(tasks)} in {time.monotonic() - start:.0f} s", flush=True)
    asked.output.mkdir(parents=True, exist_ok=True)
    with (asked.output / "softmax-sizes.jsonl").open("a") as file:
        for (problem, counts), dtype in itertools.product(PROBLEMS.items(), DTYPES):
            for line in measured(dtype, calls(dtype, *counts, torch.device("cuda"))):
                file.write(json.dumps({"problem": problem, "dtype": dtype, **line}) + "\n")
                file.flush()


def measured(dtype: str, runs: dict[str, Callable[[], object]]) -> list[dict]:
    """The chosen tile first, then all others; the best are printed."""
    clock, lines = Clock(torch.device("cuda"), patience_ms=10), []
    off_by = errors(dtype, torch.device("cuda"))
    for name, run in runs.items():
        chosen = tuple(getattr(kernels, TABLES[name])[dtype][WIDTH])
        for tile in (chosen, *TILES[dtype]):
            try:
                with with_tile(name, dtype, tile):
                    off = off_by(name)
                    if not off <= ALLOWED[dtype]:
                        print(f"{name} {dtype} {tile} is wrong: off by {off:.1e}", flush=True)
                        continue
                    lines.append({"kernel": name, "tile": tile, "ms": clock.measure(run).device_ms, "error": off})
            except Exception as error:
                print(name, dtype, tile, str(error)[:100], flush=True)
        of_kernel = [line for line in lines if line["kernel"] == name]
        best = sorted(of_kernel, key=lambda line: line["ms"])[:4]
        shown = ", ".join(f"{line['ms']:.3f} {line['tile']}" for line in (of_kernel[0], *best))
        print(f"{dtype} {name}: ms, chosen then best: {shown}", flush=True)
    return lines


if __name__ == "__main__":
    main()
