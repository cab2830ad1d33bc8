"""How good a preset gets on a public data set, and how long it takes, beside what is published.

    python -m benchmarks.quality tim4rec-ml-1m-64d ratings.dat --preset ml-1m
    python -m benchmarks.quality tim4rec-ml-1m-64d DIR --processes 1 -- --training.seed 1

Prepares the log, trains, writes the table. The log is what `ssd-torchrec prepare` takes, or a data set that it made;
words after -- go to `ssd-torchrec train`. Figures land in benchmarks/results/quality-PRESET.md, the run itself in the
output folder.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import processor
from ssd_torchrec.data.schema import CUTOFFS, META_FILE
from ssd_torchrec.training.tracking import read_metrics

RESULTS = Path(__file__).parent / "results"
CURVE_LINES = 16
SOURCE = "Fan et al. 2024, TiM4Rec, arXiv:2409.16182, table 3"
PUBLISHED = {
    "ml-1m": {
        "TiM4Rec": dict(hr=(0.3310, 0.4338, 0.5770), ndcg=(0.1932, 0.2194, 0.2477), mrr=(0.1512, 0.1584, 0.1629)),
        "SASRec": dict(hr=(0.3060, 0.4050, 0.5455), ndcg=(0.1754, 0.2005, 0.2285), mrr=(0.1357, 0.1425, 0.1471)),
        "GRU4Rec": dict(hr=(0.2985, 0.3937, 0.5397), ndcg=(0.1700, 0.1941, 0.2232), mrr=(0.1307, 0.1373, 0.1420)),
    },
    "beauty": {
        "TiM4Rec": dict(hr=(0.0854, 0.1204, 0.1800), ndcg=(0.0446, 0.0533, 0.0651), mrr=(0.0321, 0.0345, 0.0363)),
        "SASRec": dict(hr=(0.0851, 0.1194, 0.1759), ndcg=(0.0425, 0.0511, 0.0623), mrr=(0.0294, 0.0317, 0.0335)),
        "GRU4Rec": dict(hr=(0.0563, 0.0856, 0.1376), ndcg=(0.0297, 0.0371, 0.0473), mrr=(0.0210, 0.0230, 0.0246)),
    },
}


def prepared(log: Path, output: Path, words: list[str]) -> Path:
    """The data set of a log, made unless it is one."""
    if (log / META_FILE).is_file():
        return log
    folder = output / "data"
    command = [sys.executable, "-m", "ssd_torchrec", "prepare", str(log), "--output", str(folder), *words]
    subprocess.run(command, check=True)
    return folder


def train(preset: str, data: Path, output: Path, processes: int, words: list[str]) -> Path:
    """Train by the command line; the run's folder."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    job = [
        "-m",
        "ssd_torchrec",
        "train",
        preset,
        "--data.path",
        str(data),
        "--output",
        str(output),
        "--name",
        "quality",
    ]
    subprocess.run([sys.executable, *launcher, *job, *words], check=True)
    return output / "quality"


def scores_table(preset: str, result: dict[str, Any]) -> list[str]:
    """Test and validation figures, beside the published ones where the preset's data has some."""
    published = next((rows for name, rows in PUBLISHED.items() if name in preset), {})
    columns = ["ours, test", "ours, validation", "most popular, test", *(f"{name}, published" for name in published)]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for at, k in enumerate(CUTOFFS):
        for metric in ("hr", "ndcg", "mrr"):
            key = f"{metric}@{k}"
            ours = [result["test"][key], result["valid"][key], result["most_popular"]["test"][key]]
            figures = ours + [rows[metric][at] for rows in published.values()]
            lines.append(f"| {key.upper()} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |")
    return lines


def curve_table(run: Path) -> list[str]:
    """Validation NDCG@10 against wall time, some lines evenly spread and the last."""
    metrics = read_metrics(run)
    curve = [line for line in metrics if line["kind"] == "evaluation" and line["split"] == "valid"]
    epochs = json.loads((run / "config.json").read_text())["training"]["evaluate_every"]
    every = max(1, len(curve) // CURVE_LINES)
    lines = ["| epoch | step | seconds | validation NDCG@10 | HR@10 |", "|---|---|---|---|---|"]
    for number, line in enumerate(curve, 1):
        if number % every == 0 or number == len(curve):
            figures = f"{line['wall_s']:,.0f} | {line['ndcg@10']:.4f} | {line['hr@10']:.4f}"
            lines.append(f"| {number * epochs} | {line['step']:,} | {figures} |")
    return lines


def table(preset: str, run: Path) -> str:
    """What a finished run came to."""
    result = json.loads((run / "result.json").read_text())
    lines = [
        f"# {preset} on {result['data']}",
        "",
        f"Printed by `python -m benchmarks.quality {preset} LOG` on {processor()}, {result['world_size']} process(es), "
        f"torch {result['versions']['torch']}, torchrec {result['versions']['torchrec']}, seed {result['seed']}.",
        f"{result['epochs']} epochs of {result['epoch_s']:.1f} s and {result['train_events_per_s']:,.0f} events/s, "
        f"evaluations not counted; the best one, epoch {result['best_epoch']} by validation NDCG@10, is measured.",
        f"Full catalogue, leave-one-out, ties against the model. Published: {SOURCE}.",
        "",
        *scores_table(preset, result),
        "",
        "Learning curve, seconds with evaluations:",
        "",
        *curve_table(run),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="of ssd-torchrec train")
    parser.add_argument("log", type=Path, help="a raw log, or a data set")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    asked, prepare_words = parser.parse_known_args(words[:cut])
    output = asked.output / asked.preset
    data = prepared(asked.log, output, prepare_words)
    text = table(asked.preset, train(asked.preset, data, output, asked.processes, words[cut + 1 :]))
    print(text)
    (RESULTS / f"quality-{asked.preset}.md").write_text(text)


if __name__ == "__main__":
    main()
