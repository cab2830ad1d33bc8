"""Make a model ready to train: tables split over the ranks or whole, and one optimizer for all of it.

    unsharded model (tables on "meta" or real) ──► shard ──► Trainable(model, optimizer, ...)

Whatever the world and the split, the model starts from the same weights and computes the same: dense parameters are
those of rank 0, tables are filled from the seed by `init_table`. Build models with tables on "meta" always: real ones
draw from PyTorch's generator, and the dense parameters made after them would differ.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter

from ssd_torchrec.distributed.id_maps import managed_tables
from ssd_torchrec.distributed.optimizers import (
    DenseOptimizerConfig,
    combined,
    dense_optimizer,
    fuse_into_backward,
    set_learning_rate,
    unfused,
)
from ssd_torchrec.distributed.plan import ShardingConfig, Workload, describe_plan, plan_tables, resolve, sharders
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.tables import allocate_tables, first_values_left_to_us, init_table, tables_of
from ssd_torchrec.errors import ConfigError

__all__ = [
    "DenseOptimizerConfig",
    "ShardingConfig",
    "Trainable",
    "Workload",
    "set_learning_rate",
    "shard",
    "unsharded",
]


@dataclass(frozen=True, eq=False)
class Trainable:
    """A model with what trains it."""

    model: nn.Module
    """Call it on a batch: a DistributedModelParallel when tables are split, else the model that was given."""

    optimizer: CombinedOptimizer
    """Steps tables and dense part; fused tables have stepped by then, inside backward."""

    sharding: ShardingConfig
    """Resolved: holds no "auto" and no None."""

    dense: DenseOptimizerConfig
    """As given."""

    plan: dict[str, str]
    """By table name, who holds which part; empty when tables are whole."""

    @property
    def module(self) -> nn.Module:
        """The model itself, without its wrappers: collections, tower and helpers by the names its class gives them."""
        return self.model.module if isinstance(self.model, DistributedModelParallel) else self.model


def shard(
    model: nn.Module,
    sharding: ShardingConfig,
    dense: DenseOptimizerConfig,
    world: World,
    *,
    seed: int,
    workload: Workload | None = None,
) -> Trainable:
    """Split a model's tables over the ranks as `sharding` says, and move the rest to the rank's device. Collective.

    The model is used up: its collections are replaced in place.

    Args:
        model: built alike on every rank; its tables may be on "meta".
        seed: what the tables' first values are drawn from.
        workload: what a step looks up, for the planner.

    Raises:
        ConfigError: the split does not fit the ranks, their memory or the optimizer; see `ShardingConfig`.
    """
    tables = tables_of(model)
    managed = managed_tables(model)
    resolved = resolve(sharding, tables, world.size, world.device, world.local_size, managed=managed)
    if not resolved.split:
        return unsharded(model, resolved, dense, world.device, seed=seed)
    if not dist.is_initialized():
        raise ConfigError("split tables need a process group, there is none; start the run with torchrun")
    weights = dict(model.named_parameters())
    fuse_into_backward([weights[name] for name in tables], resolved)
    plan = plan_tables(model, resolved, workload or Workload(), world)
    with first_values_left_to_us(tables):
        parallel = DistributedModelParallel(model, device=world.device, plan=plan, sharders=sharders())
    state = parallel.state_dict()
    for name, config in tables.items():
        init_table(state[name], config, seed)
    rest = dict(in_backward_optimizer_filter(parallel.named_parameters()))
    optimizer = combined(parallel.fused_optimizer, dense_optimizer(rest, dense))
    return Trainable(parallel, optimizer, resolved, dense, describe_plan(plan))


def unsharded(
    model: nn.Module, sharding: ShardingConfig, dense: DenseOptimizerConfig, device: torch.device, *, seed: int
) -> Trainable:
    """Make a model trainable in one process with whole tables; the same interface as `shard`.

    Args:
        model: its tables may be on "meta".
        seed: what the tables' first values are drawn from.

    Raises:
        ConfigError: the tables are to be split.
    """
    tables = tables_of(model)
    resolved = resolve(sharding, tables, 1, device, managed=managed_tables(model))
    if resolved.split:
        raise ConfigError(
            f"one process without a group keeps its tables whole, got sharding {resolved.sharding}; call shard"
        )
    allocate_tables(model, device)
    model = model.to(device)
    weights = dict(model.named_parameters())
    for name, config in tables.items():
        init_table(weights[name], config, seed)
    table_optimizer = unfused({name: weights[name] for name in tables}, resolved)
    rest = {name: weight for name, weight in weights.items() if name not in tables}
    return Trainable(model, combined(table_optimizer, dense_optimizer(rest, dense)), resolved, dense, {})
