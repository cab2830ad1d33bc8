"""Who holds which part of which table: what may be asked for, and TorchRec's planner to carry it out.

    row_wise      every rank holds a range of rows        any table with enough rows; the default of several processes
    table_wise    one rank holds the table                small tables beside a large one
    column_wise   every rank holds a range of columns     width a multiple of 4 x ranks

Of pooled tables alone, for whom ranks that share a machine add up first what they then send to other machines:

    table_row_wise   the ranks of one machine hold a range of rows each
    grid_shard       every machine holds a range of columns, its ranks a range of rows of it; sums alone

A table whose ids are managed is split row_wise, its id map with it.

What TorchRec 1.6 to 1.8 accepts but computes wrongly is refused here, each with its reason.
"""

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagConfig, PoolingType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption, Stats
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType

from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.tables import TableConfig, tables_of
from ssd_torchrec.errors import ConfigError

BagSplit = Literal["row_wise", "table_wise", "column_wise", "table_row_wise", "grid_shard"]
OF_MACHINES = ("table_row_wise", "grid_shard")
BY_COLUMNS = ("column_wise", "grid_shard")

LEARNING_RATE = {"sgd": 0.1, "adagrad": 0.05, "rowwise_adagrad": 0.05, "adam": 1e-3}
RESERVED_MEMORY = 0.15  # of each device, for what the planner does not count: encoder, activations, loss

UNSOUND_DATA_PARALLEL = (
    "tables must be split row_wise, table_wise or column_wise, got data_parallel: TorchRec would look an "
    "EmbeddingCollection up with the dense kernel, which on CPU pools the events of a row into one, and its optimizer "
    "state could not be resharded; take table_wise for a small table, or sharding none with one process"
)
UNSOUND_DENSE = (
    "compute_kernel must be a fused one, got dense: on CPU it pools an EmbeddingCollection's events or corrupts "
    "memory, and it has no optimizer of its own to checkpoint; take fused"
)


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How the embedding tables are split over the ranks and what updates them."""

    sharding: Literal["auto", "none", "row_wise", "table_wise", "column_wise", "data_parallel"] = "auto"
    """Split of every table. auto: none for one process; for several row_wise, but table_wise for a table with too few
    rows. On CPU, row_wise leaves pooled tables table_wise unless `by_table` names them. data_parallel is refused:
    TorchRec computes it wrongly for event tables on CPU."""

    by_table: dict[str, BagSplit] = field(default_factory=dict)
    """Tables that are split differently, by table name; table_row_wise and grid_shard are for pooled ones. A pooled
    table that is split by rows on CPU needs ranks that bring equally many rows to every batch: gloo cannot gather its
    gradient from unequal ones. grid_shard is refused for tables that take a mean, which TorchRec computes wrongly."""

    optimizer: Literal["auto", "sgd", "adagrad", "rowwise_adagrad", "adam"] = "auto"
    """What updates the tables. auto: adam (as in the papers) for whole tables and on CUDA; on CPU, where FBGEMM has no
    Adam, rowwise_adagrad for split tables, or adagrad if one is split by columns or its ids are managed. Adam keeps two
    numbers beside every weight, adagrad one, rowwise_adagrad one a row: take the last where Adam's moments do not fit
    the GPUs."""

    learning_rate: float | None = None
    """Learning rate of the tables. None: 0.1 for sgd, 0.05 for both adagrads, 0.001 for adam."""

    eps: float = 1e-8
    """Added to the denominator of adagrad, rowwise_adagrad and adam."""

    compute_kernel: Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"] = "fused"
    """Where FBGEMM keeps split tables: fused in device memory; on CUDA also fused_uvm in host memory, fused_uvm_caching
    in host memory behind a device cache. dense is refused: on CPU it corrupts memory."""

    def __post_init__(self) -> None:
        if "data_parallel" in (self.sharding, *self.by_table.values()):
            raise ConfigError(UNSOUND_DATA_PARALLEL)
        if self.compute_kernel == "dense":
            raise ConfigError(UNSOUND_DENSE)
        if self.sharding == "none" and self.by_table:
            raise ConfigError(
                f"by_table splits tables, which sharding none keeps whole, got {self.by_table}; drop one of the two"
            )
        if self.optimizer == "rowwise_adagrad" and {self.sharding, *self.by_table.values()}.intersection(BY_COLUMNS):
            raise ConfigError(
                "tables that are split by columns must not be updated by rowwise_adagrad: each column range would keep "
                "a statistic of its own, which computes something else and cannot be resharded; take adagrad, or split "
                "row_wise"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"the tables' learning_rate must be above 0, got {self.learning_rate}")
        if not self.eps > 0:
            raise ConfigError(f"eps must be above 0, got {self.eps}")

    @property
    def split(self) -> bool:
        """Whether tables are sharded; meaningful once resolved."""
        return self.sharding != "none"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a rank looks up in a step, for the planner's estimate of memory and time; numerics do not depend on it."""

    rows_per_rank: int = 512
    """Rows B of a rank's batch."""

    ids_per_row: dict[str, float] = field(default_factory=dict)
    """Average ids a row, by feature name; 1 for a feature that is not named."""

    def of(self, features: Sequence[str]) -> "Workload":
        """What is looked up by these features, each of them named."""
        return replace(self, ids_per_row={feature: self.ids_per_row.get(feature, 1.0) for feature in features})


def resolve(
    config: ShardingConfig,
    tables: Mapping[str, TableConfig],
    world_size: int,
    device: torch.device,
    local_size: int | None = None,
    *,
    managed: Collection[str] = (),
) -> ShardingConfig:
    """Replace every "auto" and None by what it means here, and name the split of every table in `by_table`.

    Args:
        local_size: ranks that share a machine; None for all.
        managed: names of the tables whose ids are managed.

    Raises:
        ConfigError: the split does not fit the number of ranks, or the optimizer not the split or the device; or
            managed ids do not fit one of them.
    """
    sharding = config.sharding
    if sharding == "auto":
        sharding = "none" if world_size == 1 else "row_wise"
    if sharding == "none" and world_size > 1:
        raise ConfigError(
            f"several processes must split the tables, got sharding none with {world_size} processes; take row_wise, "
            "or start one process"
        )
    names = {table.name for table in tables.values()}
    if unknown := sorted(set(config.by_table) - names):
        raise ConfigError(
            f"by_table must name tables of the model ({', '.join(sorted(names))}), got {', '.join(unknown)}"
        )
    by_table = {}
    if sharding != "none":
        ranks = Ranks(world_size, local_size or world_size, device)
        by_table = {table.name: _split_of(table, config, ranks, table.name in managed) for table in tables.values()}
    rowwise = {*by_table.values()}.isdisjoint(BY_COLUMNS) and not managed
    optimizer = _optimizer(config, sharding, rowwise, device)
    resolved = replace(
        config,
        sharding=sharding,
        by_table=by_table,
        optimizer=optimizer,
        learning_rate=config.learning_rate or LEARNING_RATE[optimizer],
    )
    _check_device(resolved, device)
    _check_managed(resolved, device, managed)
    return resolved


def _optimizer(config: ShardingConfig, sharding: str, rowwise: bool, device: torch.device) -> str:
    if config.optimizer != "auto":
        return config.optimizer
    if sharding == "none" or device.type == "cuda":
        return "adam"
    return "rowwise_adagrad" if rowwise else "adagrad"


def _check_device(config: ShardingConfig, device: torch.device) -> None:
    if device.type != "cpu" or not config.split:
        return
    if config.optimizer == "adam":
        raise ConfigError(
            "split tables on CPU must be updated by sgd, adagrad or rowwise_adagrad, got adam: FBGEMM has no fused "
            "Adam for CPU; take rowwise_adagrad, or train in one process with sharding none"
        )
    if config.compute_kernel != "fused":
        raise ConfigError(
            f"compute_kernel {config.compute_kernel} keeps a GPU's tables in host memory, got tables on CPU, which "
            "lie there anyway; take fused"
        )


def _check_managed(config: ShardingConfig, device: torch.device, managed: Collection[str]) -> None:
    if not managed or not config.split:
        return
    names = ", ".join(sorted(managed))
    if config.optimizer == "rowwise_adagrad" and device.type == "cpu":
        raise ConfigError(
            f"split tables of managed ids on CPU must be updated by sgd or adagrad, got rowwise_adagrad for {names}: "
            "FBGEMM resets the statistic of an evicted row on CUDA only; take adagrad"
        )
    if config.compute_kernel == "fused_uvm_caching":
        raise ConfigError(
            f"split tables of managed ids must not lie behind a device cache, got fused_uvm_caching for {names}: "
            "TorchRec gives an evicted row new weights in host memory, past the cache; take fused or fused_uvm"
        )


@dataclass(frozen=True)
class Ranks:
    """On what tables are split."""

    count: int
    of_machine: int
    device: torch.device

    def row_holders(self, split: str) -> int:
        """Ranks that the rows of a table, or of a range of its columns, are cut over."""
        return {"row_wise": self.count, "table_row_wise": self.of_machine, "grid_shard": self.of_machine}.get(split, 1)

    def column_ranges(self, split: str) -> int:
        """Ranges that the columns of a table are cut into."""
        return {"column_wise": self.count, "grid_shard": self.count // self.of_machine}.get(split, 1)


def _split_of(table: TableConfig, config: ShardingConfig, ranks: Ranks, managed: bool) -> str:
    split = config.by_table.get(table.name)
    if managed:
        return _split_of_managed(table, split or config.sharding, ranks)
    if split is None:
        split = config.sharding
        if split == "auto":
            split = "row_wise" if _rows_suffice(table.num_embeddings, ranks.count) else "table_wise"
        if split == "row_wise" and isinstance(table, EmbeddingBagConfig) and ranks.device.type == "cpu":
            split = "table_wise"
    if split in OF_MACHINES:
        _check_machines(table, split, ranks)
    holders, ranges = ranks.row_holders(split), ranks.column_ranges(split)
    if not _rows_suffice(table.num_embeddings, holders):
        raise ConfigError(
            f"{split} must leave every rank a row, got table {table.name} with {table.num_embeddings} rows for "
            f"{holders} ranks; set by_table to table_wise for {table.name}, or start fewer processes"
        )
    if table.embedding_dim % (4 * ranges):
        raise ConfigError(
            f"{split} must cut the width into multiples of 4, got table {table.name} of width {table.embedding_dim} "
            f"for {ranges} parts; take row_wise, or a number of ranks whose fourfold divides the width"
        )
    return split


def _split_of_managed(table: TableConfig, split: str, ranks: Ranks) -> str:
    if split not in ("auto", "row_wise"):
        raise ConfigError(
            f"tables of managed ids must be split row_wise, which is all that TorchRec can, got {split} for "
            f"{table.name}; set by_table to row_wise for {table.name}"
        )
    last_rows = table.num_embeddings + (1 - ranks.count) * -(-table.num_embeddings // ranks.count)
    if last_rows < 2 or table.embedding_dim % 4:
        raise ConfigError(
            f"row_wise must leave every rank a row for ids without one and another, of a width that is a multiple of "
            f"4, got table {table.name} with {table.num_embeddings} rows of width {table.embedding_dim} for "
            f"{ranks.count} ranks; give {table.name} {2 * ranks.count} rows or more, or start fewer processes"
        )
    return "row_wise"


def _check_machines(table: TableConfig, split: str, ranks: Ranks) -> None:
    if not isinstance(table, EmbeddingBagConfig):
        raise ConfigError(
            f"{split} is for pooled tables, got {table.name}, whose events TorchRec cannot look up so; take row_wise"
        )
    if split == "grid_shard" and table.pooling == PoolingType.MEAN:
        raise ConfigError(
            f"grid_shard is for tables that sum the rows of a bag, got {table.name}, which takes their mean: TorchRec "
            "would add up a mean of each rank; take table_row_wise"
        )
    if ranks.count % ranks.of_machine:
        raise ConfigError(
            f"{split} needs machines of equally many ranks, got {ranks.count} ranks, {ranks.of_machine} a machine, for "
            f"{table.name}; start as many on each, or take row_wise"
        )


def _rows_suffice(rows: int, world_size: int) -> bool:
    """TorchRec gives each rank ceil(rows / ranks) rows while they last; the last rank must get some."""
    per_rank = -(-rows // world_size)
    return per_rank * (world_size - 1) < rows


class RowWiseBagSharder(EmbeddingBagCollectionSharder):
    """Splits rows on CPU too: TorchRec left that out when gloo had no reduce-scatter, which it has by now."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        by_rows = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)
        return [*types, *(split for split in by_rows if split not in types)]


def sharders() -> list[ModuleSharder[nn.Module]]:
    """The sharders of the three kinds of collection that our models have."""
    return [EmbeddingCollectionSharder(), RowWiseBagSharder(), ManagedCollisionEmbeddingCollectionSharder()]  # type: ignore[list-item]  # theirs is invariant


def plan_tables(model: nn.Module, config: ShardingConfig, workload: Workload, world: World) -> ShardingPlan:
    """Place every table of an unsharded model as the resolved `config` says; the same plan on every rank. Collective.

    Raises:
        ConfigError: on every rank, when the tables do not fit the memory of the ranks.
    """
    result: list[ShardingPlan | str] = [""]
    if world.rank == 0:
        try:
            with _without_topology_warning():
                result = [_planner(model, config, workload, world).plan(model, sharders())]
        except PlannerError as error:
            result = [str(error)]
    dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], str):
        raise ConfigError(
            f"the tables must fit the memory of {world.size} ranks, the planner finds they do not: {result[0]}"
        )
    return result[0]


def _planner(model: nn.Module, config: ShardingConfig, workload: Workload, world: World) -> EmbeddingShardingPlanner:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size
    on_gpu = world.device.type == "cuda"
    topology = Topology(
        world_size=world.size,
        local_world_size=world.local_size,
        compute_device=world.device.type,
        hbm_cap=torch.cuda.get_device_properties(world.device).total_memory if on_gpu else 0,
        ddr_cap=int(host * (1 - RESERVED_MEMORY)),  # the reservation below is of device memory only
    )
    return _planner_on(topology, model, config, workload)


def _planner_on(
    topology: Topology, model: nn.Module, config: ShardingConfig, workload: Workload, stats: Stats | None = None
) -> EmbeddingShardingPlanner:
    tables = tables_of(model).values()
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=workload.rows_per_rank,
        storage_reservation=FixedPercentageStorageReservation(RESERVED_MEMORY),
        constraints={table.name: _constraints(table, config, workload, topology) for table in tables},
        stats=stats,
        debug=False,
    )


def plan_offline(
    model: nn.Module,
    config: ShardingConfig,
    workload: Workload,
    *,
    ranks: int,
    ranks_per_machine: int,
    device_bytes: int,
    host_bytes: int,
) -> list[ShardingOption]:
    """What `plan_tables` would do on GPUs that are not here, with what TorchRec expects of it. No process group.

    Args:
        model: unsharded, tables on "meta", their optimizer fused into backward.
        config: resolved for `ranks` ranks on CUDA, with split tables.
        device_bytes: memory of a GPU, of which tables get all but `RESERVED_MEMORY`.
        host_bytes: memory of a machine over its ranks, of which tables get as much.

    Returns:
        For each table its shards, each with its rank, storage in bytes and duration in ms.

    Raises:
        PlannerError: the tables do not fit.
    """
    kept = _Kept()
    with _without_topology_warning():
        topology = Topology(
            world_size=ranks,
            local_world_size=min(ranks, ranks_per_machine),
            compute_device="cuda",
            hbm_cap=device_bytes,
            ddr_cap=int(host_bytes * (1 - RESERVED_MEMORY)),
        )
        _planner_on(topology, model, config, workload, kept).plan(model, sharders())
    return kept.plan


class _Kept(Stats):
    """Holds on to the plan, which the planner itself returns without storage and durations."""

    def __init__(self) -> None:
        self.plan: list[ShardingOption] = []

    def log(self, *_: Any, **named: Any) -> None:
        self.plan = named["best_plan"]


@contextmanager
def _without_topology_warning() -> Iterator[None]:
    """TorchRec 1.8 warns that a Topology should come from a factory, which 1.6 does not have and which adds nothing."""
    logger = logging.getLogger("torchrec.distributed.planner.types")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _constraints(
    table: TableConfig, config: ShardingConfig, workload: Workload, topology: Topology
) -> ParameterConstraints:
    split = config.by_table[table.name]
    ranks = Ranks(topology.world_size, topology.local_world_size, torch.device(topology.compute_device))
    return ParameterConstraints(
        sharding_types=[split],
        compute_kernels=[config.compute_kernel],
        pooling_factors=list(workload.of(table.feature_names).ids_per_row.values()),
        min_partition=table.embedding_dim // ranks.column_ranges(split) if split in BY_COLUMNS else None,
    )


def describe_plan(plan: ShardingPlan) -> dict[str, str]:
    """What a plan does, for logs and checkpoints: by table name the split, the kernel and the ranks that hold parts."""
    described = {}
    for module_plan in plan.plan.values():
        for name, parameter in module_plan.items():  # type: ignore[attr-defined]  # an EmbeddingModuleShardingPlan is a dict
            ranks = ", ".join(str(rank) for rank in parameter.ranks or [])
            described[name] = f"{parameter.sharding_type} {parameter.compute_kernel} on rank {ranks}"
    return described
