"""What only a GPU can show, in parts of a few minutes each: tests of the kernels, and how fast they are.

    make gpu-check                                          all parts, results in benchmarks/results
    make gpu-check PYTHON=python3 PART=ops OUTPUT=out       one part, with an interpreter as it is
    make gpu-check PART=tests BUDGET_S=200                  stop after 200 seconds; a part alone stops after 420

A part that stops at its budget has written what it saw; run again, it goes on from there, but for those of models,
which begin anew with their kernels compiled. Tests that passed are in NAME.jsonl and pytest's words in NAME.log. Exit
code 1: a test failed or a benchmark broke; 3: time is up, more to do.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.ops import LOST, RESULTS, STOPPED

ROOT = Path(__file__).parents[1]
BUDGET_S = 420
GRACE_S = 20
"""From asking a child to end until it is ended."""
MOST_LOSSES = 5
"""Times a benchmark may lose the GPU to a failed kernel before it is given up."""

SELFTEST = ["tests/test_on_gpu.py", "tests/ops/test_gpu.py"]
"""What runs on a GPU alone."""

OF_KERNELS = ["tests/ops", "tests/modules", "tests/encoders"]
NEED_DUCKDB = "tests/data/prepare"


def run(command: list[str], log: Path, budget_s: float) -> int | None:
    """Run a command, its words on the screen and at the end of `log`.

    Returns:
        Its exit code, or None if the budget ended before it did.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    log.parent.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    late = threading.Event()

    def end(how: signal.Signals) -> None:
        late.set()
        child.send_signal(how)

    timers = [
        threading.Timer(s, end, [how]) for s, how in ((budget_s, signal.SIGINT), (budget_s + GRACE_S, signal.SIGKILL))
    ]
    for timer in timers if budget_s < float("inf") else []:
        timer.daemon = True
        timer.start()
    assert child.stdout is not None
    with log.open("a") as file:
        for line in child.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
    code = child.wait()
    for timer in timers:
        timer.cancel()
    return None if late.is_set() else code


def run_tests(name: str, wanted: list[str], output: Path, budget_s: float) -> int:
    """Those tests that did not pass before."""
    outcomes = output / f"{name}.jsonl"
    done = _done(outcomes)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as leave_out:
        json.dump(sorted(done), leave_out)
        leave_out.flush()
        command = [sys.executable, "-m", "pytest", *wanted, "-q", "-rfE", "--durations=10", "-m", "slow or not slow"]
        command += ["-p", "no:cacheprovider", "-p", "benchmarks.outcomes"]
        command += ["--outcomes", str(outcomes.resolve()), "--leave-out", leave_out.name]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "loadgroup"]
        code = run(command, output / f"{name}.log", budget_s)
    if code is None:
        return STOPPED
    everything_was_done = code == 5 and bool(done)  # pytest's code for no test at all
    return 0 if code == 0 or everything_was_done else 1


def _done(outcomes: Path) -> set[str]:
    lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    ended = [json.loads(line) for line in lines if line.endswith("}")]
    return {test["test"] for test in ended if test["outcome"] != "failed"}


def kernels(output: Path, budget_s: float) -> int:
    return run_tests("tests", [*OF_KERNELS, *(f"--ignore={file}" for file in SELFTEST)], output, budget_s)


def selftest(output: Path, budget_s: float) -> int:
    return run_tests("selftest", SELFTEST, output, budget_s)


def ops(output: Path, budget_s: float, *parts: str) -> int:
    deadline = time.monotonic() + budget_s
    for _ in range(MOST_LOSSES):
        left_s = deadline - time.monotonic()
        command = [sys.executable, "-m", "benchmarks.ops", "--output", str(output.resolve())]
        command += ["--budget-s", str(left_s), *(word for part in parts for word in ("--part", part))]
        code = run(command, output / "ops.log", left_s + GRACE_S)
        if code != LOST:
            return STOPPED if code is None else code
    return 1


MODELS = {
    "encoders": ["benchmarks.encoders", "--device", "cuda"],
    "dlrm": ["benchmarks.dlrm", "--device", "cuda"],
    "scale": ["benchmarks.scale_gpu"],
    "lifelong": ["benchmarks.lifelong"],
}
"""Benchmarks that write a table as they go."""


def model(name: str, output: Path, budget_s: float) -> int:
    code = run(
        [sys.executable, "-m", *MODELS[name], "--output", str(output.resolve())], output / f"{name}.log", budget_s
    )
    return STOPPED if code is None else code


def where(output: Path, budget_s: float) -> int:
    code = run([sys.executable, "-m", "benchmarks.step_profile"], output / "profile.log", budget_s)
    return STOPPED if code is None else code


def rest(output: Path, budget_s: float) -> int:
    wanted = ["tests", *(f"--ignore={path}" for path in (*OF_KERNELS, *SELFTEST))]
    if importlib.util.find_spec("duckdb") is None:
        wanted.append(f"--ignore={NEED_DUCKDB}")
    return run_tests("rest", wanted, output, budget_s)


PARTS: dict[str, Callable[..., int]] = {"tests": kernels, "selftest": selftest, "ops": ops}
PARTS |= {name: partial(model, name) for name in MODELS} | {"profile": where, "rest": rest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help=f"one of {', '.join(PARTS)}, or ops:OPERATOR; all in turn if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for results and logs")
    parser.add_argument("--budget-s", type=float, help="seconds after which a part stops; 420 for a part alone")
    options = parser.parse_args()
    part, _, operator = (options.part or "").partition(":")
    if (part and part not in PARTS) or (operator and part != "ops"):
        parser.error(f"--part must be one of {', '.join(PARTS)}, or ops:OPERATOR, got {options.part}")
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a GPU that torch can use; see ssd-torchrec doctor", file=sys.stderr)
        return 1
    budget_s = options.budget_s or (BUDGET_S if part else float("inf"))
    ends = {}
    for name in [part] if part else PARTS:
        start = time.monotonic()
        code = PARTS[name](options.output, budget_s, *filter(None, [operator]))
        ends[f"{name}, {time.monotonic() - start:.0f} s"] = code
    words = {0: "done", STOPPED: "time is up; run again to go on"}
    for name, code in ends.items():
        print(f"gpu-check {name}: {words.get(code, 'FAILED')}")
    return next((code for code in ends.values() if code not in words), max(ends.values()))


if __name__ == "__main__":
    sys.exit(main())
