"""Inputs of the scan, and everything that comes out of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout

POSITIONAL = ("x", "dt", "A", "B", "C")
HEADS = 16
"""Enough values of a head's parameter for a root mean square to mean something."""


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
    return _with_gradients(("y", "final_state"), scan, tensors, layout, return_final_state=True, **options)


def bidirectional_inputs(lengths: list[int], seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """Those of `scan_inputs`, with steps of both directions and without states."""
    forward, backward = (scan_inputs(lengths, states=False, **options, seed=s) for s in (seed, seed + 1))
    stacked = {"dt": 1, "A": 0, "dt_bias": 0}
    return forward | {name: torch.stack([forward[name], backward[name]], dim) for name, dim in stacked.items()}


def results_without_states(
    scan: Callable[..., Any], tensors: dict[str, Tensor], layout: JaggedLayout, **options: Any
) -> dict[str, Tensor]:
    """Output and the gradient of every input."""
    return _with_gradients(("y",), scan, tensors, layout, **options)


def _with_gradients(
    names: tuple[str, ...],
    scan: Callable[..., Any],
    tensors: dict[str, Tensor],
    layout: JaggedLayout,
    **options: Any,
) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = call(scan, tensors, layout, **options)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    cotangents = [(torch.arange(o.numel(), device=o.device) % 5 - 2).to(o).view_as(o) for o in outputs]
    grads = torch.autograd.grad(outputs, list(tensors.values()), cotangents)
    return {
        **{name: output.detach() for name, output in zip(names, outputs, strict=True)},
        **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)},
    }
