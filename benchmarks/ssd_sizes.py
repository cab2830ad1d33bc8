"""What the sizes of `ssd_torchrec/ops/ssd_sizes.py` were chosen from: each chunk, warps and split of heads, timed.

    python -m benchmarks.ssd_sizes --output DIR        on a GPU; a few minutes; writes DIR/ssd-sizes.jsonl as it goes

Kernels are compiled by many processes first. Times are medians, with nothing of the inputs in the cache.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.ops_on_gpu.clock import Clock
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops import ssd_triton
from ssd_torchrec.ops.ssd_sizes import Problem, Sizes, sizes_of

ROWS = {"mean 9": (2048, 5, 4), "mean 47": (2048, 5, 43), "mean 165": (2048, 20, 400), "2k": (64, 2000, 0)}
"""Rows, events of the shortest, scale of an exponential beyond them; at most 200 but for the last."""
WIDTHS = {"H4 P32 N32": (4, 32, 32), "H32 P16 N64": (32, 16, 64)}
WANTED = (
    ("H4 P32 N32", torch.bfloat16, 1),
    ("H4 P32 N32", torch.bfloat16, 2),
    ("H4 P32 N32", torch.float32, 1),
    ("H32 P16 N64", torch.bfloat16, 1),
)
CHUNKS = {16: (1, 2), 32: (1, 2, 4)}
"""Warps that are tried for each chunk."""


@dataclasses.dataclass(frozen=True)
class Case:
    rows: str
    widths: str
    dtype: torch.dtype
    directions: int

    def lengths(self, fewer: bool = False) -> Tensor:
        rows, shortest, scale = ROWS[self.rows]
        beyond = -torch.rand(64 if fewer else rows, generator=torch.Generator().manual_seed(0)).log() * scale
        return (shortest + beyond).long().clamp(max=max(200, shortest))


@dataclasses.dataclass(frozen=True)
class Trial:
    chunk: int
    warps: int
    split: int
    carry_warps: int

    def sizes(self, problem: Problem, *, backward: bool, chunk: int = 0, piece: int = 0) -> Sizes:
        sizes = sizes_of(problem, backward=backward, chunk=self.chunk, piece=piece)
        heads = max(1, problem.heads // problem.groups // self.split)
        return dataclasses.replace(sizes, heads=heads, warps=self.warps, carry_warps=self.carry_warps)


def trials(case: Case) -> Iterator[Trial]:
    for chunk, warps in CHUNKS.items():
        for number, split in itertools.product(warps, (1, 4) if case.dtype == torch.bfloat16 else (1,)):
            for carry_warps in (2, 4) if number == warps[-1] and split == 1 else (4,):
                yield Trial(chunk, number, split, carry_warps)


def calls(case: Case, lengths: Tensor, device: torch.device):
    """Forward, and backward of the same inputs."""
    H, P, N = WIDTHS[case.widths]
    layout = JaggedLayout.from_lengths(lengths, device)
    rng = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(dtype)

    T, way = layout.num_events, case.directions
    x, B, C, dy = (
        normal(T, H, P, dtype=case.dtype),
        normal(T, 1, N, dtype=case.dtype),
        normal(T, 1, N, dtype=case.dtype),
        normal(T, H, P, dtype=case.dtype),
    )
    dt, bias, D = normal(T, way * H), normal(way * H) - 3, normal(H)
    A = -1 - 15 * torch.rand(way * H, generator=rng, device=device)
    tail = (layout.longest, True, way == 2)
    none = dy.new_empty(0, dtype=torch.float32)
    ops = torch.ops.ssd_torchrec

    def forward() -> object:
        return ops.ssd_scan(x, dt, A, B, C, layout.offsets, bias, D, None, None, *tail, False, False, 0, 0)

    def backward() -> object:
        return ops.ssd_scan_backward(dy, none, x, dt, A, B, C, layout.offsets, bias, D, None, *tail, 0, 0)

    return {"forward": forward, "backward": backward}


def compile_one(task: tuple[Case, Trial]) -> None:
    case, trial = task
    lengths = case.lengths(fewer=True)
    lengths[0] = max(int(lengths.max()), int(case.lengths().max()))  # the same kernels as with all rows
    with patch.object(ssd_triton, "sizes_of", trial.sizes):
        for run in calls(case, lengths, torch.device("cuda")).values():
            try:
                run()
                torch.cuda.synchronize()
            except Exception as error:
                print(case, trial, str(error)[:200], flush=True)
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose description holds this")
    parser.add_argument("--processes", type=int, default=14)
    arguments = parser.parse_args()
    cases = [
        Case(rows, widths, dtype, directions)
        for (widths, dtype, directions), rows in itertools.product(WANTED, ROWS)
        if arguments.only in f"{rows} {widths} {dtype} {directions}"
    ]
    tasks = [(case, trial) for case in cases for trial in trials(case)]
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        pool.map(compile_one, tasks, chunksize=1)
    print(f"compiled {len(tasks)} in {time.monotonic() - start:.0f} s", flush=True)
    clock = Clock(torch.device("cuda"), patience_ms=12)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "ssd-sizes.jsonl").open("a") as file:
        for case in cases:
            runs = calls(case, case.lengths(), torch.device("cuda"))
            best: dict[str, list[tuple[float, Trial]]] = {name: [] for name in runs}
            for trial in trials(case):
                with patch.object(ssd_triton, "sizes_of", trial.sizes):
                    for name, run in runs.items():
                        try:
                            taken_ms = clock.measure(run).device_ms
                        except Exception as error:
                            print(case, trial, name, str(error)[:200], flush=True)
                            continue
                        best[name].append((taken_ms, trial))
                        row = {"case": repr(case), "pass": name, **dataclasses.asdict(trial), "ms": taken_ms}
                        file.write(json.dumps(row) + "\n")
                        file.flush()
            for name, taken in best.items():
                taken.sort(key=lambda pair: pair[0])
                shown = ", ".join(
                    f"{1e3 * ms:.0f} (Q{t.chunk} w{t.warps} s{t.split} c{t.carry_warps})" for ms, t in taken[:4]
                )
                print(
                    f"{case.widths} {str(case.dtype)[6:]} {case.rows} x{case.directions} {name}: us {shown}", flush=True
                )


if __name__ == "__main__":
    main()
