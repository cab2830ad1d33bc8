"""One optimizer step a batch for a row-wise table that gets gradients twice: of its rows, and of what was looked up.

    lookup (FBGEMM) ─► events ─► encoder ─► queries ─► scores of all rows          forward
    step of the rows that were looked up ◄─ encoder ◄─ step of all other rows      backward

FBGEMM steps a table inside the backward of its lookup, from the lookup's gradient alone. Here that backward is cut off,
and the step is taken in its place, on FBGEMM's own weights and state, so checkpoints and later lookups see nothing of
it. Rows that the batch has not looked up are stepped as soon as their gradient is known, a chunk of the table at a
time; those it has wait for the rest of theirs. No gradient of the table's size is ever held.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding

from ssd_torchrec.distributed.optimizers import step_rows
from ssd_torchrec.distributed.shard import Trainable
from ssd_torchrec.distributed.state import local_rows, model_state, table_state
from ssd_torchrec.errors import ConfigError


class MergedStep:
    """This rank's rows of a table, stepped once a batch from both gradients.

    Args:
        trainable: with the table split row_wise by a fused kernel, alone in its collection.
        weight: name of the table's weight in the model's state.

    Raises:
        ConfigError: the table is split otherwise, shares its lookup, or lies behind a cache.
    """

    def __init__(self, trainable: Trainable, weight: str) -> None:
        table = _table_of(weight)
        if not is_row_wise(trainable, weight):
            place = trainable.plan.get(table, "whole")
            raise ConfigError(
                f"a table that is scored in place must be split row_wise with compute_kernel fused, got {table} "
                f"{place}; set sharding.by_table, or score looked-up candidates"
            )
        self._kind = trainable.sharding.optimizer
        self._eps = trainable.sharding.eps
        (self._group, *_) = dict(trainable.optimizer.optimizers)["tables"].param_groups
        self.weight, self.first_row = local_rows(model_state(trainable)[f"model.{weight}"])
        prefix = f"tables.{weight}."
        state = {n.removeprefix(prefix): v for n, v in table_state(trainable).items() if n.startswith(prefix)}
        self._counts = {name: value for name, value in state.items() if not isinstance(value, ShardedTensor)}
        self._parts = {name: local_rows(value)[0] for name, value in state.items() if name not in self._counts}
        self._parts["weight"] = self.weight
        self._waiting: _Waiting | None = None
        self._hook(trainable.module, table)

    def _hook(self, model: nn.Module, table: str) -> None:
        kernels = [module for module in _lookups(model) if table in _tables(module)]
        if len(kernels) != 1 or _tables(kernels[0]) != [table]:
            raise ConfigError(
                f"a table that is scored in place must be alone in its collection, got {table} with "
                f"{[_tables(kernel) for kernel in kernels]}; give it an EmbeddingCollection of its own"
            )
        kernels[0]._emb_module.register_forward_hook(self._cut, with_kwargs=True)

    def _cut(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any], events: Tensor) -> Tensor | None:
        """After a lookup in training: its gradient comes to us instead of FBGEMM."""
        if not torch.is_grad_enabled():
            return None
        indices = options["indices"] if "indices" in options else args[0]
        rows, place = indices.unique(return_inverse=True)
        self._waiting = _Waiting(rows, self.weight.new_zeros(len(rows), self.weight.shape[1]))
        door = self.weight.new_zeros((), requires_grad=True)
        return _StepLookedUp.apply(events.detach(), door, place, self)

    @torch.no_grad()
    def step_chunk(self, first: int, gradient: Tensor) -> None:
        """Step the local rows from `first` on by their gradient (C, D), but for those that the batch has looked up."""
        assert self._waiting is not None, "a batch is looked up before it is scored"
        rows, held = self._waiting
        ends = torch.tensor([first, first + len(gradient)], device=gradient.device)
        begin, end = torch.searchsorted(rows, ends).tolist()
        waiting = rows[begin:end]
        held[begin:end] = gradient[waiting - first]
        unstepped = self._of(waiting)
        self._step(self._of(slice(first, first + len(gradient))), gradient)
        for name, value in unstepped.items():
            self._parts[name][waiting] = value

    @torch.no_grad()
    def step_looked_up(self, place: Tensor, gradient: Tensor) -> None:
        """Step the rows that the batch has looked up by all of their gradient.

        Args:
            place: (T,) for each event its row among them.
            gradient: (T, D) of the events.
        """
        assert self._waiting is not None, "a batch is looked up before backward"
        (rows, held), self._waiting = self._waiting, None
        stepped = self._of(rows)
        self._step(stepped, held.index_add_(0, place, gradient))
        for name, value in stepped.items():
            self._parts[name][rows] = value

    def _of(self, rows: slice | Tensor) -> dict[str, Tensor]:
        """Weight and state of some rows: views of a slice, copies of others."""
        return {name: part[rows] for name, part in self._parts.items()}

    def _step(self, parts: dict[str, Tensor], gradient: Tensor) -> None:
        state = {name: value for name, value in parts.items() if name != "weight"} | self._counts
        step_rows(self._kind, parts["weight"], gradient, state, rate=self._group["lr"], eps=self._eps)


class _Waiting(NamedTuple):
    """Rows that the batch has looked up, ascending, and what is known so far of their gradient."""

    rows: Tensor  # (U,) local
    held: Tensor  # (U, D)


def is_row_wise(trainable: Trainable, weight: str) -> bool:
    """Whether a table is split by rows that lie in plain memory, no cache before them.

    Args:
        weight: name of its weight in the model's state.
    """
    return trainable.plan.get(_table_of(weight), "").startswith("row_wise fused ")


def _table_of(weight: str) -> str:
    return weight.split(".")[-2]


class _StepLookedUp(torch.autograd.Function):
    """Passes looked-up events on; its backward takes the step that FBGEMM's would have."""

    @staticmethod
    def forward(ctx: Any, events: Tensor, door: Tensor, place: Tensor, step: MergedStep) -> Tensor:
        ctx.save_for_backward(place)
        ctx.step = step
        return events.view_as(events)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        ctx.step.step_looked_up(*ctx.saved_tensors, *grad_outputs)
        return None, None, None, None


def _lookups(model: nn.Module) -> list[BatchedFusedEmbedding]:
    found = []
    for module in model.modules():
        for lookup in getattr(module, "_lookups", []):
            found += [part for part in lookup.modules() if isinstance(part, BatchedFusedEmbedding)]
    return found


def _tables(kernel: BatchedFusedEmbedding) -> list[str]:
    return [table.name for table in kernel._config.embedding_tables]
