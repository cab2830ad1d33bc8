"""All that a checkpoint keeps of a model and its optimizer, as live tensors under names that no sharding changes.

    model.NAME             parameters and persistent buffers
    dense.NAME.WHAT        state of the dense optimizer
    tables.NAME.WHAT       state of the tables' optimizer: sum (of adagrad (R, D), of rowwise_adagrad (R,)),
                           exp_avg and exp_avg_sq (R, D) and step () of adam, nothing of sgd

FBGEMM and PyTorch name and shape the tables' state differently; here they meet, so that a checkpoint of split tables
loads into whole ones. A tensor here shares its memory with what it is named after: loading in place is loading.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer
from torchrec.optim.keyed import KeyedOptimizer

from ssd_torchrec.distributed.id_maps import maps_were_loaded
from ssd_torchrec.distributed.shard import Trainable
from ssd_torchrec.distributed.tables import local_pieces
from ssd_torchrec.errors import CheckpointError

Value = Tensor | ShardedTensor

TABLE_STATE = {"sgd": set(), "adagrad": {"sum"}, "rowwise_adagrad": {"sum"}, "adam": {"exp_avg", "exp_avg_sq", "step"}}
UNUSED_STEP = {
    "adagrad",
    "rowwise_adagrad",
}  # PyTorch's count steps for a decay of the learning rate, which we never use


def model_state(trainable: Trainable) -> dict[str, Value]:
    """Live weights; every rank has every name, with no piece of a table that lies elsewhere."""
    return {f"model.{name}": _live(value) for name, value in trainable.model.state_dict().items()}


def table_state(trainable: Trainable) -> dict[str, Value]:
    """Live state of the tables' optimizer; a rank has the names of the tables that it holds a part of."""
    fused = dict(trainable.optimizer.optimizers)["tables"]
    state = _fused_table_state(fused, trainable) if trainable.sharding.split else _whole_table_state(fused, trainable)
    kind = trainable.sharding.optimizer
    for table, values in state.items():
        if values.keys() != TABLE_STATE[kind]:
            raise CheckpointError(
                f"the state of {kind} must be {sorted(TABLE_STATE[kind])} for {table}, got {sorted(values)}; "
                "use a supported pair of torchrec and fbgemm: ssd-torchrec doctor tells"
            )
    return {f"tables.{table}.{what}": value for table, values in state.items() for what, value in values.items()}


def dense_state(trainable: Trainable) -> dict[str, Value]:
    """Live state of the dense optimizer, the same on every rank."""
    dense = dict(trainable.optimizer.optimizers)["dense"]
    return {
        f"dense.{name}.{what}": value
        for name, parameter in dense.params.items()
        for what, value in dense.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def local_rows(value: Value) -> tuple[Tensor, int]:
    """This rank's part of a table split by rows, live, and the row of the table at which it begins."""
    ((rows, (first_row, *_)),) = local_pieces(value)
    return rows, first_row


def after_loading(trainable: Trainable) -> None:
    """Tell FBGEMM that its tensors were written behind its back: drop cached rows, take the count of steps over. Tell
    id maps too."""
    maps_were_loaded(trainable.module)
    if not trainable.sharding.split:
        return
    for _, leaf in _leaves(dict(trainable.optimizer.optimizers)["tables"], ""):
        leaf._emb_module.reset_cache_states()
        if hasattr(leaf._emb_module, "iter_cpu"):
            leaf._emb_module.iter_cpu.fill_(int(leaf._emb_module.iter.item()))


def _live(value: Value) -> Value:
    return value if isinstance(value, ShardedTensor) else value.detach()


def _whole_table_state(tables: KeyedOptimizer, trainable: Trainable) -> dict[str, dict[str, Value]]:
    kind = trainable.sharding.optimizer
    state: dict[str, dict[str, Value]] = {}
    for name, parameter in tables.params.items():
        values = {what: v for what, v in tables.state.get(parameter, {}).items() if isinstance(v, Tensor)}
        if kind in UNUSED_STEP:
            values.pop("step", None)
        if kind == "rowwise_adagrad":
            values["sum"] = values["sum"].view(-1)  # (R, 1), one a row, is (R,) to FBGEMM
        state[name] = dict(values)
    return state


def _fused_table_state(tables: KeyedOptimizer, trainable: Trainable) -> dict[str, dict[str, Value]]:
    """FBGEMM's first state is "TABLE.momentum1" whatever it is; further ones are "TABLE.NAME"."""
    first = "exp_avg" if trainable.sharding.optimizer == "adam" else "sum"
    state: dict[str, dict[str, Value]] = {}
    for prefix, leaf in _leaves(tables, ""):
        for name, parameter in leaf.params.items():
            values = {what.rpartition(".")[2]: value for what, value in leaf.state.get(parameter, {}).items()}
            state[prefix + name] = {first if what == "momentum1" else what: v for what, v in values.items()}
            if trainable.sharding.optimizer == "adam":
                state[prefix + name]["step"] = leaf._emb_module.iter[0]  # a live view; the same for all ranks
    return state


def _leaves(optimizer: KeyedOptimizer, prefix: str) -> Iterator[tuple[str, Any]]:
    """FBGEMM's own optimizers below TorchRec's tree of combined ones, each with what precedes its names."""
    if isinstance(optimizer, EmbeddingFusedOptimizer):
        yield prefix, optimizer
    for path, child in getattr(optimizer, "optimizers", []):
        yield from _leaves(child, f"{prefix}{path}." if path else prefix)


def reset(values: dict[str, Value]) -> None:
    """Set optimizer state back to before the first step."""
    with torch.no_grad():
        for value in values.values():
            for piece in [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]:
                piece.zero_()
