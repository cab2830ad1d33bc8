"""What a hundred million items cost one GPU: time and memory of a step, by optimizer, place and pipeline.

    python -m benchmarks.scale_gpu        writes benchmarks/results/scale-GPU.md; about two minutes

TiM4Rec in its small shape (64 wide, fp32) on rows of 128 events, table row_wise on NCCL with one process. Batches lie
on the host, as a loader leaves them. First values are drawn on the GPU here: drawing them as a run does, the same for
any number of ranks, takes a minute.
"""

import argparse
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from benchmarks.encoders import RESULTS
from benchmarks.machine import slug
from benchmarks.scale import FIRST_ITEM, Case, batch, build
from ssd_torchrec.distributed.process import World, process_group
from ssd_torchrec.distributed.shard import ShardingConfig, Trainable
from ssd_torchrec.distributed.tables import local_pieces
from ssd_torchrec.errors import ConfigError

PIPELINES = {"SparseDist": TrainPipelineSparseDist, "Base": TrainPipelineBase}
WARM_UP = 5
BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table."""

    case: Case
    optimizer: str = "rowwise_adagrad"
    compute_kernel: str = "fused"
    pipeline: str = "SparseDist"

    @property
    def named(self) -> str:
        where = f"{self.optimizer} | {self.compute_kernel} | {self.pipeline}"
        return f"{self.case.loss} | {self.case.items:,} | {where} | {self.case.tokens:,}"

    def sharding(self) -> ShardingConfig:
        return ShardingConfig(
            sharding="row_wise",
            optimizer=self.optimizer,  # type: ignore[arg-type]
            compute_kernel=self.compute_kernel,  # type: ignore[arg-type]
        )


def lines(items: int, tokens: int) -> list[Line]:
    large = Case(loss="sampled", items=items, tokens=tokens, rounds=30)
    exact = Case(loss="in place", items=items // 100, tokens=4096, rounds=5)
    return [
        Line(case=large),
        Line(case=large, pipeline="Base"),
        Line(case=large, optimizer="adam"),
        Line(case=large, compute_kernel="fused_uvm_caching"),
        Line(case=exact),
        Line(case=replace(exact, loss="looked up")),
    ]


def fill(weight: torch.Tensor, *given: object) -> None:
    for piece, _ in local_pieces(weight):
        piece.uniform_(-0.1, 0.1)


def seconds_of(trainable: Trainable, line: Line, world: World) -> list[float]:
    """Of each step but the first ones."""
    fed = [batch(line.case, replace(world, rank=number)) for number in range(BATCHES)]
    feed = itertools.cycle(one.pin_memory() if world.device.type == "cuda" else one for one in fed)
    pipeline = PIPELINES[line.pipeline](trainable.model, trainable.optimizer, world.device)
    ends = []
    for _ in range(WARM_UP + line.case.rounds + 1):
        pipeline.progress(feed)
        wait(world.device)
        ends.append(time.perf_counter())
    if isinstance(pipeline, TrainPipelineSparseDist):
        pipeline.detach()
    return [after - before for before, after in itertools.pairwise(ends[WARM_UP:])]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def gib(measured: Callable[[], int], device: torch.device) -> float:
    return measured() / 2**30 if device.type == "cuda" else 0.0


def measure(line: Line, world: World) -> str:
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = gib(torch.cuda.memory_allocated, world.device)
    with mock.patch("ssd_torchrec.distributed.shard.init_table", fill):
        trainable = build(line.case, world, line.sharding())
    built = gib(torch.cuda.memory_allocated, world.device) - before
    seconds = statistics.median(seconds_of(trainable, line, world))
    peak = gib(torch.cuda.max_memory_allocated, world.device) - before - built
    speed = f"{1e3 * seconds:.1f} | {line.case.tokens / seconds:,.0f}"
    return f"| {line.named} | {speed} | {built:.2f} | {peak:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the table")
    parser.add_argument("--items", type=int, default=10**8)
    parser.add_argument("--tokens", type=int, default=65_536, help="events of a batch under sampled softmax")
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, name = (
        (torch.device("cuda", 0), torch.cuda.get_device_name()) if on_gpu else (torch.device("cpu"), "no GPU")
    )
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    world = World(device=device, meeting_point=f"127.0.0.1:{20_000 + os.getpid() % 20_000}")
    text = [
        "# A large catalogue on one GPU\n",
        f"Printed by `python -m benchmarks.scale_gpu`: {name}, torch {torch.__version__}, fp32, rows of 128 events, "
        "medians. *built*: what the sharded model holds of the GPU's memory as PyTorch counts it, tables in host "
        "memory not being in it; *peak*: beyond that while training.\n",
        f"Item rows are the catalogue's and {FIRST_ITEM} more; sampled softmax has 4,096 negatives.\n",
        "| softmax | items | optimizer | table | pipeline | events a step | ms | events/s | built GiB | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    asked.output.mkdir(parents=True, exist_ok=True)
    with process_group(world):
        for line in lines(asked.items, asked.tokens):
            try:
                text.append(measure(line, world))
            except (torch.OutOfMemoryError, ConfigError) as error:
                cause = str(error).partition(",")[0].partition(".")[0]
                text.append(f"| {line.named} | {cause} | | | |")
            print(text[-1], flush=True)
            asked.output.joinpath(f"scale-{slug(name)}.md").write_text("\n".join([*text, ""]))


if __name__ == "__main__":
    main()
