"""What stands in a line of the tables: a way to compute an operator, with tensors laid out as it likes them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Rows of these lengths, and in which directions they are gone through."""

    lengths: list[int]
    layout: JaggedLayout
    both: bool = False


def as_it_is(events: Tensor) -> Tensor:
    return events


@dataclass(frozen=True)
class Call:
    """A computation ready to be timed."""

    inputs: Tensors
    """Leaves whose gradients are wanted, by the names they have among the tensors of the problem."""

    outputs: Callable[[], Tensor]
    pack: Callable[[Tensor], Tensor] = as_it_is
    """Of (T, ...) events, to the layout of this contender; done once a batch, and not timed."""

    unpack: Callable[[Tensor], Tensor] = as_it_is
    """Back to (T, ...)."""

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.outputs()

    def both_ways(self, cotangent: Tensor | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """Forward and backward, with a cotangent (T, ...) made beforehand; random if None."""
        like = self.forward()
        dy = torch.randn_like(like) if cotangent is None else self.pack(cotangent).to(like)
        return lambda: torch.autograd.grad(self.outputs(), list(self.inputs.values()), dy)


Contender = Callable[[Tensors, Batch], Call]


def leaves(tensors: Tensors) -> Tensors:
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def of_way(tensors: Tensors, batch: Batch, way: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps, decays and bias of a scan's one direction: 0 is forward; backward is 1 where there are both."""
    dt, A, bias = (tensors[name] for name in ("dt", "A", "dt_bias"))
    return (dt[..., way, :], A[way], bias[way]) if batch.both else (dt, A, bias)
