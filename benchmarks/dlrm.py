"""What histories cost a DLRM: rows trained a second, plain and with histories, under both of TorchRec's pipelines.

    python -m benchmarks.dlrm        prints the tables and writes benchmarks/results/dlrm-cpu.md; some minutes

All contenders meet the same batches in turn, so that a busy machine slows all of them alike; figures are medians over
rounds. One process with a group of its own, tables split row_wise, one thread.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM

from benchmarks.machine import processor
from benchmarks.peers import PYTORCHS, Transformer
from ssd_torchrec.data.ranking.rows import RankingRows
from ssd_torchrec.data.ranking.schema import RankingMeta, times_of
from ssd_torchrec.data.rows import Jagged, offsets_of
from ssd_torchrec.distributed.process import World, process_group
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig, Trainable, shard
from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.encoders.tim4rec import TiM4Rec, TiM4RecConfig
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.ranking import RankingModel, tables_for, with_histories

RESULTS = Path(__file__).parent / "results" / "dlrm-cpu.md"
WIDTH, ROWS, ITEMS, DENSE = 64, 64, 100_000, 13
MEAN_LENGTHS = (50, 200, 2000)
PIPELINES = {"TrainPipelineBase": TrainPipelineBase, "TrainPipelineSparseDist": TrainPipelineSparseDist}
ENCODER = TiM4RecConfig(width=WIDTH, layers=1, head_width=16, state=32, dropout=0.0, time_dropout=0.0)


def meta(longest: int) -> RankingMeta:
    categorical = {f"c{n}": 10_000 for n in range(8)}
    names = [f"d{n}" for n in range(DENSE)]
    described = {"longest": {"clicked": longest}, "num_rows": {}, "num_positives": {}}
    return RankingMeta(name="bench", dense=names, categorical=categorical, histories={"clicked": ITEMS}, **described)


def batch(mean_length: int, seed: int) -> Batch:
    """Rows whose lengths are geometric about the mean, cut at four times it."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / mean_length, ROWS), 4 * mean_length)
    offsets, each = offsets_of(lengths), np.arange(ROWS + 1)
    jagged = {f"c{n}": Jagged(rng.integers(0, 10_000, ROWS), each) for n in range(8)}
    jagged["clicked"] = Jagged(rng.integers(0, ITEMS, offsets[-1]), offsets)
    jagged[times_of("clicked")] = Jagged(10**9 + rng.integers(1, 1000, offsets[-1]).cumsum(), offsets)
    dense = rng.normal(size=(ROWS, DENSE)).astype(np.float32)
    return RankingRows(rng.integers(0, 2, ROWS), np.zeros(ROWS, np.int64), dense, jagged).batch()


def build(encoder: Encoder | None, mean_length: int, world: World) -> Trainable:
    described = meta(4 * mean_length)
    bags, items = tables_for(described, WIDTH, "none")
    dlrm = DLRM(bags, DENSE, [128, WIDTH], [128, 64, 1])
    if encoder is not None:
        with_histories(dlrm, items, encoder, described)
    sharding = ShardingConfig(sharding="row_wise", optimizer="rowwise_adagrad")
    return shard(RankingModel(dlrm), sharding, DenseOptimizerConfig(), world, seed=0)


def rows_per_s(
    steps: dict[str, Callable[[Iterator[Batch]], None]], batches: list[Batch], rounds: int
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step(iter(batches))
            if number:  # the first is for warming up
                seconds[name].append(time.perf_counter() - began)
    return {name: len(batches) * ROWS / statistics.median(of) for name, of in seconds.items()}


def trained_by(kind: type, trainable: Trainable, world: World) -> Callable[[Iterator[Batch]], None]:
    def steps(feed: Iterator[Batch]) -> None:
        pipeline = kind(trainable.model, trainable.optimizer, world.device)
        while True:
            try:
                pipeline.progress(feed)
            except StopIteration:
                break
        if hasattr(pipeline, "detach"):
            pipeline.detach()

    return steps


def whole(world: World, rounds: int) -> Iterator[str]:
    yield f"Rows trained a second: 8 categorical and {DENSE} dense features, {WIDTH} wide, batches of {ROWS} rows.\n"
    yield f"| | {' | '.join(PIPELINES)} |\n|---|{'---|' * len(PIPELINES)}"
    for mean_length in (None, *MEAN_LENGTHS):
        length = mean_length or 50
        batches = [batch(length, seed) for seed in range(4)]
        trainable = build(TiM4Rec(ENCODER) if mean_length else None, length, world)
        steps = {name: trained_by(kind, trainable, world) for name, kind in PIPELINES.items()}
        speeds = rows_per_s(steps, batches, rounds)
        name = f"histories of mean length {mean_length:,}" if mean_length else "plain"
        yield f"| {name} | {' | '.join(f'{speeds[pipeline]:,.0f}' for pipeline in PIPELINES)} |"


def alone(encoder: Encoder, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Callable[[], None]:
    def step() -> None:
        encoder(events, timestamps, layout)[layout.last_event].sum().backward()

    return step


def encoders(rounds: int) -> Iterator[str]:
    """Forward and backward of the encoders, one vector a row, at mean length 200."""
    longest = 800
    rows = batch(200, 0).sparse_features
    lengths, timestamps = rows["clicked"].lengths(), rows[times_of("clicked")].values()
    layout = JaggedLayout.from_lengths(lengths)
    events = torch.randn(layout.num_events, WIDTH)
    padded = Transformer(width=WIDTH, layers=1, heads=2, longest=longest, dropout=0.0, parts=PYTORCHS)
    contenders: dict[str, nn.Module] = {"TiM4Rec": TiM4Rec(ENCODER), "transformer, padded, fused attention": padded}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, encoder in contenders.items():
            step = alone(encoder, events, timestamps, layout)  # type: ignore[arg-type]
            began = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - began)
    yield f"\nEncoder alone, forward and backward: {ROWS} rows of mean length 200, cut at {longest}, one layer.\n"
    yield "| | ms | |\n|---|---|---|"
    ours = statistics.median(seconds["TiM4Rec"])
    for name, of in seconds.items():
        median = statistics.median(of)
        yield f"| {name} | {1000 * median:,.0f} | {median / ours:.2f}x |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["# Histories in a DLRM\n", f"Printed by `python -m benchmarks.dlrm`: {processor()}, one thread.\n"]
    print("\n".join(lines))
    world = World(meeting_point=f"127.0.0.1:{20_000 + os.getpid() % 20_000}")
    with process_group(world):
        for line in (*whole(world, asked.rounds), *encoders(asked.rounds)):
            print(line, flush=True)
            lines.append(line)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
