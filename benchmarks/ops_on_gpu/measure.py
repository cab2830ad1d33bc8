"""Every contender on every problem, held against the definition first: one row of numbers each."""

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops_on_gpu.clock import Clock
from benchmarks.ops_on_gpu.contenders import Batch, Call, Tensors
from benchmarks.ops_on_gpu.problems import (
    CHECK_LENGTHS,
    CHECKED_AS,
    DTYPES,
    OPERATIONS,
    Problem,
    smaller,
    widened,
)
from benchmarks.ops_on_gpu.rows import Row, Rows
from ssd_torchrec.jagged import JaggedLayout

ALLOWED = {"fp32": 1e-2, "bf16": 5e-2}
"""Error, root mean square over that of the truth, from which on a contender is wrong: peers take tf32 for fp32."""

CEILING = "copy"


class DeviceLost(Exception):
    """The GPU answers no more in this process; another process finds it well."""


class Measurement:
    """Measures on one device and writes to `rows`."""

    def __init__(self, device: torch.device, rows: Rows, check_lengths: list[int] = CHECK_LENGTHS) -> None:
        self.device, self.rows, self.check_lengths = device, rows, check_lengths
        self.clock = Clock(device, patience_ms=20)
        self._truths: dict[str, dict[str, Tensor]] = {}
        self._inputs: tuple[str, tuple[Tensors, Batch]] | None = None
        if CEILING not in rows:
            rows.add(CEILING, {"bytes_per_s": self.clock.copied_bytes_per_s()})

    def run(self, key: str, problem: Problem, name: str, lengths: list[int]) -> Row:
        """Measure one contender on one problem; what it cannot do is a row with an `error`."""
        about = {"op": problem.op, "rows": problem.rows.name, "sizes": str(problem.sizes), "items": problem.items}
        about |= {"dtype": problem.dtype, "direction": problem.direction, "contender": name, "events": sum(lengths)}
        try:
            result = self._measured(problem, name, lengths)
        except torch.OutOfMemoryError:
            result = {"error": "out of memory"}
        except Exception as error:
            result = {"error": _one_line(error)}
        row = self.rows.add(key, {**about, **result})
        self._release(problem)
        return row

    def _measured(self, problem: Problem, name: str, lengths: list[int]) -> Row:
        operation = OPERATIONS[problem.op]
        call = operation.contenders[name](*self._made(problem, lengths))
        start = time.perf_counter()
        both_ways = call.both_ways()
        gradients = both_ways()
        first_s = time.perf_counter() - start
        error = self._checked(problem, name)
        if error:
            return {"error": error}
        kept_bytes = sum(g.nbytes for g in gradients)
        del gradients
        forward, both = self.clock.measure(call.forward), self.clock.measure(both_ways)
        result: Row = {"forward": asdict(forward), "both_ways": asdict(both), "first_s": first_s}
        result["beyond_gradients_bytes"] = self.clock.peak_bytes(both_ways) - kept_bytes
        if operation.numbers:
            numbers = operation.numbers(problem.sizes, problem.direction == "bidirectional")
            itemsize = DTYPES[problem.dtype].itemsize
            least = sum(lengths) * itemsize * numbers[0], sum(lengths) * itemsize * sum(numbers)
            for timing, least_bytes in zip((result["forward"], result["both_ways"]), least, strict=True):
                timing["bytes_per_s"] = least_bytes / (1e-3 * timing["device_ms"])
                timing["of_copy"] = timing["bytes_per_s"] / self.rows[CEILING]["bytes_per_s"]
                timing["ns_per_event"] = 1e6 * timing["device_ms"] / sum(lengths)
        return result

    def _made(self, problem: Problem, lengths: list[int]) -> tuple[Tensors, Batch]:
        """Inputs, kept for the next contender of the same problem."""
        if self._inputs is None or self._inputs[0] != problem.key:
            self._inputs = None
            self._inputs = (problem.key, OPERATIONS[problem.op].make(problem, lengths, self.device))
        return self._inputs[1]

    def _checked(self, problem: Problem, name: str) -> str | None:
        """Why the contender is wrong, if it is; tuned by now, it is checked as it will be timed."""
        name = CHECKED_AS.get(name, name)
        key = f"check | {problem.op} | {problem.what} | {name}"
        if key not in self.rows:
            try:
                result: Row = {"errors": self._errors(problem, name)}
            except Exception as error:
                result = {"error": _one_line(error)}
            self.rows.add(key, {"op": problem.op, "what": problem.what, "contender": name, **result})
        row = self.rows[key]
        if "error" in row:
            return f"cannot be checked: {row['error']}"
        worst = max(row["errors"], key=lambda of: _badness(row["errors"][of]))
        error = row["errors"][worst]
        return None if error <= ALLOWED[problem.dtype] else f"wrong: {worst} is off by {error:.1e}"

    def _errors(self, problem: Problem, name: str) -> dict[str, float]:
        """Of the output and of each gradient, root mean square over that of the truth."""
        operation, problem = OPERATIONS[problem.op], smaller(problem)
        tensors, batch = operation.make(problem, self.check_lengths, self.device)
        truth = self._truths.get(problem.key)
        if truth is None:
            wide = widened(tensors)
            on_cpu = Batch(batch.lengths, JaggedLayout.from_lengths(batch.lengths), batch.both)
            y = operation.definition(wide, on_cpu)
            wanted = [n for n in wide if wide[n].requires_grad]
            grads = torch.autograd.grad(y, [wide[n] for n in wanted], _cotangent(y))
            truth = {"output": y.detach(), **{n: g for n, g in zip(wanted, grads, strict=True)}}
            self._truths[problem.key] = truth
        call = operation.contenders[name](tensors, batch)
        got = {"output": call.unpack(call.forward())}
        gradients = call.both_ways(_cotangent(truth["output"]).to(self.device))()
        for of, gradient in zip(call.inputs, gradients, strict=True):
            got[of] = _unpacked(call, gradient, tensors[of])
        return {("" if of == "output" else "d") + of: _relative(got[of], truth[of]) for of in got}

    def _release(self, problem: Problem) -> None:
        if self.clock.on_gpu:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                raise DeviceLost(problem.key) from error


def _unpacked(call: Call, gradient: Tensor, like: Tensor) -> Tensor:
    return gradient if gradient.shape == like.shape else call.unpack(gradient)


def _cotangent(y: Tensor) -> Tensor:
    """Exact in every dtype."""
    return (torch.arange(y.numel()) % 5 - 1.5).to(y).view_as(y)


def _relative(got: Tensor, truth: Tensor) -> float:
    error = (got.detach().cpu().double() - truth).square().mean().sqrt()
    return float(error / truth.square().mean().sqrt())


def _badness(error: float) -> float:
    return error if error == error else float("inf")


def _one_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def progress(row: dict[str, Any]) -> str:
    """A row as it is printed while more are measured."""
    at = f"{row['op']:15} {row['rows']:27} {row['sizes'].split(',')[0]:13} {row['dtype']} {row['direction']:13}"
    if "error" in row:
        return f"{at} {row['contender']:30} {row['error']}"
    forward, both = row["forward"], row["both_ways"]
    times = f"{forward['device_ms']:8.3f} {both['device_ms']:8.3f} ms, calls {both['call_ms']:8.3f} ms"
    return f"{at} {row['contender']:30} {times} {100 * both.get('of_copy', 0):5.1f} %"
