"""How fast the operators are, ours beside what one would take without them.

    python -m benchmarks.ops        prints the tables and writes them to benchmarks/results

Without a GPU: one CPU thread, forward and backward, to ops-cpu.md; `ops_cpu.py` says what is compared.
With one: to ops-NAME-OF-THE-GPU.md, and every figure to a .jsonl beside it as soon as it is measured: what is in there
is not measured again. The peers are mamba-ssm and fla-core where they are installed, and PyTorch.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
STOPPED, LOST = 3, 4
"""Exit codes: time is up and rows are left; the GPU was lost to a failed kernel and another process must go on."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--part", action="append", default=[], help="an operator to measure on the GPU; may be repeated"
    )
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds after which to stop")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is imported
    elif not torch.cuda.is_available():
        from benchmarks import ops_cpu

        ops_cpu.main(options.output)
        return 0
    from benchmarks.ops_on_gpu import run
    from benchmarks.ops_on_gpu.measure import DeviceLost

    try:
        return 0 if run.main(options.output, options.part, options.budget_s, options.rehearse) else STOPPED
    except DeviceLost:
        return LOST


if __name__ == "__main__":
    sys.exit(main())
