"""`ssd-torchrec plan`: does a catalogue fit these GPUs."""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import tyro

from ssd_torchrec.commands.options import value_of
from ssd_torchrec.distributed.capacity import Capacity, CapacityRequest, plan_capacity
from ssd_torchrec.distributed.fit import figures
from ssd_torchrec.distributed.plan import BagSplit
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.training.config import RunConfig
from ssd_torchrec.training.presets import presets


def plan(words: list[str], about: str) -> int:
    """Answer as a table, or as JSON; starts no process and needs no GPU."""
    runs, preset = presets(), value_of("--preset", words) or "tim4rec"
    if preset not in runs:
        raise ConfigError(
            f"--preset must be a preset of `ssd-torchrec train --help`, got {preset!r}; take one of those"
        )
    run = runs[preset][1]
    asked = tyro.cli(
        _options(run),
        args=words,
        prog="ssd-torchrec plan",
        description=f"{about} Starts no process and needs no GPU.",
    )
    capacity = plan_capacity(_request(asked, run))
    if asked.json:
        print(json.dumps(figures(capacity)))
    else:
        _print(capacity)
    return 0


def _options(run: RunConfig) -> Any:
    """Options whose defaults are those of a run."""

    @dataclass(frozen=True, kw_only=True)
    class Plan:
        items: int
        """Items of the catalogue."""

        ranks: int
        """GPUs, one a process."""

        memory_gib: float
        """Memory of a GPU in GiB."""

        preset: str = "tim4rec"
        """Preset of `ssd-torchrec train`, which then is the default of the options below."""

        batch: int = run.data.tokens_per_batch
        """Events of one global batch, over all ranks."""

        mean_length: float = min(50, run.max_length or 50)
        """Events of a history that the encoder sees, on average."""

        width: int = run.encoder.width
        """Channels of an event, and of the tables."""

        sharding: Literal["auto", "none", "row_wise", "table_wise", "column_wise", "data_parallel"] = (
            run.sharding.sharding
        )
        """Split of every table. auto: by rows; whole on one rank. data_parallel is refused."""

        by_table: dict[str, BagSplit] = field(default_factory=dict)
        """Tables that are split differently, such as city table_row_wise: the table of a context feature or an event
        column has its name."""

        optimizer: Literal["auto", "sgd", "adagrad", "rowwise_adagrad", "adam"] = run.sharding.optimizer
        """What updates the tables. auto: adam."""

        compute_kernel: Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"] = run.sharding.compute_kernel
        """Where split tables lie: on the GPU, in the machine's memory, or there behind a cache on the GPU.
        dense is refused."""

        loss: Literal["softmax", "bce", "sampled_softmax"] = run.objective.loss
        """What candidates cost: softmax over a large catalogue scores it where it lies."""

        negatives: int = run.objective.num_negatives
        """Draws for a global batch, of sampled_softmax."""

        context: dict[str, int] = field(default_factory=dict)
        """Context features: name and number of ids of each, such as city 5000."""

        event_columns: dict[str, int] = field(default_factory=dict)
        """Event columns: name and number of ids of each, such as action 5."""

        ranks_per_machine: int = 8
        """GPUs that share a machine."""

        host_memory_gib: float | None = None
        """Memory of a machine in GiB, to judge what fused_uvm keeps there; without it, the need is told."""

        json: bool = False
        """Print one JSON object, with all bytes and ms."""

    return Plan


def _request(asked: Any, run: RunConfig) -> CapacityRequest:
    objective = replace(run.objective, loss=asked.loss, num_negatives=asked.negatives)
    sharding = replace(
        run.sharding,
        sharding=asked.sharding,
        by_table=asked.by_table,
        optimizer=asked.optimizer,
        compute_kernel=asked.compute_kernel,
    )
    return CapacityRequest(
        items=asked.items,
        ranks=asked.ranks,
        memory_gib=asked.memory_gib,
        encoder=replace(run.encoder, width=asked.width),
        objective=objective,
        sharding=sharding,
        dense=run.dense,
        context=asked.context,
        event_columns=asked.event_columns,
        tokens_per_batch=asked.batch,
        mean_length=asked.mean_length,
        ranks_per_machine=asked.ranks_per_machine,
        host_memory_gib=asked.host_memory_gib,
    )


def _print(capacity: Capacity) -> None:
    heaviest, step_ms = capacity.heaviest, capacity.step_ms
    for table in capacity.tables:
        first = table.shards[0]
        part = f"{first.num_rows:,} rows x {first.num_columns}"
        ranks = sorted(shard.rank for shard in table.shards)
        over = f"up to {part} on each of ranks 0-{ranks[-1]}" if len(ranks) > 1 else f"on rank {ranks[0]}"
        how = f"{table.sharding} {capacity.compute_kernel}".strip() if table.sharding != "none" else "whole"
        print(f"{table.name}: {table.num_rows:,} rows x {table.width}, {how}, {capacity.optimizer}; {over}")
    scored = "scored in place" if capacity.scored_in_place else f"{capacity.candidates_per_rank:,} candidates"
    print(f"a rank's batch: {capacity.events_per_rank:,} events, {scored}\n")
    print(f"rank {heaviest.rank}, the heaviest{'GiB':>14}")
    for name in (
        "weights",
        "optimizer",
        "gradient",
        "cache",
        "lookups",
        "activations",
        "dense",
        "loss",
        "total",
        "host",
    ):
        if (size := getattr(heaviest, f"{name}_bytes")) or name == "total":
            print(f"  {name:<18}{size / 2**30:>14,.3f}")
    if step_ms is not None:
        print(
            f"\ntables, a step: {step_ms:,.3f} ms on the slowest rank, by TorchRec's estimate for its default hardware"
        )
    print(f"\n{capacity.verdict}")
