"""A real log as clicks: what histories add to a DLRM, and which way of reading them.

    python -m benchmarks.clicks LOG.parquet --name ml-1m        writes benchmarks/results/clicks-ml-1m.md

The newest interactions of a log of user_id, item_id and timestamp are impressions that were taken, each beside one of
an item that its user has nowhere in the log, drawn from all items alike and shown at the same time. `prepare-ranking`
joins them with the histories as of then and splits them by time: 80 % train, 10 % choose the epoch, the newest 10 % are
tested. All models have the same tables of users and shown items, and the hour of the day; they differ in what becomes
of the history. *target*: the item shown is looked up in the history's table too.
"""

import argparse
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.encoders import RESULTS
from benchmarks.machine import processor
from ssd_torchrec.data.prepare.log import FilesConfig
from ssd_torchrec.data.ranking.prepare import prepare_ranking
from ssd_torchrec.data.ranking.prepare_config import PrepareRankingConfig
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig
from ssd_torchrec.encoders.ssd4rec import SSD4RecConfig
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.training.config import TrainingConfig
from ssd_torchrec.training.ranking_config import RankingDataConfig, RankingModelConfig, RankingRunConfig
from ssd_torchrec.training.ranking_run import train_ranking

WIDTH = 16
TIM4REC = TiM4RecConfig(width=WIDTH, layers=1, head_width=8, state=16, dropout=0.1, time_dropout=0.1)
SSD4REC = SSD4RecConfig(width=WIDTH, layers=1, head_width=8, state=16, dropout=0.1)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"model": RankingModelConfig(history="none")},
    "mean of the history": {"model": RankingModelConfig(history="mean")},
    "TiM4Rec": {"encoder": TIM4REC},
    "SSD4Rec": {"encoder": SSD4REC},
    "TiM4Rec, target": {"encoder": TIM4REC, "model": RankingModelConfig(target=True)},
    "SSD4Rec, target": {"encoder": SSD4REC, "model": RankingModelConfig(target=True)},
}
FIGURES = ("auc", "ne", "calibration")


def impressions(log: pa.Table, count: int, seed: int) -> pa.Table:
    """The newest `count` interactions, and as many items that their users have not."""
    rng = np.random.default_rng(seed)
    users, items, times = (log[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    user = np.unique(users, return_inverse=True)[1]
    catalogue, item = np.unique(items, return_inverse=True)
    had = np.unique(user.astype(np.int64) * len(catalogue) + item)
    newest = np.argsort(times, kind="stable")[-count:]
    drawn = rng.integers(len(catalogue), size=count)
    while (again := np.isin(user[newest] * len(catalogue) + drawn, had)).any():
        drawn[again] = rng.integers(len(catalogue), size=int(again.sum()))
    columns = {
        "user_id": np.concatenate([users[newest], users[newest]]),
        "item_id": np.concatenate([items[newest], catalogue[drawn]]),
        "timestamp": np.concatenate([times[newest], times[newest]]),
        "label": np.repeat([1, 0], count),
    }
    hour = 2 * np.pi * (columns["timestamp"] % 86_400) / 86_400
    columns |= {"user": columns["user_id"], "hour_sin": np.sin(hour), "hour_cos": np.cos(hour)}
    order = np.lexsort([rng.random(2 * count), columns["timestamp"]])
    return pa.table({name: values[order] for name, values in columns.items()})


def prepared(log: Path, folder: Path, asked: argparse.Namespace) -> Path:
    events = pq.read_table(log, columns=["user_id", "item_id", "timestamp"])
    shown, known = folder / "impressions.parquet", folder / "events.parquet"
    pq.write_table(impressions(events, asked.interactions, seed=0), shown)
    pq.write_table(events, known)
    config = PrepareRankingConfig(
        name=asked.name,
        max_history=asked.max_history,
        dense=("hour_sin", "hour_cos"),
        categorical=("user",),
        log=FilesConfig(),
    )
    prepare_ranking(shown, known, folder / "ranking", config)
    return folder / "ranking"


def run(data: Path, folder: Path, name: str, seed: int, epochs: int) -> dict[str, float]:
    """Figures of the test part."""
    torch.set_num_threads(1)
    config = RankingRunConfig(
        name=f"{name}-{seed}".replace(" ", "-").replace(",", ""),
        output=str(folder),
        encoder=TIM4REC,
        data=RankingDataConfig(path=str(data), rows_per_batch=512),
        sharding=ShardingConfig(optimizer="rowwise_adagrad", learning_rate=0.1),
        dense=DenseOptimizerConfig(learning_rate=2e-3, clip_norm=1.0),
        training=TrainingConfig(epochs=epochs, seed=seed, warmup_steps=20, keep_checkpoints=1),
    )
    return train_ranking(replace(config, **MODELS[name]), World())["test"]


def line(name: str, runs: list[dict[str, float]]) -> str:
    cells = []
    for figure in FIGURES:
        values = [of[figure] for of in runs]
        cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f}-{max(values):.4f})")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--name", required=True, help="of the data set, in the table and its file")
    parser.add_argument("--interactions", type=int, default=300_000, help="the newest, which are impressions")
    parser.add_argument("--max-history", type=int, default=50, help="events of a history at most, the newest")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="models whose name holds this, printed alone")
    parser.add_argument("--processes", type=int, default=1, help="models trained at a time, a thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the table")
    asked = parser.parse_args()
    lines = [
        f"# {asked.name} as clicks\n",
        f"Printed by `python -m benchmarks.clicks LOG --name {asked.name}`: {processor()}, one thread a model. "
        f"{asked.interactions:,} newest interactions and as many drawn non-interactions, histories of up to "
        f"{asked.max_history} events, {WIDTH} wide, epochs: {asked.epochs}, seeds: {asked.seeds}; mean, least to most. "
        "*target*: the item shown is looked up in the history's table too.\n",
        "| | AUC | normalised entropy | calibration |",
        "|---|---|---|---|",
    ]
    names = [name for name in MODELS if asked.only in name]
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(asked.processes, spawn) as pool:
        data = prepared(asked.log, Path(scratch), asked)
        of_all = {
            name: [pool.submit(run, data, Path(scratch), name, seed, asked.epochs) for seed in range(asked.seeds)]
            for name in names
        }
        for name, runs in of_all.items():
            lines.append(line(name, [of.result() for of in runs]))
            print(lines[-1], flush=True)
            if not asked.only:
                asked.output.joinpath(f"clicks-{asked.name}.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
