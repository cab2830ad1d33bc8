"""What each system still knows of events more than a thousand back, on the generated lifelong log.

    python -m benchmarks.lifelong [SYSTEM ...]      writes benchmarks/results/lifelong-cpu.md as it goes

Each is trained by the command line, in its small shape and on whole histories, and asked for the last item of every
user, which hangs on an event more than a thousand back (`ssd_torchrec/data/lifelong.py`). Where there is a GPU they
train on it, and the table is named after it. Systems already in the table are measured anew only if named.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import processor, slug
from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.lifelong import LifelongConfig
from ssd_torchrec.encoders.registry import SYSTEMS

RESULTS = Path(__file__).parent / "results"
LAW = LifelongConfig(num_users=1200, longest=4000)
CAUSAL = [name for name, system in SYSTEMS.items() if system.small.causal and name != "tisasrec"]
TRAINING = {"--training.epochs": "1", "--training.warmup-steps": "20", "--data.tokens-per-batch": "4096"}
TRAINING |= {"--sharding.optimizer": "adam", "--sharding.learning-rate": "0.01", "--dense.learning-rate": "0.002"}
TRAINING |= {"--training.decay": "constant"}


def train(system: str, data: Path, output: Path) -> dict:
    """Content of result.json."""
    longest = ["--encoder.max-length", str(LAW.longest)] if SYSTEMS[system].small.length_cap else []
    command = [sys.executable, "-m", "ssd_torchrec", "train", system, "--data.path", str(data), "--name", system]
    command += ["--output", str(output), *(word for option in TRAINING.items() for word in option), *longest]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / system / "result.json").read_text())


def line(system: str, result: dict) -> str:
    figures = [f"{result['test'][metric]:.3f}" for metric in ("hr@10", "ndcg@10", "mrr@10")]
    return f"| {system} | {' | '.join(figures)} |"


def head(machine: str) -> list[str]:
    law = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(LAW).items())
    training = " ".join(word for option in TRAINING.items() for word in option)
    chance = 10 / LAW.num_tokens
    return [
        "# Memory over a thousand events and more\n",
        f"Printed by `python -m benchmarks.lifelong`: {machine}. Law: {law}. Training: `{training}`.",
        "Test target: an item that follows from one event alone, more than 1,000 back. Whoever remembers has 1 in each",
        f"column; who knows only which kind of answer is due has {chance:.2f} in the first.\n",
        "| | hit rate at 10 | NDCG@10 | MRR@10 |",
        "|---|---|---|---|",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=CAUSAL, help=f"of {', '.join(CAUSAL)}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the table")
    asked = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    table = asked.output / f"lifelong-{slug(gpu) or 'cpu'}.md"
    heading = head(gpu or f"{processor()}, one thread")
    known = table.read_text().splitlines() if table.exists() else []
    lines = {text.split("|")[1].strip(): text for text in known if text.startswith("| ") and text not in heading}
    with tempfile.TemporaryDirectory() as scratch:
        generate(LAW, Path(scratch) / "data")
        for system in asked.systems:
            lines[system] = line(system, train(system, Path(scratch) / "data", Path(scratch)))
            print(lines[system], flush=True)
            asked.output.mkdir(parents=True, exist_ok=True)
            table.write_text("\n".join([*heading, *lines.values(), ""]))


if __name__ == "__main__":
    main()
