"""One case of a folder of published numbers, and what ours makes of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """An entry of the index, and its tensors by their full names, such as `param.x`, `input.x`, `expected.y`."""

    entry: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.entry["case"]

    @property
    def config(self) -> dict[str, Any]:
        """The published program's own settings."""
        return self.entry["config"]

    def parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """By their published names."""
        prefix = "param."
        return {n.removeprefix(prefix): t.to(dtype) for n, t in self.tensors.items() if n.startswith(prefix)}

    def inputs(self, name: str) -> Tensor:
        return self.tensors[f"input.{name}"]


@dataclass(frozen=True, eq=False)
class Computed:
    """What ours gives, each tensor beside the published one: name, ours, theirs, both of one shape."""

    outputs: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    gradients: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
