"""How fast a raw log of 20 million lines becomes a data set, and in how much memory.

    python -m benchmarks.prepare        prints the table and writes benchmarks/results/prepare.md; takes a few minutes

The log is drawn by the database, skewed in users and items and with weak ones for the 5-core to take away. Each line of
the table is the command line in a process of its own, whose resident memory is watched from outside.
"""

import argparse
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import duckdb

from benchmarks.machine import processor

RESULTS = Path(__file__).parent / "results" / "prepare.md"
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """One prepare."""

    elapsed_s: float
    processor_s: float  # of all its threads
    peak_memory_gib: float
    printed: str


def write_log(file: Path, num_rows: int) -> None:
    """Lines user_id, item_id, timestamp in random order: users of 120 lines and items of 200 in the mean, both skewed,
    and 3 % of the lines by users and of items that are rare.
    """
    connection = duckdb.connect(config={"threads": 1, "memory_limit": "1GiB"})
    connection.execute("SET enable_progress_bar = false; SELECT setseed(0.5)")
    users, items, rare = num_rows // 120, num_rows // 200, num_rows // 60
    connection.execute(
        f"COPY (SELECT CASE WHEN random() < 0.03 THEN {users + 1} + {rare} * random() "
        f"ELSE 1 + {users} * pow(random(), 1.6) END::BIGINT AS user_id, "
        f"CASE WHEN random() < 0.03 THEN {items + 1} + {rare} * random() "
        f"ELSE 1 + {items} * pow(random(), 3) END::BIGINT AS item_id, "
        f"(1.2e9 + 1e8 * random())::BIGINT AS timestamp FROM range({num_rows})) TO '{file}'"
    )


def tree_memory(pid: int) -> int:
    """Bytes that a process and its children have resident, each at its highest so far; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return (1024 * int(peak[1]) if peak else 0) + sum(tree_memory(int(child)) for child in children)


def measure(words: list[str]) -> Measured:
    """Run the command line, looking at its memory twenty times a second."""
    start, before, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen([sys.executable, "-m", "ssd_torchrec", *words], stdout=printed, stderr=printed)
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.05)
        elapsed_s = time.monotonic() - start
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {text}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(elapsed_s, processor_s, peak / GIB, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", help="where the logs and data sets go for a while", default=None)
    asked = parser.parse_args()
    lines, printed, others = [], "", os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        for kind in ("csv", "parquet"):
            log, output = Path(scratch) / f"log.{kind}", Path(scratch) / "set"
            write_log(log, asked.rows)
            size = log.stat().st_size / GIB
            for order in ("int64", "float32-stable") if kind == "csv" else ("int64",):
                words = ["prepare", str(log), "--output", str(output), "--item", "item_id", "--order", order]
                took = measure(words)
                rate = asked.rows / took.elapsed_s
                cells = [kind, f"{size:.2f}", order, f"{took.elapsed_s:.1f}", f"{took.processor_s:.1f}", f"{rate:,.0f}"]
                lines.append(f"| {' | '.join(cells)} | {took.peak_memory_gib:.2f} |")
                printed = printed or took.printed.replace(f"{scratch}/", "")
            log.unlink()
    parts = [
        "# Raw log to data set\n",
        "Printed by `python -m benchmarks.prepare`.",
        f"{asked.rows:,} lines in random order, default options (5-core, `--memory-limit 1GiB`), duckdb "
        f"{duckdb.__version__}, {os.cpu_count()} cores of {processor() or platform.machine()}.",
        "Whole command with its start; peak resident memory of its processes together. Load of the machine before: "
        f"{others:.1f}.\n",
        "| log | GiB | order | s | processor s | lines/s | peak GiB |",
        "|---|---|---|---|---|---|---|",
        *lines,
        "\nWhat the first prints:\n",
        f"```\n{printed.rstrip()}\n```",
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(parts) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
