"""Kernels compiled by many processes at once, before one process times them: one alone would take many minutes."""

import multiprocessing
import time

import torch

from benchmarks.ops_on_gpu.problems import OPERATIONS, Problem
from benchmarks.ops_on_gpu.tuning import call_once, tune_with

FEW_ROWS = 64
"""Enough for the kernels of peers, which do not depend on how many rows there are; ours may."""

Task = tuple[str, list[Problem]]


def compile_ahead(todo: list[tuple[Problem, str]], processes: int, timeout_s: float) -> str:
    """Fill Triton's cache on disk; what fails or takes too long here shows later.

    Returns:
        What was done, for the log.
    """
    tasks: dict[tuple[str, str, str], Task] = {}
    for problem, name in todo:
        tasks.setdefault((problem.op, problem.what, name), (name, []))[1].append(problem)
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(processes, tune_with, (call_once,)) as pool:
        slowest_first = sorted(tasks.values(), key=lambda task: -_weight(task[0]))
        pending = [pool.apply_async(_compile, (task,)) for task in slowest_first]
        for result in pending:
            result.wait(max(0.0, start + timeout_s - time.monotonic()))
        done = sum(result.ready() for result in pending)
        pool.terminate()
    return f"compiled for {done} of {len(pending)} contenders in {time.monotonic() - start:.0f} s"


def _weight(name: str) -> int:
    return {"mamba-ssm, chunks of 256": 3, "mamba-ssm, chunks of 64": 2, "fla chunk": 2}.get(name, 1)


def _compile(task: Task) -> None:
    name, problems = task
    of_ours = name.startswith("ours")
    for problem in problems if of_ours else problems[:1]:
        operation = OPERATIONS[problem.op]
        lengths = problem.rows.lengths(None if of_ours else FEW_ROWS)
        try:
            operation.contenders[name](*operation.make(problem, lengths, torch.device("cuda"))).both_ways()()
        except Exception:
            return
        torch.cuda.empty_cache()
