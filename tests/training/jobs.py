"""Runs of the command line as jobs of one process or of several, looked at from outside."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start(
    processes: int, data: Path, output: Path, name: str, options: Sequence[str], restarts: int = 0
) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher += ["--max-restarts", str(restarts)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "ssd_torchrec", "train", "tim4rec"]
    command += ["--data.path", str(data), "--output", str(output), "--name", name, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed[-3000:]
    return printed


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def logged(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("events_per_s", "wall_s")} for line in lines]
