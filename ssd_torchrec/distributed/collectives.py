"""What ranks tell each other: sums of figures, one rank's word for all, unequally many vectors. Each is collective."""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssd_torchrec.distributed.process import World

T = TypeVar("T")


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Sum of a small tensor over all ranks, on the host; every rank gets the same bits. Waits for the device."""
    values = values.to(world.device, copy=True)
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.cpu()


def word_of_rank_0(value: T, group: dist.ProcessGroup | None = None) -> T:
    """What rank 0 passed, on every rank; `value` must pickle."""
    if not dist.is_initialized():
        return value
    words: list[T] = [value]
    dist.broadcast_object_list(words, src=0, group=group)
    return words[0]


@dataclass(frozen=True)
class Everyone:
    """Where each rank's m vectors stand among the M of all, the shorter ranks' padded to the longest."""

    most: int
    mine: int
    rank: int
    world_size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, mine: int, device: torch.device, group: dist.ProcessGroup | None = None) -> "Everyone":
        """Make ranks that bring `mine` vectors known to each other; waits for the device."""
        most = torch.tensor(mine, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        return cls(int(most), mine, dist.get_rank(group), dist.get_world_size(group), group)

    def gather(self, values: Tensor, empty: float = 0) -> Tensor:
        """(m, ...) of each rank as (M, ...) on all, padded with `empty`."""
        padded = values.new_full((self.most, *values.shape[1:]), empty)
        padded[: self.mine] = values
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts)

    def own(self, values: Tensor) -> Tensor:
        """(m, ...) of this rank from (M, ...)."""
        return values[self.rank * self.most :][: self.mine]
