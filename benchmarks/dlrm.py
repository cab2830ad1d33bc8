"""What histories cost a DLRM: rows trained a second, plain and with histories, under both of TorchRec's pipelines.

    python -m benchmarks.dlrm                     the CPU; writes benchmarks/results/dlrm-cpu.md, some minutes
    python -m benchmarks.dlrm --device cuda

All contenders meet the same batches in turn, so that a busy machine slows all of them alike; figures are medians over
rounds. One process with a group of its own, tables split row_wise.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM

from benchmarks.encoders import RESULTS
from benchmarks.machine import processor, slug
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

WIDTH, ITEMS, DENSE = 64, 100_000, 13
ROWS = {"cpu": 64, "cuda": 1024}
"""Of a batch."""

MEAN_LENGTHS = (50, 200, 2000)
PIPELINES = {"TrainPipelineBase": TrainPipelineBase, "TrainPipelineSparseDist": TrainPipelineSparseDist}
ENCODER = TiM4RecConfig(width=WIDTH, layers=1, head_width=16, state=32, dropout=0.0, time_dropout=0.0)


def meta(longest: int) -> RankingMeta:
    categorical = {f"c{n}": 10_000 for n in range(8)}
    names = [f"d{n}" for n in range(DENSE)]
    described = {"longest": {"clicked": longest}, "num_rows": {}, "num_positives": {}}
    return RankingMeta(name="bench", dense=names, categorical=categorical, histories={"clicked": ITEMS}, **described)


def batch(mean_length: int, seed: int, rows: int) -> Batch:
    """Rows whose lengths are geometric about the mean, cut at four times it."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / mean_length, rows), 4 * mean_length)
    offsets, each = offsets_of(lengths), np.arange(rows + 1)
    jagged = {f"c{n}": Jagged(rng.integers(0, 10_000, rows), each) for n in range(8)}
    jagged["clicked"] = Jagged(rng.integers(0, ITEMS, offsets[-1]), offsets)
    jagged[times_of("clicked")] = Jagged(10**9 + rng.integers(1, 1000, offsets[-1]).cumsum(), offsets)
    dense = rng.normal(size=(rows, DENSE)).astype(np.float32)
    return RankingRows(rng.integers(0, 2, rows), np.zeros(rows, np.int64), dense, jagged).batch()


def build(encoder: Encoder | None, mean_length: int, world: World) -> Trainable:
    described = meta(4 * mean_length)
    bags, items = tables_for(described, WIDTH, "none")
    dlrm = DLRM(bags, DENSE, [128, WIDTH], [128, 64, 1])
    if encoder is not None:
        with_histories(dlrm, items, encoder, described)
    sharding = ShardingConfig(sharding="row_wise", optimizer="rowwise_adagrad")
    return shard(RankingModel(dlrm), sharding, DenseOptimizerConfig(), world, seed=0)


def median_s(steps: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of each, all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first is for warming up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(of) for name, of in seconds.items()}


def trained_by(kind: type, trainable: Trainable, batches: list[Batch], world: World) -> Callable[[], None]:
    def steps() -> None:
        feed = iter(batches)
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
    rows = ROWS[world.device.type]
    yield f"\nRows trained a second: {rows:,} a batch, 8 categorical and {DENSE} dense features, {WIDTH} wide.\n"
    yield f"| | {' | '.join(PIPELINES)} |\n|---|{'---|' * len(PIPELINES)}"
    for mean_length in (None, *MEAN_LENGTHS):
        length = mean_length or 50
        batches = [batch(length, seed, rows) for seed in range(4)]
        if world.device.type == "cuda":
            batches = [one.pin_memory() for one in batches]
        trainable = build(TiM4Rec(ENCODER) if mean_length else None, length, world)
        steps = {name: trained_by(kind, trainable, batches, world) for name, kind in PIPELINES.items()}
        seconds = median_s(steps, rounds, world.device)
        name = f"histories of mean length {mean_length:,}" if mean_length else "plain"
        speeds = [f"{len(batches) * rows / seconds[pipeline]:,.0f}" for pipeline in PIPELINES]
        yield f"| {name} | {' | '.join(speeds)} |"


def alone(
    encoder: Encoder, events: Tensor, timestamps: Tensor, layout: JaggedLayout, dtype: torch.dtype
) -> Callable[[], None]:
    parameters = list(encoder.parameters())

    def step() -> None:
        with torch.autocast(events.device.type, dtype, enabled=dtype != torch.float32):
            out = encoder(events, timestamps, layout)
        out.index_select(0, layout.last_event).float().sum().backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def encoders(device: torch.device, rounds: int) -> Iterator[str]:
    """Forward and backward of the encoders, one vector a row, at mean length 200."""
    longest, rows = 800, ROWS[device.type]
    features = batch(200, 0, rows).sparse_features.to(device)
    layout = JaggedLayout.from_lengths(features["clicked"].lengths().tolist(), device)
    events = torch.randn(layout.num_events, WIDTH, device=device)
    padded = Transformer(width=WIDTH, layers=1, heads=2, longest=longest, dropout=0.0, parts=PYTORCHS)
    contenders: dict[str, Encoder] = {"TiM4Rec": TiM4Rec(ENCODER), "transformer, padded, fused attention": padded}
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if device.type == "cuda" else {})
    yield f"Encoder alone, forward and backward: {rows:,} rows of mean length 200, cut at {longest}, one layer.\n"
    yield "| | | ms | |\n|---|---|---|---|"
    for kind, dtype in dtypes.items():
        given = events, features[times_of("clicked")].values(), layout, dtype
        steps = {name: alone(encoder.to(device), *given) for name, encoder in contenders.items()}
        seconds = median_s(steps, 4 * rounds, device)
        for name, median in seconds.items():
            yield f"| {kind} | {name} | {1000 * median:,.1f} | {median / seconds['TiM4Rec']:.2f}x |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the table")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = asked.device == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{processor()}, one thread"
    lines = ["# Histories in a DLRM\n", f"Printed by `python -m benchmarks.dlrm --device {asked.device}`: {machine}.\n"]
    print("\n".join(lines))
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    world = World(device=device, meeting_point=f"127.0.0.1:{20_000 + os.getpid() % 20_000}")
    table = asked.output / f"dlrm-{slug(machine) if on_gpu else 'cpu'}.md"
    asked.output.mkdir(parents=True, exist_ok=True)
    with process_group(world):
        for line in (*encoders(device, asked.rounds), *whole(world, asked.rounds)):
            print(line, flush=True)
            lines.append(line)
            table.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
