"""Inputs of the scan, and everything that comes out of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout

POSITIONAL = ("x", "dt", "A", "B", "C")


def scan_inputs(
    lengths: list[int],
    *,
    heads: int = 4,
    channels: int = 3,
    state: int = 5,
    groups: int = 1,
    fastest: float = 2.0,
    gate: bool = True,
    states: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """By parameter name, in fp64; `fastest` is the largest decay rate."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    events = sum(lengths)
    tensors = {
        "x": normal(events, heads, channels),
        "dt": normal(events, heads),
        "A": -fastest * (0.01 + torch.rand(heads, generator=rng, dtype=torch.float64)),
        "B": normal(events, groups, state),
        "C": normal(events, groups, state),
        "dt_bias": normal(heads),
        "D": normal(heads),
    }
    if gate:
        tensors["z"] = normal(events, heads, channels)
    if states:
        tensors["initial_state"] = normal(len(lengths), heads, channels, state)
    return tensors


def call(scan: Callable[..., Any], tensors: dict[str, Tensor], layout: JaggedLayout, **options: Any) -> Any:
    named = {name: tensor for name, tensor in tensors.items() if name not in POSITIONAL}
    return scan(*(tensors[name] for name in POSITIONAL), layout, **named, **options)


def results(
    scan: Callable[..., Any], tensors: dict[str, Tensor], layout: JaggedLayout, **options: Any
) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input; cotangents are exact in every dtype."""
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = call(scan, tensors, layout, return_final_state=True, **options)
    cotangents = [(torch.arange(o.numel(), device=o.device) % 5 - 2).to(o).view_as(o) for o in outputs]
    grads = torch.autograd.grad(outputs, list(tensors.values()), cotangents)
    named = {f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}
    return {"y": outputs[0].detach(), "final_state": outputs[1].detach(), **named}
