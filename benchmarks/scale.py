"""What a larger catalogue costs a training step: time, memory, and what travels between processes.

    python -m benchmarks.scale                 writes benchmarks/results/scale-cpu.md, half an hour on two cores
    python -m benchmarks.scale --part "exact softmax, 1 process"    one part; the others' lines stay

TiM4Rec in its small shape (64 wide) on rows of 128 events, item table split row_wise, rowwise_adagrad, one thread a
process. Each line is measured in processes of its own: memory is that of the process, so nothing of another line is in
it. Items are drawn with a heavy tail, as catalogues have it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor

from benchmarks.encoders import RESULTS, peak_mib, status_kib
from benchmarks.machine import processor
from ssd_torchrec.data.batch import Batch
from ssd_torchrec.data.rows import even_offsets
from ssd_torchrec.distributed.process import World, launched, process_group
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig, Trainable, shard
from ssd_torchrec.distributed.vocab_parallel import VocabParallelSoftmaxLoss
from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.next_item import FullSoftmaxLoss, NextItemModel, SampledSoftmaxLoss, TablesConfig

TABLE = RESULTS / "scale-cpu.md"
FIRST_ITEM, ROW_EVENTS = 17, 128
WEIGHT = "items.embeddings.item.weight"
LOSSES = {"looked up": FullSoftmaxLoss, "in place": VocabParallelSoftmaxLoss, "sampled": SampledSoftmaxLoss}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a table."""

    loss: str
    items: int
    processes: int = 1
    tokens: int = 4096
    """Events of a global batch."""
    negatives: int = 4096
    rounds: int


PARTS = {
    f"{kind}, {number} process{'es' * (number > 1)}": [
        Case(loss=loss, items=items, processes=number, rounds=rounds) for items in sizes for loss in losses
    ]
    for kind, losses, sizes, rounds in (
        ("exact softmax", ("in place", "looked up"), (10**4, 10**5, 10**6), 1),
        ("sampled softmax", ("sampled",), (10**4, 10**5, 10**6, 10**7), 9),
    )
    for number in (1, 2)
}
HEAD = "| softmax | items | processes | ms a step | events/s | all-to-all | table MiB | built MiB | a step MiB |"


ROW_WISE = ShardingConfig(sharding="row_wise", optimizer="rowwise_adagrad")


def build(case: Case, world: World, sharding: ShardingConfig = ROW_WISE) -> Trainable:
    torch.manual_seed(0)
    loss = LOSSES[case.loss](world.size)
    tables = TablesConfig(num_item_rows=FIRST_ITEM + case.items, first_item=FIRST_ITEM)
    model = NextItemModel(tables, SYSTEMS["tim4rec"].small.build(), loss, table_device="meta")
    trainable = shard(model, sharding, DenseOptimizerConfig(), world, seed=0)
    if isinstance(loss, VocabParallelSoftmaxLoss):
        loss.bind(trainable, WEIGHT, FIRST_ITEM)
    return trainable


def batch(case: Case, world: World) -> Batch:
    """This rank's rows of a global batch."""
    draw = torch.Generator().manual_seed(world.rank)
    rows = case.tokens // ROW_EVENTS // world.size
    count = rows * ROW_EVENTS
    item = (case.items * torch.rand(count + 1, generator=draw) ** 3).long()
    listed, target, log_q, shared = torch.arange(0), item[1:], None, 0
    if case.loss == "looked up":
        listed = torch.arange(case.items)
    elif case.loss == "sampled":
        everyone = torch.Generator().manual_seed(1)
        drawn = torch.randint(case.items, (case.negatives,), generator=everyone).unique()
        more = target[~torch.isin(target, drawn)].unique()
        listed, shared = torch.cat([drawn, more]), len(drawn)
        place = torch.zeros(case.items, dtype=torch.int64).index_copy_(0, listed, torch.arange(len(listed)))
        target, log_q = place[target], torch.full((len(listed),), case.negatives / case.items).log()
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["item", "timestamp", "candidate"],
        values=torch.cat([item[:-1] + FIRST_ITEM, 60 * torch.arange(count), listed + FIRST_ITEM]),
        lengths=torch.tensor([ROW_EVENTS] * (2 * rows) + np.diff(even_offsets(len(listed), rows)).tolist()),
    )
    layout = JaggedLayout.from_lengths([ROW_EVENTS] * rows)
    return Batch(features, layout, target, case.tokens, log_q=log_q, num_shared=shared)


def step_of(trainable: Trainable, ours: Batch) -> Callable[[], None]:
    def step() -> None:
        trainable.optimizer.zero_grad()
        loss, _ = trainable.model(ours)
        loss.backward()
        trainable.optimizer.step()

    return step


def measure(case: Case, world: World) -> dict[str, float]:
    """Figures of this rank."""
    ours = batch(case, world)
    before = status_kib("VmRSS")
    trainable = build(case, world)
    built = status_kib("VmRSS")
    step = step_of(trainable, ours)
    peak = peak_mib(step, world.device)
    seconds = []
    for _ in range(case.rounds):
        dist.barrier()
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return {
        "ms": 1e3 * statistics.median(seconds),
        "exchange": exchange_share(step, min(case.rounds, 3)),
        "built_mib": (built - before) / 2**10,
        "step_mib": peak,
    }


def exchange_share(step: Callable[[], None], steps: int) -> float:
    """Share of a step's time in which an all-to-all of its is under way, waiting for the other ranks included."""
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        elapsed = time.perf_counter() - begin
    under_way = sum(event.time_range.elapsed_us() for event in profile.events() if event.name == "gloo:all_to_all")
    return under_way / 1e6 / elapsed


def run(case: Case) -> str:
    """A line of the table, measured in fresh processes."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(case.processes)]
        command += ["--standalone", "-m", "benchmarks.scale", "--case", json.dumps(asdict(case))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--result", str(result)], check=True, env=environment)
        ranks = json.loads(result.read_text())
    worst = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    table = (case.items + FIRST_ITEM) * 64 * 4 / 2**20 / case.processes
    return (
        f"| {case.loss} | {case.items:,} | {case.processes} | {worst['ms']:,.0f} | "
        f"{1e3 * case.tokens / worst['ms']:,.0f} | {worst['exchange']:.0%} | {table:,.0f} | "
        f"{worst['built_mib']:,.0f} | {worst['step_mib']:,.0f} |"
    )


def work(case: Case, result: Path) -> None:
    world = launched(os.environ, "cpu")
    torch.set_num_threads(1)
    with process_group(world):
        ranks: list[dict[str, float] | None] = [None] * world.size
        dist.all_gather_object(ranks, measure(case, world))
        if world.rank == 0:
            result.write_text(json.dumps(ranks))


def text(lines: dict[str, list[str]]) -> str:
    parts = [
        "# What a larger catalogue costs\n",
        f"Printed by `python -m benchmarks.scale`: {processor()}, one thread a process, torch {torch.__version__}.",
        "TiM4Rec, 64 wide, fp32, a global batch of 4,096 events in rows of 128, table row_wise with rowwise_adagrad; "
        "sampled softmax has 4,096 negatives. Of the ranks the slowest and the largest. *all-to-all*: share of the "
        "step in which one is under way; *table*: the rank's part; *built*: what building the sharded model added to "
        "the process; *a step*: peak of the first step beyond that.\n",
    ]
    for part, rows in lines.items():
        parts += [f"## {part[0].upper()}{part[1:]}\n", HEAD, "|---" * HEAD.count(" | ") + "|---|", *rows, ""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only these; all if not given")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a process of a measurement
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        work(Case(**json.loads(asked.case)), asked.result)
        return
    lines = known()
    for part in asked.part or PARTS:
        lines[part] = []
        for case in PARTS[part]:
            lines[part].append(run(case))
            print(lines[part][-1], flush=True)
            TABLE.write_text(text({name: lines[name] for name in PARTS if name in lines}))


def known() -> dict[str, list[str]]:
    """Lines of the parts that were measured before."""
    lines: dict[str, list[str]] = {}
    part = ""
    for line in TABLE.read_text().splitlines() if TABLE.exists() else []:
        if line.startswith("## "):
            part = line[3:4].lower() + line[4:]
        elif line.startswith("| ") and line != HEAD:
            lines.setdefault(part, []).append(line)
    return lines


if __name__ == "__main__":
    main()
