"""Who holds which part of a table, and the bytes that takes on a rank.

    weights       rows x columns x 4 of its parts of the tables
    optimizer     state beside them: adam 2 numbers a weight, adagrad 1, rowwise_adagrad 1 a row, sgd none
    gradient      as large as the weights where a table is whole, as PyTorch's optimizers have it; none of split tables
    cache         of fused_uvm_caching: the share of weights and state that TorchRec keeps on the device, and its index
    lookups       ids (8 bytes) in, vectors out, as TorchRec's storage estimator counts them

Numbers are fp32.
"""

from dataclasses import dataclass
from math import ceil

from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO

from ssd_torchrec.distributed.plan import Ranks, ShardingConfig, Workload
from ssd_torchrec.distributed.tables import TableConfig


@dataclass(frozen=True, kw_only=True)
class TableShard:
    """A part of a table."""

    rank: int
    """Who holds it."""

    first_row: int
    num_rows: int
    first_column: int
    num_columns: int

    step_ms: float | None = None
    """What TorchRec expects its lookup, its exchange and its update to take."""


@dataclass(frozen=True, kw_only=True)
class TablePlacement:
    """A table and who holds what of it."""

    name: str
    num_rows: int
    width: int

    sharding: str
    """As `ShardingConfig` calls it, or none for a whole table in one process."""

    pooled: bool
    """Whether lookups are pooled to one vector a row of the batch."""

    shards: tuple[TableShard, ...]


@dataclass(frozen=True, kw_only=True)
class RankStorage:
    """Bytes of a rank, by what they are for; this file's header and that of `fit` say how they are counted."""

    rank: int
    weights_bytes: int = 0
    optimizer_bytes: int = 0
    gradient_bytes: int = 0
    cache_bytes: int = 0
    lookups_bytes: int = 0
    activations_bytes: int = 0
    dense_bytes: int = 0
    loss_bytes: int = 0

    host_bytes: int = 0
    """In the machine's memory: weights and optimizer state of fused_uvm and fused_uvm_caching."""

    step_ms: float | None = None
    """TorchRec's estimate for the tables of this rank, a step, for its default hardware constants, which are of an
    older GPU; None where it makes none, for whole tables. Encoder and loss are not in it."""

    @property
    def tables_bytes(self) -> int:
        """On the device for tables: what the planner counts."""
        tables = (self.weights_bytes, self.optimizer_bytes, self.gradient_bytes, self.cache_bytes, self.lookups_bytes)
        return sum(tables)

    @property
    def total_bytes(self) -> int:
        """On the device."""
        return self.tables_bytes + self.activations_bytes + self.dense_bytes + self.loss_bytes


def cut(table: TableConfig, split: str, ranks: Ranks, holder: int) -> list[TableShard]:
    """A table's parts as TorchRec cuts it; `holder`, or its machine, has it whole where it does not go to all."""
    first_rank = {"table_wise": holder, "table_row_wise": holder - holder % ranks.of_machine}.get(split, 0)
    rows, columns = table.num_embeddings, table.embedding_dim // ranks.column_ranges(split)
    step = -(-rows // ranks.row_holders(split))
    return [
        TableShard(
            rank=first_rank + column_range * ranks.row_holders(split) + part,
            first_row=part * step,
            num_rows=min(step, rows - part * step),
            first_column=column_range * columns,
            num_columns=columns,
        )
        for column_range in range(ranks.column_ranges(split))
        for part in range(ranks.row_holders(split))
    ]


def placement(table: TableConfig, split: str, shards: list[TableShard]) -> TablePlacement:
    """A table with its parts."""
    return TablePlacement(
        name=table.name,
        num_rows=table.num_embeddings,
        width=table.embedding_dim,
        sharding=split,
        pooled=isinstance(table, EmbeddingBagConfig),
        shards=tuple(shards),
    )


def shard_bytes(
    table: TablePlacement, shard: TableShard, config: ShardingConfig, workload: Workload, ranks: int
) -> dict[str, int]:
    """What a part of a table takes on its rank, by field of `RankStorage`; `workload` is of its features."""
    weights = 4 * shard.num_rows * shard.num_columns
    per_optimizer = {"sgd": 0, "adagrad": weights, "rowwise_adagrad": 4 * shard.num_rows, "adam": 2 * weights}
    state = per_optimizer[config.optimizer]
    lookups = {"lookups_bytes": _lookups_bytes(table, shard, workload, ranks)}
    if not config.split:
        return lookups | {"weights_bytes": weights, "optimizer_bytes": state, "gradient_bytes": weights}
    if config.compute_kernel == "fused":
        return lookups | {"weights_bytes": weights, "optimizer_bytes": state}
    if config.compute_kernel == "fused_uvm":
        return lookups | {"host_bytes": weights + state}
    index = ceil(shard.num_rows * (4 + 16 * UVM_CACHING_RATIO))
    return lookups | {
        "cache_bytes": ceil(UVM_CACHING_RATIO * (weights + state)) + index,
        "host_bytes": weights + state,
    }


def _lookups_bytes(table: TablePlacement, shard: TableShard, workload: Workload, ranks: int) -> int:
    """What all ranks bring is looked up, of a table by rows a share of it by each that holds some."""
    ids_per_row = workload.ids_per_row.values()
    ids = workload.rows_per_rank * sum(ids_per_row)
    vectors = workload.rows_per_rank * sum(min(1.0, n) for n in ids_per_row) if table.pooled else ids
    row_parts = len({shard.first_row for shard in table.shards})
    incoming = ids * ranks / row_parts
    outgoing = vectors * (1 if table.sharding == "row_wise" and not table.pooled else ranks)
    return ceil(8 * incoming) + ceil(4 * outgoing * shard.num_columns)
