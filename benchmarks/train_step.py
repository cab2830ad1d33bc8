"""How long a training step takes on the CPU: our encoder against a GRU and a padded transformer.

    python -m benchmarks.train_step        prints the table and writes benchmarks/results/train-step-cpu.md; 3 minutes

Every encoder meets the same batches in turn, so that a busy machine slows all of them alike. With one thread the clock
is processor time, with more it is the one on the wall. The figures are medians over rounds of all batches.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from benchmarks import peers
from benchmarks.machine import processor
from benchmarks.peers import GRU, Transformer
from ssd_torchrec.data.batch import Batch
from ssd_torchrec.data.batch_plan import BatchConfig, training_windows
from ssd_torchrec.distributed.heap import keep_freed_memory
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig, unsharded
from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.encoders.tim4rec import PRESETS, TiM4Rec
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.next_item import NextItemModel, TablesConfig

RESULTS = Path(__file__).parent / "results" / "train-step-cpu.md"
LAYERS, HEADS = 2, 2  # of the peers
OURS = "TiM4Rec"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Histories shaped like those of a data set: lengths are `shortest` and what a log-normal law adds to it."""

    name: str
    preset: str
    num_users: int
    num_items: int
    shortest: int
    median_beyond: float
    sigma: float
    published: int
    """Last events that the transformer sees, and positions it pads to."""

    num_batches: int
    """Batches measured, evenly spread over the epoch's when sorted by the length of their rows."""

    def lengths(self) -> np.ndarray:
        beyond = self.median_beyond * np.exp(self.sigma * np.random.default_rng(0).standard_normal(self.num_users))
        return self.shortest + beyond.astype(np.int64)


SHAPES = [
    Shape(
        name="like MovieLens-1M",
        preset="ml-1m-64d",
        num_users=6040,
        num_items=3416,
        shortest=18,
        median_beyond=78,
        sigma=1.135,
        published=200,
        num_batches=8,
    ),
    Shape(
        name="like Beauty",
        preset="ml-1m-64d",
        num_users=22363,
        num_items=12101,
        shortest=4,
        median_beyond=2.75,
        sigma=1.2,
        published=50,
        num_batches=4,
    ),
]


@dataclass(frozen=True)
class Contender:
    """An encoder with what it is given of each history."""

    encoder: Encoder
    last_events: int | None
    """None: the whole history."""


@dataclass(frozen=True)
class Measured:
    """One contender on one shape, round by round."""

    seconds: list[float]
    events: list[int]  # of the histories
    seen: list[int]  # of those, what the encoder was given

    def add(self, seconds: float, events: int, seen: int) -> None:
        self.seconds.append(seconds)
        self.events.append(events)
        self.seen.append(seen)

    def rate(self, counted: list[int]) -> float:
        return statistics.median(count / taken for count, taken in zip(counted, self.seconds, strict=True))


def contenders(shape: Shape) -> dict[str, Contender]:
    config = PRESETS[shape.preset]
    sizes = (config.width, LAYERS, HEADS, shape.published, config.dropout)
    return {
        OURS: Contender(TiM4Rec(config), None),
        "GRU": Contender(GRU(config.width, LAYERS, config.dropout), None),
        "transformer": Contender(Transformer(*sizes), shape.published),
        "transformer of our parts": Contender(Transformer(*sizes, parts=peers.OURS), shape.published),
    }


def planned_lengths(shape: Shape, tokens: int, epoch: int = 0) -> list[Tensor]:
    """Lengths of the rows of some batches, as training forms them in an epoch."""
    lengths = shape.lengths()
    config = BatchConfig(tokens_per_batch=tokens)
    windows = training_windows(lengths, np.array([0, len(lengths)]), config, epoch)
    batches = [window.stretches.length[batch] for window in windows for batch in window.batches]
    batches.sort(key=lambda rows: rows.mean())
    spread = np.linspace(0, len(batches), shape.num_batches, endpoint=False) + len(batches) / shape.num_batches / 2
    return [torch.from_numpy(batches[int(at)]) for at in spread]


def make_batch(lengths: Tensor, shape: Shape, last_events: int | None, seed: int) -> Batch:
    """Random histories of these lengths, their last events if asked; every event has a target."""
    seeded = torch.Generator().manual_seed(seed)
    whole = JaggedLayout.from_lengths(lengths)
    items = torch.randint(0, shape.num_items, (whole.num_events,), generator=seeded)
    target = torch.randint(0, shape.num_items, (whole.num_events,), generator=seeded)
    gaps_s = torch.randn(whole.num_events, generator=seeded).mul(3.5).add(9).exp().long()
    kept = torch.ones(whole.num_events, dtype=torch.bool)
    if last_events is not None:
        kept = whole.position >= lengths[whole.row_of_event] - last_events
        lengths = lengths.clamp(max=last_events)
    candidates = torch.arange(shape.num_items)
    values = torch.cat([items[kept] + 1, gaps_s.cumsum(0)[kept], candidates + 1])
    candidate_lengths = torch.zeros_like(lengths)
    candidate_lengths[0] = len(candidates)
    keys = ["item", "timestamp", "candidate"]
    features = KeyedJaggedTensor(keys=keys, values=values, lengths=torch.cat([lengths, lengths, candidate_lengths]))
    return Batch(features, JaggedLayout.from_lengths(lengths), target[kept], int(kept.sum()))


def encoder_alone(encoder: Encoder) -> Callable[[Batch], None]:
    """Forward and backward to parameters and events."""

    def run(batch: Batch) -> None:
        events = torch.randn(batch.layout.num_events, encoder.width, requires_grad=True)
        out = encoder(events, batch.features["timestamp"].values(), batch.layout)
        out.backward(torch.ones_like(out))

    return run


def whole_step(encoder: Encoder, shape: Shape) -> Callable[[Batch], None]:
    """Tables, encoder, softmax over all items, backward and optimizer, as one process trains."""
    tables = TablesConfig(num_item_rows=shape.num_items + 1, first_item=1)
    model = NextItemModel(tables, encoder, table_device="meta")
    dense = DenseOptimizerConfig(learning_rate=1e-3, clip_norm=1.0)
    trainable = unsharded(model, ShardingConfig(), dense, torch.device("cpu"), seed=0)

    def run(batch: Batch) -> None:
        trainable.optimizer.zero_grad()
        trainable.model(batch)[0].backward()
        trainable.optimizer.step()

    return run


def measure(shape: Shape, kind: str, tokens: int, rounds: int, clock: Callable[[], float]) -> dict[str, Measured]:
    """Time all contenders, batch by batch in turn; a first round is not counted."""
    torch.manual_seed(0)
    field = contenders(shape)
    steps = {
        name: encoder_alone(one.encoder) if kind == "encoder" else whole_step(one.encoder, shape)
        for name, one in field.items()
    }
    measured = {name: Measured([], [], []) for name in field}
    for epoch in range(rounds + 1):  # each with other batches: meeting a shape for the first time is part of it
        taken = {name: Measured([], [], []) for name in field}
        for seed, lengths in enumerate(planned_lengths(shape, tokens, epoch)):
            for name, step in steps.items():
                batch = make_batch(lengths, shape, field[name].last_events, seed)
                start = clock()
                step(batch)
                taken[name].add(clock() - start, int(lengths.sum()), batch.layout.num_events)
        for name, one in taken.items():
            if epoch:
                measured[name].add(sum(one.seconds), sum(one.events), sum(one.seen))
    return measured


def lines(measured: dict[str, Measured], num_batches: int) -> Iterator[str]:
    ours = measured[OURS].seconds
    for name, one in measured.items():
        seconds = statistics.median(one.seconds)
        ratio = statistics.median(theirs / own for theirs, own in zip(one.seconds, ours, strict=True))
        cells = [f"{1e3 * seconds / num_batches:.0f}", f"{ratio:.2f}x"]
        rates = [f"{one.rate(counted):,.0f}" for counted in (one.events, one.seen)]
        yield f"| {name} | " + " | ".join([*cells, *rates]) + " |"


def section(shape: Shape, kind: str, asked: argparse.Namespace) -> str:
    clock = time.process_time if asked.threads == 1 else time.perf_counter
    measured = measure(shape, kind, asked.tokens, asked.rounds, clock)
    lengths = shape.lengths()
    title = {"encoder": "encoder alone", "step": f"whole step, {shape.num_items:,} items"}[kind]
    cut = f"; the transformer sees the last {shape.published}, padded to {shape.published}"
    return "\n".join(
        [
            f"## {title}, histories {shape.name}\n",
            f"Mean length {lengths.mean():.0f} (median {np.median(lengths):.0f}, longest {lengths.max():,}){cut}.\n",
            "| | ms a batch | time over ours | events/s, of histories | events/s, seen |",
            "|---|---|---|---|---|",
            *lines(measured, shape.num_batches),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--rounds", type=int, default=5, help="passes over all batches, after one not counted")
    parser.add_argument("--tokens", type=int, default=8192, help="events of a batch")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()  # as training does
    config = PRESETS[SHAPES[0].preset]
    clock = "processor ms" if asked.threads == 1 else "ms"
    parts = [
        "# A training step on the CPU\n",
        "Printed by `python -m benchmarks.train_step`.",
        f"fp32, {asked.threads} thread{'s' * (asked.threads > 1)}, torch {torch.__version__}, {processor()}: {clock}, "
        f"medians of {asked.rounds} rounds.",
        f"{LAYERS} layers, width {config.width}, dropout {config.dropout}, batches of about {asked.tokens:,} events of "
        "histories of similar length, as training forms them.",
        "TiM4Rec (`ml-1m-64d`) and the GRU (`nn.GRU`, packed) see whole histories. The transformer (2 heads, "
        "fused causal attention) sees the last ones only; its two rates count what histories hold and what it sees. It "
        "is there twice: in plain PyTorch, and with the linear maps and the dropout of this package.",
        "PyTorch's own products are MKL's, which takes AVX2 on processors that are not Intel's; those of this package "
        "are oneDNN's.",
        "Whole step: tables, encoder, softmax over all items, gradients, Adam.\n",
    ]
    for kind in ("encoder", "step"):
        parts += [section(shape, kind, asked) for shape in SHAPES]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(parts))
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
