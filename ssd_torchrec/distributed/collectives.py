"""What ranks tell each other outside the model: sums of figures, and one rank's word for all. Each is collective."""

from typing import TypeVar

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


def word_of_rank_0(value: T) -> T:
    """What rank 0 passed, on every rank; `value` must pickle."""
    if not dist.is_initialized():
        return value
    words: list[T] = [value]
    dist.broadcast_object_list(words, src=0)
    return words[0]
