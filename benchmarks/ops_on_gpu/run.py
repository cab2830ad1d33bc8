"""The operators on a GPU, ours beside the peers: rows are written as they are measured, and the table from the rows."""

import os
import time
from pathlib import Path

import torch

from benchmarks.machine import slug
from benchmarks.ops_on_gpu.ahead import compile_ahead
from benchmarks.ops_on_gpu.measure import Measurement, progress
from benchmarks.ops_on_gpu.problems import CHECK_LENGTHS, JAGGED, LONG, OPERATIONS, WIDE, Problem
from benchmarks.ops_on_gpu.rows import Rows
from benchmarks.ops_on_gpu.table import tables
from benchmarks.ops_on_gpu.tuning import call_once, time_a_few, tune_with

REHEARSED = {JAGGED[-1].name: [20, 3, 9], LONG[0].name: [40, 40]}
"""Lengths of the rows when this is rehearsed on the CPU, in Triton's interpreter."""


def key_of(problem: Problem, name: str) -> str:
    return f"{problem.key} | {name}"


def main(output: Path, parts: list[str], budget_s: float, rehearse: bool) -> bool:
    """Measure what is not measured yet.

    Args:
        output: folder of the results.
        parts: operations, by name; all if none.
        budget_s: when to stop, rows being complete.
        rehearse: tiny shapes, on the CPU.

    Returns:
        Whether all is measured.
    """
    deadline = time.monotonic() + budget_s
    device = torch.device("cpu" if rehearse else "cuda")
    tune_with(call_once if rehearse else time_a_few, most=1 if rehearse else None)
    gpu = "rehearsal" if rehearse else torch.cuda.get_device_name()
    rows = Rows(output / f"ops-{slug(gpu)}.jsonl")
    todo = [pair for pair in _all(parts, rehearse) if key_of(*pair) not in rows]
    if todo and not rehearse:
        print(compile_ahead(todo, (os.cpu_count() or 2) - 1, timeout_s=budget_s / 3), flush=True)
    measurement = Measurement(device, rows, [20, 3, 1, 8] if rehearse else CHECK_LENGTHS)
    try:
        for problem, name in todo:
            if time.monotonic() > deadline:
                print(f"stopped after {budget_s:.0f} s; run again to go on")
                return False
            lengths = REHEARSED.get(problem.rows.name, [64]) if rehearse else problem.rows.lengths()
            print(progress(measurement.run(key_of(problem, name), problem, name, lengths)), flush=True)
    finally:
        table = output / f"ops-{slug(gpu)}.md"
        table.write_text(tables(rows, gpu))
    print(table.read_text())
    return True


def _all(parts: list[str], rehearse: bool) -> list[tuple[Problem, str]]:
    pairs = []
    for op, operation in OPERATIONS.items():
        for problem in operation.problems if not parts or op in parts else []:
            pairs += [(problem, name) for name in operation.contenders if operation.can(name, problem)]
    return [pair for pair in pairs if _rehearsed(*pair)] if rehearse else pairs


def _rehearsed(problem: Problem, name: str) -> bool:
    """bf16 is left out, of which the interpreter makes garbage, and what takes it many minutes."""
    few = problem.rows.name in REHEARSED or 0 < problem.items <= 10_000
    quick = problem.sizes != WIDE or (problem.rows in JAGGED and not name.startswith("mamba-ssm"))
    return problem.dtype == "fp32" and few and quick
