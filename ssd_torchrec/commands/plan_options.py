"""What every `ssd-torchrec plan` asks and prints, whatever the model."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ssd_torchrec.distributed.fit import Fit
from ssd_torchrec.distributed.plan import BagSplit, ShardingConfig


def options_of_gpus(run: ShardingConfig) -> Any:
    """Options of GPUs and tables, whose defaults are those of a run."""

    @dataclass(frozen=True, kw_only=True)
    class OnGPUs:
        ranks: int
        """GPUs, one a process."""

        memory_gib: float
        """Memory of a GPU in GiB."""

        sharding: Literal["auto", "none", "row_wise", "table_wise", "column_wise", "data_parallel"] = run.sharding
        """Split of every table. auto: by rows; whole on one rank. data_parallel is refused."""

        by_table: dict[str, BagSplit] = field(default_factory=dict)
        """Tables that are split differently, such as city table_row_wise, by the names that the answer prints."""

        optimizer: Literal["auto", "sgd", "adagrad", "rowwise_adagrad", "adam"] = run.optimizer
        """What updates the tables. auto: adam."""

        compute_kernel: Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"] = run.compute_kernel
        """Where split tables lie: on the GPU, in the machine's memory, or there behind a cache on the GPU.
        dense is refused."""

        ranks_per_machine: int = 8
        """GPUs that share a machine."""

        host_memory_gib: float | None = None
        """Memory of a machine in GiB, to judge what fused_uvm keeps there; without it, the need is told."""

        json: bool = False
        """Print one JSON object, with all bytes and ms."""

    return OnGPUs


def gpus_asked(asked: Any, sharding: ShardingConfig) -> dict[str, Any]:
    """The fields of a FitRequest that `options_of_gpus` asks for."""
    return {
        "ranks": asked.ranks,
        "memory_gib": asked.memory_gib,
        "ranks_per_machine": asked.ranks_per_machine,
        "host_memory_gib": asked.host_memory_gib,
        "sharding": replace(
            sharding,
            sharding=asked.sharding,
            by_table=asked.by_table,
            optimizer=asked.optimizer,
            compute_kernel=asked.compute_kernel,
        ),
    }


def print_fit(fit: Fit, batch: str) -> None:
    """Tables, a rank's batch, bytes of the heaviest rank, verdict.

    Args:
        batch: what a rank's batch holds.
    """
    heaviest, step_ms = fit.heaviest, fit.step_ms
    for table in fit.tables:
        first = table.shards[0]
        part = f"{first.num_rows:,} rows x {first.num_columns}"
        ranks = sorted(shard.rank for shard in table.shards)
        over = f"up to {part} on each of ranks 0-{ranks[-1]}" if len(ranks) > 1 else f"on rank {ranks[0]}"
        how = f"{table.sharding} {fit.compute_kernel}".strip() if table.sharding != "none" else "whole"
        print(f"{table.name}: {table.num_rows:,} rows x {table.width}, {how}, {fit.optimizer}; {over}")
    print(f"a rank's batch: {batch}\n")
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
    print(f"\n{fit.verdict}")
