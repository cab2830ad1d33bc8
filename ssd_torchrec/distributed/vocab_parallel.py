"""Exact softmax over a catalogue whose table is split by rows: every rank scores its own rows, where they lie.

    queries of all ranks (M, D) ─► log of the sum over this rank's rows, target's score    (M,) each
                                                                                     │ travel between ranks
    loss[i] = log sum_k exp(queries[i] . table[k]) - queries[i] . table[target[i]]  ◄┘ over all rows of all ranks

What travels is M x D numbers of queries and their gradients and a few an M, however large the catalogue; no rank sees
another's rows, and none copies its own. Memory is O(M x D + block of scores). Gradients go to the queries by autograd,
and to the table through `MergedStep`, chunk by chunk. Scores live in the tiles of `ops/item_softmax_triton.py` on CUDA;
on the CPU, and where rows are wider than a tile, a block of them is held.

Shapes: M queries of all ranks, padded to equal many a rank; D width; C rows of a chunk.
Source: Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, section 3, for the exchange of max and sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssd_torchrec.data.batch import Batch
from ssd_torchrec.distributed.collectives import Everyone
from ssd_torchrec.distributed.merged_step import MergedStep, is_row_wise
from ssd_torchrec.distributed.shard import Trainable
from ssd_torchrec.distributed.state import local_rows, model_state
from ssd_torchrec.ops.item_softmax_triton import WIDEST
from ssd_torchrec.ops.linear import over_events, product

ROWS_PER_CHUNK = {"cpu": 4096, "cuda": 65536}
QUERIES_PER_BLOCK = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True, eq=False)
class CatalogueShard:
    """The items whose rows this rank holds."""

    items: Tensor  # (N, D) live rows of the table
    first_item: int  # number of the first of them, items counting from 0

    @classmethod
    def of(cls, trainable: Trainable, weight: str, first_item: int) -> "CatalogueShard | None":
        """This rank's part, or None if the table is not split row_wise in plain memory.

        Args:
            weight: name of the item table's weight in the model's state.
            first_item: first row of the table that is an item.
        """
        if not is_row_wise(trainable, weight):
            return None
        rows, first_row = local_rows(model_state(trainable)[f"model.{weight}"])
        skipped = min(max(first_item - first_row, 0), len(rows))
        return cls(rows[skipped:], first_row + skipped - first_item)

    def chunks(self, rows: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Where each chunk begins among the items here, and its rows (C, D)."""
        rows = rows or ROWS_PER_CHUNK[self.items.device.type]
        return ((at, self.items[at : at + rows]) for at in range(0, len(self.items), rows))

    def inside(self, item: Tensor, at: int, rows: int) -> tuple[Tensor, Tensor]:
        """Which of some items lie in a chunk, as places in `item`, and their rows of it."""
        row = self.row_of(item, at, rows)
        found = (row >= 0).nonzero()[:, 0]
        return found, row[found]

    def row_of(self, item: Tensor, at: int, rows: int) -> Tensor:
        """Rows of some items in a chunk; -1 of those that lie elsewhere."""
        row = item - (self.first_item + at)
        return torch.where((row >= 0) & (row < rows), row, -1)


class VocabParallelSoftmaxLoss(nn.Module):
    """Cross-entropy over the whole catalogue, split by rows over the ranks; averaged as `FullSoftmaxLoss` is.

    Equals that loss, its gradients and its optimizer steps up to rounding, without candidates in the batch. To be bound
    to the model once its tables are split.
    """

    def __init__(self, world_size: int = 1) -> None:
        super().__init__()
        self.world_size = world_size
        self._bound: _Bound | None = None

    def bind(self, trainable: Trainable, weight: str, first_item: int) -> None:
        """Take hold of this rank's rows. Collective.

        Args:
            weight: name of the item table's weight in the model's state.
            first_item: first row of the table that is an item; those before are no candidates.

        Raises:
            ConfigError: the table is not split row_wise by a fused kernel; see `MergedStep`.
        """
        step = MergedStep(trainable, weight)
        shard = CatalogueShard.of(trainable, weight, first_item)
        assert shard is not None, "MergedStep takes no other table"
        group = dist.new_group()  # of its own: autograd decides when its turn comes among the other collectives
        assert isinstance(group, dist.ProcessGroup)
        self._bound = _Bound(shard, step, len(step.weight) - len(shard.items), group)

    def forward(self, queries: Tensor, candidates: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """From (T, D) queries; no candidates are looked at, and `batch.target` counts from the first item.

        Returns:
            As `FullSoftmaxLoss`. Collective, and so is its backward.
        """
        assert self._bound is not None, "bind the loss to the split model"
        asked = (batch.target >= 0).nonzero()[:, 0]
        total = _Softmax.apply(queries[asked].float(), batch.target[asked], self._bound).sum()
        local = torch.stack([total.detach(), total.new_tensor(len(asked))])
        return total * (self.world_size / batch.global_targets), local


class _Bound(NamedTuple):
    shard: CatalogueShard
    step: MergedStep
    skipped: int  # local rows before the first item
    group: dist.ProcessGroup | None


class _Softmax(torch.autograd.Function):
    """Loss (m,) of this rank's queries (m, D) with targets (m,)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, target: Tensor, bound: _Bound) -> Tensor:
        shard, group = bound.shard, bound.group
        everyone = Everyone.of(len(queries), queries.device, group)
        queries, target = everyone.gather(queries), everyone.gather(target, empty=-1)
        log_sum_here, chosen = (_summed_in_tiles if _fits_tiles(queries) else _summed_in_blocks)(queries, target, shard)
        top = log_sum_here.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        sums = torch.stack([(log_sum_here - top).exp(), chosen])
        dist.all_reduce(sums, group=group)
        log_sum = top + sums[0].log()
        ctx.save_for_backward(queries, target, log_sum)
        ctx.bound, ctx.everyone = bound, everyone
        return everyone.own(log_sum - sums[1]).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        queries, target, log_sum = ctx.saved_tensors
        bound, everyone = ctx.bound, ctx.everyone
        weight = everyone.gather(grad_outputs[0])
        gradients = (_gradients_in_tiles if _fits_tiles(queries) else _gradients_in_blocks)(
            queries, target, log_sum, weight, bound.shard
        )
        dqueries = torch.zeros_like(queries)
        for at, drows, part in gradients:
            dqueries += part
            drows /= everyone.world_size  # as TorchRec averages the gradient of what is looked up
            bound.step.step_chunk(bound.skipped + at, drows)
        dist.all_reduce(dqueries, group=bound.group)
        return everyone.own(dqueries), None, None


def _fits_tiles(queries: Tensor) -> bool:
    return queries.is_cuda and queries.shape[1] <= WIDEST


def _summed_in_tiles(queries: Tensor, target: Tensor, shard: CatalogueShard) -> tuple[Tensor, Tensor]:
    """(M,) fp64 each: log of the sum over the rows here, -inf over none; the target's score, 0 if it lies elsewhere."""
    if not len(shard.items):
        return _nothing(queries)
    row = shard.row_of(target, 0, len(shard.items))
    # row 0 stands in for a target that is elsewhere: without any the kernel takes nothing to be asked
    loss, log_sum = torch.ops.ssd_torchrec.item_softmax(queries, shard.items, row.clamp_min(0), None, None)
    return log_sum.double(), torch.where(row >= 0, log_sum - loss, 0).double()


def _gradients_in_tiles(
    queries: Tensor, target: Tensor, log_sum: Tensor, weight: Tensor, shard: CatalogueShard
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each chunk of rows: where it begins, its gradient (C, D), and what it adds to that of the queries (M, D)."""
    log_sum = log_sum.float()
    for at, rows in shard.chunks():
        given = weight, queries, rows, shard.row_of(target, at, len(rows)), None, None, log_sum
        drows, _ = torch.ops.ssd_torchrec.item_softmax_dcandidates(*given)
        yield at, drows, torch.ops.ssd_torchrec.item_softmax_dqueries(*given)


def _summed_in_blocks(queries: Tensor, target: Tensor, shard: CatalogueShard) -> tuple[Tensor, Tensor]:
    """As in tiles."""
    highest, chosen = _nothing(queries)
    total = torch.zeros_like(chosen)
    for at, rows in shard.chunks():
        for block in _blocks(queries):
            scores = _product(queries[block], rows)
            found, row = shard.inside(target[block], at, len(rows))
            chosen[block][found] = scores[found, row].double()
            highest_here = torch.maximum(highest[block], scores.amax(1).double())
            total[block] *= (highest[block] - highest_here).exp()
            total[block] += scores.sub_(highest_here[:, None]).exp_().sum(1, dtype=torch.float64)
            highest[block] = highest_here
    return highest + total.log(), chosen


def _gradients_in_blocks(
    queries: Tensor, target: Tensor, log_sum: Tensor, weight: Tensor, shard: CatalogueShard
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As in tiles."""
    for at, rows in shard.chunks():
        drows, dqueries = torch.zeros_like(rows), torch.empty_like(queries)
        for block in _blocks(queries):
            p = _product(queries[block], rows).sub_(log_sum[block, None]).exp_()
            found, row = shard.inside(target[block], at, len(rows))
            p[found, row] -= 1
            p *= weight[block, None]
            dqueries[block] = _product(p, rows.T)
            drows += over_events(queries[block], p).T if p.device.type == "cpu" else p.T @ queries[block]
        yield at, drows, dqueries


def _nothing(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of no sum, and no score."""
    none = queries.new_full((len(queries),), -torch.inf, dtype=torch.float64)
    return none, torch.zeros_like(none)


def _blocks(queries: Tensor) -> Iterator[slice]:
    step = QUERIES_PER_BLOCK[queries.device.type]
    return (slice(at, at + step) for at in range(0, len(queries), step))


def _product(left: Tensor, right: Tensor) -> Tensor:
    return product(left, right) if left.device.type == "cpu" else left @ right.T
